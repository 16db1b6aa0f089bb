"""The operators packed_conv2d and packed_embedding: torch's own checks, blocks, gradients, vmap."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.library import opcheck

from pyrobust import ops
from pyrobust.ops import packed_conv
from pyrobust.quantize import round_to_nearest


def line_arguments(groups=1, group_dim=1, requires_grad=False):
    """Images of height 1, which the kernels lay on their side."""
    qtensor = round_to_nearest(
        torch.randn(6, 4 // groups * 3), bits=3, group_size=5, group_dim=group_dim
    )
    x = torch.randn(3, 4, 1, 23, requires_grad=requires_grad)
    bias = torch.randn(6, requires_grad=requires_grad)
    tensors = (x, qtensor.codes, qtensor.scale, qtensor.zero, bias)
    return (*tensors, (1, 3), (1, 2), (1, 2), (1, 2, 0, 0), groups, 3.0, 5, group_dim)


def conv_arguments(groups=1, group_dim=1, requires_grad=False):
    qtensor = round_to_nearest(
        torch.randn(6, 4 // groups * 6), bits=3, group_size=5, group_dim=group_dim
    )
    x = torch.randn(3, 4, 7, 6, requires_grad=requires_grad)
    bias = torch.randn(6, requires_grad=requires_grad)
    tensors = (x, qtensor.codes, qtensor.scale, qtensor.zero, bias)
    return (*tensors, (2, 3), (2, 1), (1, 2), (1, 0, 2, 1), groups, 3.0, 5, group_dim)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("given", [conv_arguments, line_arguments])
def test_conv_passes_opcheck(given, groups, group_dim):
    arguments = given(groups, group_dim, requires_grad=True)
    opcheck(torch.ops.pyrobust.packed_conv2d.default, (*arguments, None))
    x, codes, scale, zero, _bias, *rest = arguments
    out = torch.ops.pyrobust.packed_conv2d(*arguments, None)
    grad = torch.randn_like(out, requires_grad=True)
    gradient = (grad, codes, scale, zero, tuple(x.shape), *rest)
    opcheck(torch.ops.pyrobust.packed_conv2d_input_grad.default, gradient)


def test_embedding_passes_opcheck():
    qtensor = round_to_nearest(torch.randn(6, 9), bits=3, group_size=5)
    arguments = (torch.tensor([[0, 5]]), qtensor.codes, qtensor.scale, qtensor.zero)
    operator = torch.ops.pyrobust.packed_embedding.default
    opcheck(operator, (*arguments, 9, 3.0, 5, 1, torch.float32))


@pytest.mark.parametrize("budget", [1, 100, 1000, 5000])
@pytest.mark.parametrize("given", [conv_arguments, line_arguments])
def test_small_blocks_change_no_bit_of_the_result(monkeypatch, given, budget):
    arguments = given(groups=2)
    whole = torch.ops.pyrobust.packed_conv2d(*arguments, None)
    x, codes, scale, zero, _bias, *rest = arguments
    gradient = (torch.randn_like(whole), codes, scale, zero, tuple(x.shape), *rest)
    whole_gradient = torch.ops.pyrobust.packed_conv2d_input_grad(*gradient)
    monkeypatch.setattr(packed_conv, "COLUMN_BYTES", budget)
    assert torch.equal(torch.ops.pyrobust.packed_conv2d(*arguments, None), whole)
    again = torch.ops.pyrobust.packed_conv2d_input_grad(*gradient)
    assert torch.allclose(again, whole_gradient, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_conv_gradients_equal_those_of_the_float64_convolution(groups):
    arguments = conv_arguments(groups, requires_grad=True)
    x, codes, scale, zero, bias, kernel, stride, dilation, pad, *_ = arguments
    decoded = ops.dequantize_codes(
        codes, scale, zero, in_features=4 // groups * 6, bits=3, group_size=5
    )
    weight = decoded.double().reshape(6, 4 // groups, *kernel)

    def reference(x, bias):
        padded = torch.nn.functional.pad(x, pad)
        return torch.conv2d(padded, weight, bias, stride, 0, dilation, groups)

    def packed(x, bias):
        return torch.ops.pyrobust.packed_conv2d(x, codes, scale, zero, bias, *arguments[5:], None)

    grad = torch.randn_like(packed(x, bias), requires_grad=True)
    ours = torch.autograd.grad(packed(x, bias), (x, bias), grad, create_graph=True)
    exact = [t.detach().double().requires_grad_() for t in (x, bias, grad)]
    theirs = torch.autograd.grad(reference(*exact[:2]), exact[:2], exact[2], create_graph=True)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.double(), other, atol=1e-5)
    direction = torch.randn_like(x)
    twice = torch.autograd.grad(ours[0], grad, direction)[0]
    expected = torch.autograd.grad(theirs[0], exact[2], direction.double())[0]
    assert torch.allclose(twice.double(), expected, atol=1e-5)


def test_vmap_over_the_input_equals_a_loop():
    x, *rest = conv_arguments()
    stacked = torch.stack([x, 2 * x], dim=1)
    mapped = torch.vmap(lambda t: torch.ops.pyrobust.packed_conv2d(t, *rest, None), in_dims=1)
    expected = torch.stack([torch.ops.pyrobust.packed_conv2d(t, *rest, None) for t in (x, 2 * x)])
    assert torch.equal(mapped(stacked), expected)


def test_other_tensor_types_dispatch_to_torch_function():
    seen = []

    class Wrapper:
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append((func, kwargs["bits"]))
            return "handled"

    qtensor = round_to_nearest(torch.randn(6, 9), bits=3)
    options = {"bits": 3, "group_size": 128}
    weight = (qtensor.codes, qtensor.scale, qtensor.zero)
    assert (
        ops.packed_conv2d(Wrapper(), *weight, in_channels=1, kernel_size=3, **options) == "handled"
    )
    assert ops.packed_embedding(Wrapper(), *weight, embedding_dim=9, **options) == "handled"
    assert seen == [(ops.packed_conv2d, 3), (ops.packed_embedding, 3)]


def test_forward_mode_is_refused():
    x, codes, scale, zero, bias, *_ = conv_arguments()
    options = {"in_channels": 4, "kernel_size": (2, 3), "bits": 3, "group_size": 5}
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            ops.packed_conv2d(dual, codes, scale, zero, bias, **options)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"in_channels": 5}, ValueError, r"x must have shape \(B, 5, H, W\)"),
        ({"kernel_size": (1, 2, 3)}, ValueError, "kernel_size must be one or two integers"),
        ({"stride": 0}, ValueError, "stride must be at least 1; got 0"),
        ({"padding": -1}, ValueError, "padding must be at least 0; got -1"),
        ({"padding": "full"}, ValueError, "padding must be one of same, valid; got 'full'"),
        ({"padding": "same", "stride": 2}, ValueError, "padding 'same' needs stride 1"),
        ({"groups": 4}, ValueError, "groups must divide 4 and 6 channels; got 4"),
        ({"bits": 3, "group_size": 0}, ValueError, "group_size must be at least 1"),
        ({"activations": "int4"}, ValueError, "activations must be one of"),
    ],
)
def test_wrong_options_are_refused(options, error, sentence):
    x, codes, scale, zero, bias, *_ = conv_arguments()
    defaults = {"in_channels": 4, "kernel_size": (2, 3), "bits": 3, "group_size": 5}
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, pytest.raises(error, match=sentence):
            ops.packed_conv2d(x, codes, scale, zero, bias, **{**defaults, **options})
