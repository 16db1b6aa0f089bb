"""Corruptions: in range, stronger with severity, reproducible."""

import sys
from itertools import pairwise

import pytest
import torch

from pyrobust.data import CORRUPTIONS, KORNIA_CORRUPTIONS, corrupt


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", CORRUPTIONS + KORNIA_CORRUPTIONS)
def test_every_kind_stays_in_range_and_grows(kind, channels):
    if kind in KORNIA_CORRUPTIONS:
        pytest.importorskip("kornia")
    images = torch.rand(64, channels, 8, 12)
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
    with pytest.raises(TypeError, match="must be a floating-point tensor"):
        corrupt(torch.ones(1, 1, 8, 8, dtype=torch.uint8), "gamma")
    with pytest.raises(ValueError, match="severity must be one of"):
        corrupt(torch.rand(1, 1, 2, 2), "fog", 6)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    monkeypatch.setitem(sys.modules, "kornia.enhance", None)
    with pytest.raises(ImportError, match=r"pip install 'pyrobust\[corruptions\]'"):
        corrupt(torch.rand(1, 1, 8, 8), "gamma")
