"""``deployed-tf32`` and ``deployed-bfloat16`` against emulated products of rounded operands."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyrobust import Interval
from pyrobust.ops.interval import interval_conv2d, interval_linear, interval_packed_linear
from pyrobust.quantize import round_to_nearest

pytestmark = pytest.mark.emulated_tiles


def tf32_cut(x):
    """The 10 highest bits of the mantissa, the others cut off, as GPUs read float32 operands."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def tf32_nearest(x):
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def bfloat16(x):
    return x.bfloat16().float()


READINGS = [
    ("deployed-tf32", tf32_cut),
    ("deployed-tf32", tf32_nearest),
    ("deployed-bfloat16", bfloat16),
]


def points(lower, upper, count):
    for i in range(count):
        share = torch.rand_like(lower)
        share = share.round() if i % 2 else share
        yield torch.minimum(torch.maximum(lower + share * (upper - lower), lower), upper)


@pytest.mark.parametrize(("rounding", "read"), READINGS)
@pytest.mark.parametrize("batch", [2, 9])
def test_linear_and_packed_layers_contain_products_of_rounded_operands(isa, batch, rounding, read):
    x, bias = torch.randn(batch, 100), torch.randn(30)
    lower, upper = x - 1e-4, x + 1e-4
    packed = round_to_nearest(torch.randn(30, 100), bits=8, group_size=32)
    parts = (packed.codes, packed.scale, packed.zero, bias)
    form = {"in_features": 100, "bits": 8, "group_size": 32}
    weight = packed.dequantize()
    for ends in (
        interval_linear(lower, upper, weight, bias, rounding=rounding),
        interval_packed_linear(lower, upper, *parts, rounding=rounding, **form),
    ):
        for point in points(lower, upper, 20):
            y = F.linear(read(point), read(weight), bias)
            assert bool(((ends[0] <= y) & (y <= ends[1])).all())
    wide = interval_linear(lower, upper, weight, bias, rounding=rounding)
    plain = interval_linear(lower, upper, weight, bias, rounding="deployed")
    assert bool((wide[0] < plain[0]).all())
    assert bool((wide[1] > plain[1]).all())


@pytest.mark.parametrize(("rounding", "read"), READINGS)
def test_plain_deployed_does_not_promise_rounded_operands(rounding, read):
    x, weight = torch.randn(1, 100), torch.randn(30, 100)
    y = F.linear(read(x), read(weight))
    lower, upper = interval_linear(x, x, weight, rounding="deployed")
    assert bool(((y < lower) | (y > upper)).any())


@pytest.mark.parametrize(("rounding", "read"), READINGS)
def test_convolutions_contain_products_of_rounded_operands(isa, rounding, read):
    x, weight, bias = torch.randn(2, 3, 7, 7), torch.randn(5, 3, 3, 3), torch.randn(5)
    lower, upper = x - 1e-4, x + 1e-4
    low, high = interval_conv2d(lower, upper, weight, bias, padding=1, rounding=rounding)
    for point in points(lower, upper, 20):
        y = F.conv2d(read(point), read(weight), bias, padding=1)
        assert bool(((low <= y) & (y <= high)).all())


@pytest.mark.parametrize(("rounding", "read"), READINGS)
@torch.no_grad()
def test_networks_and_attention(rounding, read):
    first, second = nn.Linear(12, 40), nn.Linear(40, 5)
    x = torch.rand(6, 12)
    box = Interval.ball(x, 1e-4, rounding=rounding)
    assert box.rounding == rounding
    result = second(F.gelu(first(box)))
    scores = F.scaled_dot_product_attention(box[None], box[None], box[None])
    for point in points(box.lower, box.upper, 20):
        hidden = F.gelu(F.linear(read(point), read(first.weight), first.bias))
        y = F.linear(read(hidden), read(second.weight), second.bias)
        assert bool(result.contains(y).all())
        weights = torch.softmax(read(point) @ read(point).T / math.sqrt(12), -1)
        assert bool(scores.contains((read(weights) @ read(point))[None]).all())


def test_float64_boxes_take_the_same_promise():
    x, weight = torch.randn(3, 20, dtype=torch.float64), torch.randn(4, 20, dtype=torch.float64)
    low, high = interval_linear(x, x, weight, rounding="deployed-tf32")
    y = F.linear(tf32_cut(x.float()).double(), tf32_cut(weight.float()).double())
    assert bool(((low <= y) & (y <= high)).all())


@pytest.mark.parametrize("rounding", ["deployed-tf32", "deployed-bfloat16"])
def test_operands_that_round_to_infinity(isa, rounding):
    weight = torch.full((1, 2), 1e-30)
    x = torch.tensor([[3.4e38, 1.0]])
    with pytest.raises(OverflowError, match="the ends must stay finite"):
        interval_linear(x, x, weight, rounding=rounding)
    low, high = interval_linear(x, x, weight, rounding=rounding, allow_infinite=True)
    assert (float(low), float(high)) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="weight must be below"):
        interval_linear(torch.zeros(1, 2), torch.zeros(1, 2), x, rounding=rounding)
