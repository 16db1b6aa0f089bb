"""Convolutions of lines and volumes and transposed ones by the kernels of images."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyrobust import Interval
from pyrobust.interval import convolution

pytestmark = pytest.mark.emulated_tiles

LAYERS = {
    "lines": (lambda: nn.Conv1d(4, 6, 3, 2, 1), (2, 4, 21)),
    "lines in groups": (lambda: nn.Conv1d(4, 6, 3, groups=2, dilation=3), (3, 4, 40)),
    "lines of the same size": (lambda: nn.Conv1d(4, 3, 4, padding="same"), (2, 4, 17)),
    "one line": (lambda: nn.Conv1d(4, 3, 5), (4, 30)),
    "volumes": (lambda: nn.Conv3d(2, 5, 3, padding=1), (2, 2, 4, 5, 17)),
    "volumes by strides": (
        lambda: nn.Conv3d(4, 6, (2, 3, 1), (2, 1, 2), (1, 0, 2), (2, 1, 1), groups=2),
        (2, 4, 5, 6, 7),
    ),
    "volumes of the same size": (lambda: nn.Conv3d(2, 3, 2, padding="same"), (2, 3, 4, 5)),
    "transposed lines": (lambda: nn.ConvTranspose1d(3, 4, 4, 2, 1), (2, 3, 9)),
    "transposed with gaps": (lambda: nn.ConvTranspose1d(3, 4, 2, 5, 1, 3), (2, 3, 9)),
    "transposed, dilated": (lambda: nn.ConvTranspose1d(4, 6, 3, 6, 2, 1, 2, dilation=4), (4, 8)),
    "transposed images": (lambda: nn.ConvTranspose2d(6, 4, (3, 4), (2, 3), (1, 0)), (2, 6, 5, 18)),
    "transposed and cut": (lambda: nn.ConvTranspose2d(3, 4, 3, 1, 3), (2, 3, 8, 9)),
    "transposed volumes": (
        lambda: nn.ConvTranspose3d(4, 2, 2, 2, output_padding=(1, 0, 1), groups=2),
        (1, 4, 3, 4, 2),
    ),
}


@pytest.fixture
def by_torch(monkeypatch):
    """Names of convolutions that went the way of torch operations."""
    names = []

    def watched(name, *args):
        names.append(name)
        return original(name, *args)

    original = convolution._by_torch
    monkeypatch.setattr(convolution, "_by_torch", watched)
    return names


def layer_of(name):
    """A layer and the shape of its input; weights have few bits."""
    make, shape = LAYERS[name]
    torch.manual_seed(len(name))
    layer = make().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_((parameter * 256).round() / 256)
    return layer, shape


def few_bits(shape):
    """Multiples of 2^-20 below 4: float64 sums of products with such weights are exact."""
    return (torch.randn(shape).clamp(-3, 3) * 2**20).round() / 2**20


@pytest.mark.parametrize("rounding", ["real", "deployed", "nearest"])
@pytest.mark.parametrize("name", LAYERS)
def test_boxes_are_those_of_the_rule_in_torch_operations(isa, name, rounding, by_torch):
    layer, shape = layer_of(name)
    wide = copy.deepcopy(layer).double()
    x = few_bits(shape)
    box = Interval(x - 0.125, x + 0.125, rounding=rounding)
    for given in (box, F.relu(box)):
        result = layer(given)
        assert by_torch == []
        exact = wide(Interval(given.lower.double(), given.upper.double(), rounding="nearest"))
        assert by_torch.pop()
        assert result.shape == exact.shape
        assert result.lower.is_contiguous()
        for a, b in ((result.lower, exact.lower), (result.upper, exact.upper)):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=5e-5)
        if rounding != "nearest":  # the float64 ends are exact
            assert bool((result.lower.double() <= exact.lower).all())
            assert bool((result.upper.double() >= exact.upper).all())


@pytest.mark.parametrize("rounding", ["real", "deployed"])
@pytest.mark.parametrize("name", LAYERS)
def test_attained_corners_lie_inside(isa, name, rounding):
    layer, shape = layer_of(name)
    wide = copy.deepcopy(layer).double()
    x = few_bits(shape)
    box = Interval(x, x + 2.0**-18 * torch.randint(0, 3, shape), rounding=rounding)
    result = layer(box)
    low, high = box.lower.double(), box.upper.double()
    at = low.clone().requires_grad_()
    outputs = wide(at).flatten()
    for i in torch.randint(0, outputs.numel(), (12,)).tolist():
        (slope,) = torch.autograd.grad(outputs[i], at, retain_graph=True)
        for end, corner in (
            (result.lower, torch.where(slope > 0, low, high)),
            (result.upper, torch.where(slope > 0, high, low)),
        ):
            value = float(wide(corner).flatten()[i])  # exact, in any order of summation
            assert float(result.lower.flatten()[i]) <= value <= float(result.upper.flatten()[i])
            assert abs(value - float(end.flatten()[i])) < 1e-4


@pytest.mark.parametrize("name", LAYERS)
def test_deployed_boxes_hold_what_torch_returns(isa, name):
    make, shape = LAYERS[name]
    layer = make()
    x = torch.randn(shape)
    with torch.no_grad():
        result = layer(Interval(x, x, rounding="deployed"))
        assert bool(result.contains(layer(x)).all())
        assert bool(result.contains(layer.double()(x.double()).float()).all())


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_rule_in_torch_operations(name, by_torch):
    layer, shape = layer_of(name)
    x, grads = few_bits(shape), []
    for dtype in (torch.float32, torch.float64):
        layer = layer.to(dtype).requires_grad_(True)
        ends = (x - 0.125).to(dtype).requires_grad_(), (x + 0.125).to(dtype).requires_grad_()
        result = layer(F.relu(Interval(*ends)))
        factor = torch.arange(result.numel(), dtype=dtype).reshape(result.shape) / result.numel()
        loss = (result.lower * factor).sum() + (result.upper * (1 - factor)).sum()
        grads.append(torch.autograd.grad(loss, [*ends, *layer.parameters()]))
    assert len(by_torch) == 1
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: F.conv1d(x, torch.ones(2, 4, 3)), "expected input.* to have 4 channels"),
        (lambda x: F.conv1d(x, torch.ones(2, 3, 30)), "Kernel size can't be greater"),
        (lambda x: F.conv1d(x, torch.ones(2, 3, 3), stride=0), "non-positive stride"),
        (lambda x: F.conv1d(x, torch.ones(2, 3, 3), stride=2, padding="same"), "padding='same'"),
        (lambda x: F.conv3d(x, torch.ones(2, 3, 3)), "Expected"),
        (lambda x: F.conv_transpose1d(x, torch.ones(3, 2, 3), output_padding=2), "output padding"),
        (lambda x: F.conv_transpose1d(x, torch.ones(4, 2, 3)), "expected input.* to have 4 chan"),
        (lambda x: F.conv1d(x, torch.ones(2, 3, 3), torch.ones(3)), "conv1d must have a bias of 2"),
    ],
)
def test_what_torch_refuses_of_tensors_is_refused_in_its_words(call, message):
    x = torch.randn(2, 3, 8)
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(Interval(x, x))


def test_weights_of_sixteen_bits_count_as_they_are():
    x, weight = torch.randn(2, 3, 20), torch.randn(4, 3, 3).bfloat16()
    for function, given in ((F.conv1d, weight), (F.conv_transpose1d, weight.transpose(0, 1))):
        half = function(Interval(x, x + 0.1), given.contiguous())
        full = function(Interval(x, x + 0.1), given.float().contiguous())
        assert torch.equal(half.lower, full.lower)
    with pytest.raises(TypeError, match="dtype of the box"):
        F.conv1d(Interval(x, x), weight.double())


def test_an_overflow_is_named_with_its_place():
    model = nn.Sequential(nn.ConvTranspose2d(1, 1, 2, 2)).requires_grad_(False)
    model[0].weight.fill_(3e38)
    x = torch.full((1, 1, 2, 2), 3e38)
    with pytest.raises(OverflowError, match=r"conv_transpose2d leaves .*in 0, a ConvTranspose2d"):
        model(Interval(x, x))
