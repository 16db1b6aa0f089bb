"""Trained networks: equal to another library's intervals in float64, containing them when sound."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from pyrobust import Interval

from .shared_models import NAMES, box, load_images, load_model

pytestmark = pytest.mark.emulated_tiles

STORED = json.loads((Path(__file__).parent / "auto_lirpa_ibp.json").read_text())
CASES = [key for key in STORED if key != "source"]
# Mean width over that of the exact intervals at 2/255, measured and rounded up: (real, deployed).
# mnist_cnn_small was trained for bounds at a far larger radius: at this one its exact widths are
# near 1e-3 of its logits, so that rounding of the logits shows; more on one image (1.0011, 1.0113).
WIDENING = {
    "mnist_fc_3layer": (1.0002, 1.001),
    "mnist_cnn_small": (1.0012, 1.0115),
    "cifar_2c2f": (1.0002, 1.0011),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_float64_intervals_equal_a_reference_and_contain_it_when_sound(case, data_folder):
    name, eps = case.split()
    model = load_model(data_folder, name).double()
    ends = box(load_images(data_folder, name, 4).double(), eps)
    lower, upper = torch.tensor(STORED[case], dtype=torch.float64)
    nearest = model(Interval(*ends, rounding="nearest"))
    torch.testing.assert_close(nearest.lower, lower, rtol=0, atol=1e-5)
    torch.testing.assert_close(nearest.upper, upper, rtol=0, atol=1e-5)
    for rounding in ("real", "deployed"):
        sound = model(Interval(*ends, rounding=rounding))
        assert bool((sound.lower <= lower).all())
        assert bool((sound.upper >= upper).all())
        torch.testing.assert_close(sound.lower, lower, rtol=0, atol=1e-5)
        torch.testing.assert_close(sound.upper, upper, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_float32_kernels_contain_the_float64_intervals_and_are_hardly_wider(name, isa, data_folder):
    model = load_model(data_folder, name)
    exact_model = copy.deepcopy(model).double()
    for count in (1, 20):
        ends = box(load_images(data_folder, name, count), "2/255")
        exact = exact_model(Interval(*(end.double() for end in ends)))
        for rounding, most in zip(("real", "deployed"), WIDENING[name], strict=True):
            ours = model(Interval(*ends, rounding=rounding))
            assert bool(ours.contains(exact).all())
            width = (ours.upper.double() - ours.lower.double()).mean()
            assert float(width / (exact.upper - exact.lower).mean()) <= most
