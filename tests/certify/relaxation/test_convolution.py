"""Coefficients pulled back through convolutions: torch's own gradients, whatever the layout."""

import pytest
import torch
from torch import nn

from pyrobust.certify.relaxation.convolution import is_plain, pull_convolution

LAYERS = [
    nn.Conv2d(3, 5, 3),
    nn.Conv2d(3, 5, 3, padding=1),
    nn.Conv2d(3, 5, (3, 2), padding=(0, 1)),
    nn.Conv2d(3, 5, 1, padding=2),
    nn.Conv2d(3, 5, 3, dilation=2, padding=1),
    nn.Conv2d(4, 6, 3, groups=2, padding=2),
    nn.Conv2d(3, 5, 3, stride=2, padding=1),
    nn.Conv2d(3, 5, 4, stride=2, padding=1),
    nn.Conv2d(1, 5, (5, 3), stride=3, padding=(2, 0)),
    nn.Conv2d(3, 5, 2, stride=3),
    nn.Conv2d(12, 5, 3, stride=2, padding=1),
    nn.Conv2d(3, 5, 3, stride=(2, 1), padding=1),
    nn.Conv2d(4, 6, 3, groups=2, stride=2, dilation=2),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("size", [(7, 8), (10, 9)])
def test_equals_the_gradient_of_the_input(layer, size):
    torch.manual_seed(0)
    layer = layer.double()
    x = torch.randn(2, layer.in_channels, *size, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    a = torch.randn_like(y)
    (expected,) = torch.autograd.grad((y * a).sum(), x)
    options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    assert is_plain(options) == (layer.groups == 1 and layer.dilation == (1, 1))
    found = pull_convolution(a, layer.weight, options, list(size))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
