"""Interval products on a GPU: sound where its own tensor cores round, and like the CPU's."""

from fractions import Fraction

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust import Interval, ops
from pyrobust.ops import _cuda_interval
from pyrobust.ops import _cuda_interval_library as library


def boxes(batch, terms, width=0.1):
    centre, radius = torch.randn(batch, terms), torch.rand(batch, terms) * width
    return centre - radius, centre + radius


@pytest.mark.parametrize("rounding", ["real", "deployed"])
@pytest.mark.parametrize(
    ("batch", "rows", "terms"),
    [
        (1, 512, 784),
        (9, 300, 4096),
        (16, 8192, 8192),
        (23, 700, 1000),
        (40, 1000, 131),
        (64, 4096, 4096),
        (100, 500, 2048),
        (300, 64, 20_000),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_bounds_contain_the_exact_image(batch, rows, terms, rounding, dtype):
    lower, upper = boxes(batch, terms)
    weight, bias = torch.randn(rows, terms).to(dtype).float(), torch.randn(rows)
    on_gpu = [t.cuda() for t in (lower, upper, weight, bias)]
    kept = on_gpu[2].to(dtype)
    low, high = _cuda_interval.linear(*on_gpu[:2], kept, on_gpu[3], rounding)
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


@pytest.mark.parametrize("batch", [1, 9, 20, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bound_of_truncating_sums_holds_on_this_card(batch, dtype):
    """One huge term and many just under what an aligned sum keeps of it, at every distance."""
    terms = 4096
    weight = torch.ones(1, terms, device="cuda", dtype=dtype)
    for shift in range(8, 28):
        point = torch.full((batch, terms), 2.0**-shift * (1 - 2.0**-8))
        point[:, 0] = 1.0
        for sign in (1.0, -1.0):
            x = (point * sign).cuda()
            low, high = _cuda_interval.linear(x, x, weight, None, "real")
            exact = sum(Fraction(v) for v in x[0].tolist())
            assert Fraction(low.max().item()) <= exact <= Fraction(high.min().item())


@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 8])
@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("batch", [1, 12, 20, 64, 130])
def test_packed_layers_are_bounded(bits, activations, batch):
    layer = pyrobust.nn.PackedLinear.from_linear(
        nn.Linear(512, 96), bits=bits, group_size=128, activations=activations
    ).cuda()
    lower, upper = (end.cuda() for end in boxes(batch, 512))
    bounds = layer(Interval(lower, upper))
    for _ in range(20):
        y = layer(lower + torch.rand_like(lower) * (upper - lower))
        slack = 2e-3 * y.abs().max()  # the product's own float16 terms; bounds are of the reals
        assert (bounds.lower <= y + slack).all()
        assert (y - slack <= bounds.upper).all()


@pytest.mark.parametrize("batch", [1, 12, 300])
@pytest.mark.parametrize("size", [1e-39, 1.1e-38])
@pytest.mark.parametrize("activations", [None, "int8"])
def test_packed_layers_hold_evaluations_whose_scales_are_flushed(activations, size, batch):
    layer = pyrobust.nn.PackedLinear(
        256, 8, bias=False, bits=8, group_size=128, activations=activations
    ).cuda()
    with torch.no_grad():
        layer.codes.random_(0, 256)
        layer.zero.zero_()
        layer.scale = torch.full(layer.scale.shape, size).cuda()
    for x in (torch.rand(batch, 256).cuda(), torch.rand(batch, 256).cuda() * 2.0**20):
        box = layer(Interval(x, x, rounding="deployed"))
        y = layer(x)
        assert bool(y.all())
        for value in (y, torch.zeros_like(y)):  # scales, or weights, read as zero
            assert bool(box.contains(value).all())


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


@pytest.mark.parametrize("batch", [5, 300])
def test_layers_of_bfloat16(batch):
    """Read as they are without a gradient, as float32 with one."""
    layer = nn.Linear(300, 70).bfloat16().cuda()
    lower, upper = (end.cuda() for end in boxes(batch, 300))
    exact = ops.interval_linear(
        lower.double(), upper.double(), layer.weight.double(), layer.bias.double(),
        rounding="nearest",
    )  # fmt: skip
    with torch.no_grad():
        frozen = layer(Interval(lower, upper))
    trained = layer(Interval(lower, upper))
    trained.upper.sum().backward()
    assert layer.weight.grad.dtype == torch.bfloat16
    for bounds in (frozen, trained):
        assert (bounds.lower <= exact[0]).all()
        assert (exact[1] <= bounds.upper).all()


def test_calls_are_captured_in_graphs():
    lower, upper = (end.cuda() for end in boxes(8, 256))
    weight = torch.randn(64, 256, device="cuda")
    expected = ops.interval_linear(lower, upper, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ends = ops.interval_linear(lower, upper, weight)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(ends, expected, strict=True))


# --- the library's products between two kernels -----------------------------------------------


@pytest.fixture
def always(monkeypatch):
    """The library's products whatever the sizes; fails where this torch has none."""
    assert "dtype" in torch.ops.aten.mm.overloads(), "torch 2.8 or later is needed"
    for name in ("LEAST_INPUTS", "LEAST_PACKED_INPUTS"):
        monkeypatch.setattr(library, name, 1)
    for name in ("MOST_FUSED_INPUTS", "MOST_FUSED_PACKED_INPUTS", "LEAST_PRODUCTS"):
        monkeypatch.setattr(library, name, 0)
    made = []
    original = library._product
    monkeypatch.setattr(library, "_product", lambda a, b: made.append(a.shape) or original(a, b))
    yield made
    assert made


@pytest.mark.parametrize("rounding", ["real", "deployed"])
@pytest.mark.parametrize(
    ("batch", "rows", "terms"), [(1, 10, 784), (300, 512, 1000), (129, 77, 4099), (1024, 64, 9000)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_inputs_contain_the_exact_image(always, batch, rows, terms, rounding, dtype):
    lower, upper = (end.cuda() for end in boxes(batch, terms))
    weight, bias = torch.randn(rows, terms).to(dtype).cuda(), torch.randn(rows).cuda()
    low, high = _cuda_interval.linear(lower, upper, weight, bias, rounding)
    wide = [t.double() for t in (lower, upper, weight, bias)]
    exact = ops.interval_linear(*wide, rounding="nearest")
    assert (low <= exact[0]).all()
    assert (exact[1] <= high).all()
    assert ((high - low) / (exact[1] - exact[0])).max() < 1.05
    if rounding == "deployed":
        x = lower + torch.rand_like(lower) * (upper - lower)
        y = nn.functional.linear(x, weight.float(), bias)
        assert ((low <= y) & (y <= high)).all()


@pytest.mark.parametrize("batch", [1, 128, 1024])
@pytest.mark.parametrize("terms", [64, 1024, 8192])
def test_the_bound_of_truncating_sums_holds_in_the_library(always, batch, terms):
    """What the card cuts off is a share of the bound; the largest share seen is printed."""
    weight = torch.ones(256, terms, device="cuda")
    largest = 0.0
    for shift in range(8, 28):
        for place in (0, terms // 2, terms - 1):
            point = torch.full((batch, terms), 2.0**-shift * (1 - 2.0**-7), device="cuda")
            point[:, place] = 1.0
            for x in (point, -point):
                low, high = _cuda_interval.linear(x, x, weight, None, "real")
                exact = x.double().sum(1, keepdim=True)
                assert (low <= exact).all()
                assert (exact <= high).all()
            bare = library._product(point.bfloat16(), weight.bfloat16().T).double()
            error = (bare - point.double().sum(1, keepdim=True)).abs()
            share = error.max() / (point.double().sum(1).max() * terms * 2.0**-22)
            largest = max(largest, share.item())
    print(f"M = {batch}, K = {terms}: {largest:.3f} of K 2^-22")
    assert largest < 0.77


@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "stride", "dilation"),
    [
        (3, 16, 1, 1, 1),
        (64, 64, 1, 2, 1),
        (128, 32, 1, 1, 2),
        (32, 32, 32, 1, 1),
        (16, 24, 4, 2, 1),
    ],
)
@pytest.mark.parametrize("int8", [False, True])
def test_convolutions_contain_the_exact_image(
    always, channels, outputs, groups, stride, dilation, int8
):
    lower, upper = (end.view(9, channels, 17, 15).cuda() for end in boxes(9, channels * 255))
    weight = torch.randn(outputs, channels // groups, 3, 3, device="cuda")
    bias = torch.randn(outputs, device="cuda")
    window = {"stride": stride, "dilation": dilation, "groups": groups}
    exact = ops.interval_conv2d(
        *(t.double() for t in (lower, upper, weight, bias)), **window, rounding="nearest"
    )
    own = ((3, 3), (stride,) * 2, (dilation,) * 2, groups, tuple(exact[0].shape[2:]), "real")
    low, high = _cuda_interval.convolve(lower, upper, weight, bias, *own, int8=int8)
    assert (low <= exact[0]).all()
    assert (exact[1] <= high).all()
    if not int8:
        assert ((high - low) / (exact[1] - exact[0])).max() < 1.05


@pytest.mark.parametrize("bits", [1.58, 4, 8])
@pytest.mark.parametrize("group_dim", [0, 1])
def test_packed_weights_are_decoded_in_blocks(always, bits, group_dim):
    weight = pyrobust.quantize.round_to_nearest(
        torch.randn(200, 320), bits=bits, group_size=32 if group_dim == 1 else 50,
        group_dim=group_dim, symmetric=bits == 1.58,
    )  # fmt: skip
    lower, upper = (end.cuda() for end in boxes(40, 320))
    parts = [None if t is None else t.cuda() for t in (weight.codes, weight.scale, weight.zero)]
    low, high = ops.interval_packed_linear(
        lower, upper, *parts, in_features=320, bits=bits,
        group_size=32 if group_dim == 1 else 50, group_dim=group_dim,
    )  # fmt: skip
    exact = ops.interval_linear(
        lower.double(), upper.double(), weight.dequantize().double().cuda(), rounding="nearest"
    )
    assert (low <= exact[0]).all()
    assert (exact[1] <= high).all()


def test_graphs_follow_weights_that_are_trained(always):
    lower, upper = (end.cuda() for end in boxes(200, 256))
    weight = nn.Parameter(torch.randn(64, 256, device="cuda"))
    with torch.no_grad():
        ops.interval_linear(lower, upper, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ends = ops.interval_linear(lower, upper, weight)
        weight.mul_(-2.0)
        graph.replay()
        expected = ops.interval_linear(lower, upper, weight)
    assert all(torch.equal(a, b) for a, b in zip(ends, expected, strict=True))
