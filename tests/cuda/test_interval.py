"""Interval products on a GPU: sound where its own tensor cores round, and like the CPU's."""

from fractions import Fraction

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust import Interval, ops
from pyrobust.ops import _cuda_interval


def boxes(batch, terms, width=0.1):
    centre, radius = torch.randn(batch, terms), torch.rand(batch, terms) * width
    return centre - radius, centre + radius


@pytest.mark.parametrize("rounding", ["real", "deployed"])
@pytest.mark.parametrize(
    ("batch", "rows", "terms"), [(1, 512, 784), (9, 300, 4096), (40, 1000, 131), (300, 64, 20_000)]
)
def test_dense_bounds_contain_the_exact_image(batch, rows, terms, rounding):
    lower, upper = boxes(batch, terms)
    weight, bias = torch.randn(rows, terms), torch.randn(rows)
    on_gpu = [t.cuda() for t in (lower, upper, weight, bias)]
    low, high = ops.interval_linear(*on_gpu, rounding=rounding)
    wide = [t.double() for t in on_gpu]
    exact = ops.interval_linear(*wide, rounding="nearest")
    assert (low <= exact[0]).all()
    assert (exact[1] <= high).all()
    cpu = ops.interval_linear(lower, upper, weight, bias, rounding=rounding)
    assert ((high - low).cpu() / (cpu[1] - cpu[0])).max() < 1.02
    if rounding == "deployed":
        x = on_gpu[0] + torch.rand_like(on_gpu[0]) * (on_gpu[1] - on_gpu[0])
        y = nn.functional.linear(x, *on_gpu[2:])
        assert ((low <= y) & (y <= high)).all()


def test_the_bound_of_truncating_sums_holds_on_this_card():
    """One huge term and many just under what an aligned sum keeps of it, at every distance."""
    terms = 4096
    weight = torch.ones(1, terms, device="cuda")
    for shift in range(8, 28):
        point = torch.full((1, terms), 2.0**-shift * (1 - 2.0**-8))
        point[0, 0] = 1.0
        for sign in (1.0, -1.0):
            x = (point * sign).cuda()
            low, high = _cuda_interval.linear(x, x, weight, None, "real")
            exact = sum(Fraction(v) for v in x[0].tolist())
            assert Fraction(low.item()) <= exact <= Fraction(high.item())


@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 8])
@pytest.mark.parametrize("activations", [None, "int8"])
def test_packed_layers_are_bounded(bits, activations):
    layer = pyrobust.nn.PackedLinear.from_linear(
        nn.Linear(512, 96), bits=bits, group_size=128, activations=activations
    ).cuda()
    lower, upper = (end.cuda() for end in boxes(20, 512))
    bounds = layer(Interval(lower, upper))
    for _ in range(20):
        y = layer(lower + torch.rand_like(lower) * (upper - lower))
        slack = 2e-3 * y.abs().max()  # the product's own float16 terms; bounds are of the reals
        assert (bounds.lower <= y + slack).all()
        assert (y - slack <= bounds.upper).all()


def test_a_convolutional_network():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    )
    x = torch.rand(5, 3, 16, 16)
    cpu = model(Interval.ball(x, 0.01))
    gpu = model.cuda()(Interval.ball(x.cuda(), 0.01))
    y = model.double()(x.double().cuda())
    assert ((gpu.lower <= y) & (y <= gpu.upper)).all()
    assert (gpu.width().cpu() / cpu.width()).max() < 1.05


def test_calls_are_captured_in_graphs():
    lower, upper = (end.cuda() for end in boxes(8, 256))
    weight = torch.randn(64, 256, device="cuda")
    expected = ops.interval_linear(lower, upper, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ends = ops.interval_linear(lower, upper, weight)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(ends, expected, strict=True))
