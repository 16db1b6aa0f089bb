"""Max pooling, softmax, attention, layer norm, products and quotients beside auto_LiRPA."""

import json
import sys
from pathlib import Path

import pytest
import torch

from pyrobust import Interval
from pyrobust.certify import bound

sys.path.insert(0, str(Path(__file__).parent))
from compared_models import case

STORED = json.loads((Path(__file__).parent / "auto_lirpa_composed.json").read_text())
CASES = [key for key in STORED if key != "source"]
# Largest mean width against the reference's, by operation; measured: all at most 1.
LARGEST = {
    "max pooling": 0.85, "attention": 1.0, "softmax": 0.98, "layer norm": 0.98, "gate": 1.0,
    "quotient": 0.98,
}  # fmt: skip


@pytest.mark.parametrize("key", CASES)
def test_bounds_are_at_least_as_tight_on_average(key):
    name, eps, method = key.split("|")
    model, x = case(name)
    lower, upper = torch.tensor(STORED[key])
    with torch.no_grad():
        bounds = bound(model, Interval.ball(x, float(eps)), method=method.lower())
    share = float(bounds.width().mean() / (upper - lower).mean())
    assert share <= LARGEST[name] + 1e-4
    # both enclose the same values
    assert bool((bounds.lower <= upper).all() & (bounds.upper >= lower).all())


@pytest.mark.parametrize("method", ["CROWN-IBP", "CROWN"])
def test_products_of_sign_definite_factors_equal_the_reference(method):
    """There both use the same planes and lines."""
    model, x = case("gate")
    lower, upper = torch.tensor(STORED[f"gate|0.02|{method}"])
    with torch.no_grad():
        bounds = bound(model, Interval.ball(x, 0.02), method=method.lower())
    torch.testing.assert_close(bounds.lower, lower, rtol=0, atol=1e-4)
    torch.testing.assert_close(bounds.upper, upper, rtol=0, atol=1e-4)
