"""Transposed convolutions as modules call them: groups and dilation in torch's own order."""

import pytest
import torch
from torch import nn

from pyrobust import Interval


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2),
        nn.ConvTranspose1d(4, 6, 3, groups=2),
        nn.ConvTranspose3d(4, 2, 2, groups=2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_transposed_convolutions_of_modules(layer):
    axes = layer.weight.ndim - 2
    x = torch.randn(2, 4, *[5] * axes)
    box = layer(Interval.ball(x, 0.1))
    wide = layer.double()
    for _ in range(20):
        inside = x.double() + 0.1 * torch.randn_like(x.double()).sign()
        y = wide(inside)
        assert bool((y >= box.lower - 1e-7).all() & (y <= box.upper + 1e-7).all())
    assert float(box.width().detach().mean()) < 2 * float(0.2 * wide.weight.abs().sum())
