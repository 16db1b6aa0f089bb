"""The products of training on a GPU, run here on the CPU: those of the operators, gradients too."""

import pytest
import torch

from pyrobust import ops
from pyrobust.ops import _interval_conv
from pyrobust.ops._interval_nearest import nearest_image

OPTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 3},
    {"padding": (1, 2), "groups": 2},
]


def gradients(function, tensors):
    tensors = [t.clone().requires_grad_() for t in tensors]
    low, high = function(*tensors)
    weights = torch.linspace(-1, 1, low.numel(), dtype=low.dtype).reshape(low.shape)
    return (low, high, *torch.autograd.grad((low * weights + high * (1 - weights)).sum(), tensors))


def box(*shape):
    centre, radius = torch.randn(shape), torch.rand(shape)
    return centre - radius, centre + radius


def test_linear_layers():
    tensors = (*box(7, 5), torch.randn(4, 5), torch.randn(4))
    found = gradients(lambda *t: nearest_image(*t, torch.nn.functional.linear), tensors)
    expected = gradients(lambda *t: ops.interval_linear(*t, rounding="nearest"), tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", OPTIONS)
def test_convolutions_where_the_wrapper_takes_them(options, monkeypatch):
    tensors = (
        *box(2, 4, 9, 8),
        torch.randn(6, 4 // options.get("groups", 1), 3, 2),
        torch.randn(6),
    )

    def convolve(*tensors):
        return ops.interval_conv2d(*tensors, rounding="nearest", **options)

    expected = gradients(convolve, tensors)
    monkeypatch.setattr(_interval_conv, "taken_by_torch", lambda *_: True)
    found = gradients(convolve, tensors)
    assert (
        "DifferenceAndSum"
        in type(convolve(*[t.requires_grad_() for t in tensors])[0].grad_fn).__name__
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_of_gradients():
    tensors = [t.double() for t in (*box(2, 3), torch.randn(2, 3), torch.randn(2))]
    tensors = [t.requires_grad_() for t in tensors]

    def image(*t):
        return nearest_image(*t, torch.nn.functional.linear)

    assert torch.autograd.gradcheck(image, tensors)
    assert torch.autograd.gradgradcheck(image, tensors)
