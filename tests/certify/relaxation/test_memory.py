"""The memory that a bound takes, as torch's allocator counts it, against what it may take."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from pyrobust import Interval
from pyrobust.certify import bound


def peak(call):
    """Bytes that torch's allocator held at most beyond the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held, most = 0, 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 64, 40), nn.ReLU(), nn.Linear(40, 10),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("rounding", ["nearest", "real"])
@pytest.mark.parametrize("method", ["crown-ibp", "crown", "alpha-crown"])
def test_a_bound_keeps_within_its_memory(method, rounding):
    model, x = convolutions(), torch.rand(12, 1, 16, 16)
    box = Interval.ball(x, 0.05, rounding=rounding)
    with torch.no_grad():
        whole = bound(model, box, method=method, iterations=1)
        free = peak(lambda: bound(model, box, method=method, iterations=1))
        for mebibytes in (16, 8, 3):
            limit = mebibytes << 20
            split = {}
            used = peak(
                lambda limit=limit, split=split: split.update(
                    bounds=bound(model, box, method=method, iterations=1, max_memory=limit)
                )
            )
            assert used <= 1.1 * limit
            torch.testing.assert_close(split["bounds"].lower, whole.lower, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(split["bounds"].upper, whole.upper, rtol=1e-3, atol=1e-3)
    assert free > 1.1 * limit  # or the limit would have meant nothing


def test_a_model_that_mixes_images_is_not_divided():
    class Mixing(nn.Module):
        def forward(self, x):
            return x + x.flip(0)

    box = Interval.ball(torch.ones(4, 3), 0.1)  # the images are alike
    with pytest.raises(NotImplementedError, match="must keep the batch as its first axis"):
        bound(Mixing(), box, method="crown", max_memory=1)


def test_specifications_of_single_images_are_divided_with_them():
    model, x = convolutions(), torch.rand(5, 1, 16, 16)
    box = Interval.ball(x, 0.02)
    spec = torch.randn(5, 3, 10)
    whole = bound(model, box, spec, "crown")
    parts = bound(model, box, spec, "crown", max_memory=1)
    torch.testing.assert_close(parts.lower, whole.lower, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.upper, whole.upper, rtol=1e-4, atol=1e-5)
