"""Corruptions: in range, stronger with severity, reproducible."""

from itertools import pairwise

import pytest
import torch

from pyrobust.data import CORRUPTIONS, corrupt


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_kind_stays_in_range_and_grows(kind):
    images = torch.rand(64, 3, 8, 8)
    moved = []
    for severity in range(1, 6):
        generator = torch.Generator().manual_seed(0)
        changed = corrupt(images, kind, severity, generator=generator)
        assert changed.shape == images.shape
        assert float(changed.min()) >= 0
        assert float(changed.max()) <= 1
        again = corrupt(images, kind, severity, generator=torch.Generator().manual_seed(0))
        assert torch.equal(changed, again)
        moved.append(float((changed - images).abs().mean()))
    assert all(a < b for a, b in pairwise(moved))


def test_refusals():
    with pytest.raises(ValueError, match="kind must be one of"):
        corrupt(torch.rand(1, 1, 2, 2), "snow")
    with pytest.raises(ValueError, match="severity must be one of"):
        corrupt(torch.rand(1, 1, 2, 2), "fog", 6)
