"""Rounding of activations: the rule of the kernels, straight-through gradients."""

import pytest
import torch

from pyrobust.nn import PackedLinear
from pyrobust.quantize import fake_quantize_activation, quantize_activation


def test_codes_times_step_is_the_nearest_multiple():
    x = torch.randn(5, 33)
    codes, step = quantize_activation(x)
    assert codes.dtype == torch.int8
    assert bool((codes.abs().amax(-1) == 127).all())
    assert bool(((codes * step - x).abs() <= step / 2 * (1 + 1e-12)).all())
    assert torch.equal(fake_quantize_activation(x), (codes * step).float())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ranges_of_each_width(bits):
    codes, _ = quantize_activation(torch.randn(50, 20), bits=bits)
    assert int(codes.abs().max()) == 2 ** (bits - 1) - 1


def test_it_is_what_the_int8_kernel_multiplies():
    layer = PackedLinear(40, 7, bias=False, activations="int8")
    x = torch.randn(300, 40)
    rounded = fake_quantize_activation(x)
    with torch.no_grad():
        kernel = layer(x)
    exact = rounded.double() @ layer.dequantize().double().T
    # a single code rounded elsewhere would change an output by about 1e-3
    torch.testing.assert_close(kernel.double(), exact, rtol=1e-5, atol=1e-5)


def test_rows_of_zeros_and_of_nan_and_another_axis():
    x = torch.tensor([[0.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0]])
    result = fake_quantize_activation(x)
    assert torch.equal(result[0], torch.zeros(2))
    assert bool(result[1:].isnan().all())
    y = torch.randn(4, 6)
    assert torch.equal(fake_quantize_activation(y, dim=0), fake_quantize_activation(y.T).T)
    assert fake_quantize_activation(torch.zeros(0, 5)).shape == (0, 5)
    assert fake_quantize_activation(torch.zeros(5, 0)).shape == (5, 0)


def test_the_gradient_passes_unchanged():
    x = torch.randn(3, 8, requires_grad=True)
    weights = torch.randn(3, 8)
    (fake_quantize_activation(x) * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_refusals():
    with pytest.raises(ValueError, match="at most 8"):
        quantize_activation(torch.zeros(2), bits=9)
    with pytest.raises(ValueError, match="at least 2"):
        quantize_activation(torch.zeros(2), bits=1)
    with pytest.raises(TypeError, match="floating-point"):
        fake_quantize_activation(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one axis"):
        fake_quantize_activation(torch.tensor(1.0))
