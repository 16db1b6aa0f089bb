"""The AMX kernels of interval bounds on emulated tiles: exact corners, counts, widths.

Tests of other files with the fixture ``isa`` and the mark ``emulated_tiles`` run on them too.
"""

from __future__ import annotations

import itertools
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from pyrobust import Interval, _native, pack
from pyrobust.ops.interval import (
    interval_conv2d,
    interval_linear,
    interval_packed_linear,
    radius_precision,
)
from pyrobust.quantize import round_to_nearest

from ..ops.test_interval_conv import reference
from ..ops.test_interval_exact import (
    KINDS,
    SOUND,
    mostly_zero,
    ordinary,
    spread,
    violations,
    wide_exponents,
)
from ..ops.test_interval_formats_exact import PROMISES, convolution_violations

OBJECTS = sorted((Path(__file__).resolve().parents[2] / "build").rglob("csrc/interval/amx.cpp.o"))
# rows of x, terms, rows of W: one group of inputs and two, a part of a tile, several blocks of
# rows, chunks and blocks of terms
SHAPES = [(5, 64, 24), (9, 97, 33), (17, 300, 49), (34, 129, 97), (33, 1100, 25)]
GEOMETRIES = [  # channels, height, width, rows of W, window, options
    (16, 3, 16, 24, (3, 3), {"padding": 1}),
    (34, 3, 19, 49, (3, 3), {"padding": (1, 0)}),  # a part of a tile of channels, two groups
    (64, 4, 40, 25, (5, 3), {"stride": (1, 2), "padding": (2, 1)}),  # two chains
    (32, 3, 18, 50, (3, 3), {"groups": 2, "padding": (1, 0)}),
    (8, 4, 6, 24, (3, 3), {"padding": 1}),  # panels of patches
]
# images; centres are filtered: from 64 output pixels on, rows of 16
FILTERED = [
    (1, (20, 16, 16, 33, (3, 3), {"padding": 1})),
    (8, (16, 16, 16, 24, (3, 3), {"padding": 1})),
    (2, (34, 23, 48, 49, (3, 3), {"padding": (0, 1)})),
    (8, (18, 32, 32, 97, (3, 3), {"padding": 1, "stride": 2})),
    (5, (32, 25, 65, 25, (3, 3), {"stride": 2})),
]


def underflowing(batch, terms, rows):
    """Products of radii on both sides of the least normal number."""
    x, width = spread((batch, terms), -20, 0), spread((batch, terms), -95, -40).abs()
    return x, x + width, spread((rows, terms), -90, -30), spread((rows,), -149, -120)


def just_above_powers(batch, terms, rows):
    """Each operand is as much too small for bfloat16 as can be."""
    x = torch.randn(batch, terms)
    width = 2.0**-6 * (1 + 2.0**-23) * (1 + torch.arange(terms).expand(batch, -1) % 2)
    return x, x + width, torch.full((rows, terms), 1 + 2.0**-23), torch.zeros(rows)


@pytest.fixture(params=[False, True], ids=["manual", "cut"])
def tiles(request, emulated_tiles):
    """Emulated tiles, whose sums are the manual's or the worst that the proof allows for."""
    emulated_tiles.cut_bfloat16_sums(request.param)
    return emulated_tiles


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("kind", [*KINDS, underflowing, just_above_powers])
def test_no_attained_corner_lies_outside(tiles, kind, rounding):
    for shape in SHAPES:
        problem = kind(*shape)
        with radius_precision("bfloat16"):
            ends = interval_linear(*problem, rounding=rounding, allow_infinite=True)
        outside, checked = violations(ends, *problem)
        assert outside == 0
        assert checked == 2 * shape[0] * shape[2]
    assert tiles.take_interval_counters()["products"] > 0


@pytest.mark.parametrize("rounding", PROMISES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_no_attained_corner_of_a_convolution_lies_outside(tiles, geometry, rounding):
    for kind in (*KINDS, underflowing):
        with radius_precision("bfloat16"):
            outside, checked = convolution_violations(kind, 2, geometry, "float32", rounding, 6)
        assert outside == 0
        assert checked > 0
    assert tiles.take_interval_counters()["products"] > 0


@pytest.mark.parametrize("rounding", PROMISES)
@pytest.mark.parametrize(("batch", "geometry"), FILTERED, ids=str)
def test_no_attained_corner_beside_filtered_centres_lies_outside(tiles, batch, geometry, rounding):
    for kind in (*KINDS, underflowing):
        with radius_precision("bfloat16"):
            outside, checked = convolution_violations(kind, batch, geometry, "float32", rounding, 9)
        assert outside == 0
        assert checked > 0
    seen = tiles.take_interval_counters()
    channels, height, width, rows, _, options = geometry
    padding = options["padding"] if isinstance(options.get("padding"), tuple) else None
    padding = padding or (options.get("padding", 0),) * 2
    stride = options.get("stride", 1)
    out = [(n + 2 * p - 3) // stride + 1 for n, p in zip((height, width), padding, strict=True)]
    parts = -(-rows // 48)  # of rows of W, nearly equal
    step = -(-rows // parts)
    tiles_of_w = sum(-(-min(step, rows - n) // 16) for n in range(0, rows, step))
    products = batch * out[0] * out[1] // 16 * tiles_of_w * 9 * -(-channels // 32)
    assert seen["products"] == products * len((*KINDS, underflowing))


@pytest.mark.parametrize(("batch", "geometry"), FILTERED, ids=str)
@pytest.mark.parametrize("rounding", SOUND)
def test_ends_beside_filtered_centres_are_tight(tiles, batch, geometry, rounding):
    channels, height, width, rows, window, options = geometry
    x, weight = torch.rand(batch, channels, height, width), torch.randn(rows, channels, *window)
    ends = x - 2 / 255, x + 2 / 255
    low, high = reference(*(t.double() for t in (*ends, weight)), None, **options)
    with radius_precision("bfloat16"):
        lower, upper = interval_conv2d(*ends, weight, rounding=rounding, **options)
    assert bool((lower <= low).all())
    assert bool((upper >= high).all())
    ratio = float((upper.double() - lower).sum() / (high - low).sum())
    assert 1.003 < ratio < 1.008


def largest_errors(x, stride):
    """The largest e of ``filtering.h`` of pixels of padded rows, over the tiles that hold them."""
    size = x.abs()
    columns = [4, 2][stride == 1]  # from one tile to the next
    result = torch.zeros_like(size)
    for first in range(0, x.shape[-1] - (3 if stride == 1 else 4), columns):
        d = [size[..., first + i] for i in range(4 if stride == 1 else 5)]
        inner = d[1] + d[2]
        if stride == 1:
            errors = [inner + d[0] + d[2], inner, inner, inner + d[3] + d[1]]
        else:
            errors = [d[0] + 2 * d[2], d[1], d[2], d[3], 2 * d[2] + d[4]]
        for i, e in enumerate(errors):
            result[..., first + i] = torch.maximum(result[..., first + i], e)
    return result


@pytest.mark.parametrize("stride", [1, 2])
def test_radii_take_the_largest_error_of_the_tiles_that_hold_a_pixel(emulated_tiles, stride):
    channels, size = 16, 32 * stride
    x = torch.rand(4, channels, size, size) - 0.5
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    errors = largest_errors(padded, stride)
    weight = torch.zeros(9 * channels, channels, 3, 3)
    for tap in range(9):  # every row of W takes one pixel of one channel
        for channel in range(channels):
            weight[tap * channels + channel, channel, tap // 3, tap % 3] = 1.0
    with radius_precision("bfloat16"):
        lower, upper = interval_conv2d(x, x, weight, padding=1, stride=stride)
    radius = (upper.double() - lower) / 2
    met = torch.nn.functional.conv2d(errors, weight, stride=stride).double()
    for row in range(len(weight)):
        found, expected = radius[:, row], met[:, row]
        gamma = float((found / expected)[expected > 0.4].min())
        assert gamma > 5 * 2.0**-24  # what every term passes
        # one gamma suits all pixels but for bfloat16 and the steps of the ends
        assert bool((found <= 1.008 * gamma * expected + 2.0**-23).all())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, underflowing, just_above_powers])
def test_no_attained_corner_of_a_million_lies_outside(tiles, kind):
    total = 0
    with radius_precision("bfloat16"):
        for seed in range(6):
            torch.manual_seed(seed)
            problem = kind(90, 64 + 23 * seed, 90)
            for rounding in SOUND:
                ends = interval_linear(*problem, rounding=rounding, allow_infinite=True)
                outside, checked = violations(ends, *problem)
                assert outside == 0
                total += checked
    assert total == 194_400  # eleven kinds and two ways to add: 4.3 million


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_are_counted(emulated_tiles, shape):
    batch, terms, rows = shape
    x = torch.randn(batch, terms)
    with radius_precision("bfloat16"):
        interval_linear(x, x + torch.rand_like(x), torch.randn(rows, terms))
    seen = emulated_tiles.take_interval_counters()
    steps = sum(-(-min(256, terms - first) // 32) for first in range(0, terms, 256))
    assert seen["products"] == -(-batch // 16) * -(-rows // 16) * steps
    assert seen["configurations"] == seen["releases"] > 0


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("kind", [ordinary, wide_exponents, mostly_zero, just_above_powers])
def test_no_attained_corner_of_packed_weights_lies_outside(tiles, kind, rounding):
    # groups of a tile, of tiles that a chunk cuts, of whole rows; rounded up where they are short
    for (batch, terms, rows), group in zip(SHAPES, (32, 16, 96, 128, 1100), strict=True):
        lower, upper, weight, bias = kind(batch, terms, rows)
        packed = round_to_nearest(weight, bits=8, group_size=group)
        form = {"in_features": terms, "bits": 8, "group_size": group, "rounding": rounding}
        with radius_precision("bfloat16"):
            ends = interval_packed_linear(
                lower, upper, packed.codes, packed.scale, packed.zero, bias, **form
            )
        outside, checked = violations(ends, lower, upper, packed.dequantize(), bias)
        assert outside == 0
        assert checked == 2 * batch * rows
        steps = sum(-(-min(256, terms - first) // 32) for first in range(0, terms, 256))
        seen = tiles.take_interval_counters()["products"]
        assert seen == -(-batch // 16) * -(-rows // 16) * steps


def test_float32_radii_take_no_tiles(emulated_tiles):
    x = torch.randn(40, 128)
    upper = x + torch.rand_like(x)
    interval_linear(x, upper, torch.randn(64, 128))
    with radius_precision("bfloat16"):
        interval_linear(x[:4], upper[:4], torch.randn(64, 128))  # few inputs
        interval_linear(x, upper, torch.randn(10, 128))  # few rows
        interval_linear(x, x + 1, torch.randn(64, 128))  # equal radii
    assert emulated_tiles.take_interval_counters()["products"] == 0


def test_threads_change_no_bit(emulated_tiles):
    x, weight = torch.randn(130, 700), torch.randn(250, 700)
    upper = x + torch.rand_like(x)
    image, window = torch.randn(4, 32, 16, 16), torch.randn(48, 32, 5, 5)
    one, filtered = torch.randn(1, 34, 16, 16), torch.randn(56, 34, 3, 3)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with radius_precision("bfloat16"):
                results.append(interval_linear(x, upper, weight))
                results.append(interval_conv2d(image, image + 1, window, padding=2))
                results.append(interval_conv2d(one, one + 1, filtered, padding=1))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(results[:3], results[3:], strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


# --- widths --------------------------------------------------------------------------------------


def mlp():
    sizes = (784, 1024, 1024, 1024, 10)
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), (784,)


def cnn(width=32):
    """Seven layers, as CNN7 of half the width on images of half the size."""
    plan = ((3, width, 1), (width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1))
    layers = []
    for inputs, outputs, stride in (*plan, (2 * width, 2 * width, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU()]
    head = [nn.Flatten(), nn.Linear(2 * width * 64, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers, *head), (3, 16, 16)


@pytest.mark.parametrize("network", [mlp, cnn])
@torch.no_grad()
def test_networks_are_at_most_three_and_a_half_percent_wider(emulated_tiles, network):
    model, shape = network()
    x = torch.rand(6, *shape)
    plain = model(Interval.ball(x, 2 / 255))
    assert emulated_tiles.take_interval_counters()["products"] == 0
    with radius_precision("bfloat16"):
        coarse = model(Interval.ball(x, 2 / 255))
    assert emulated_tiles.take_interval_counters()["products"] > 1000
    assert bool(coarse.contains(plain.lower).all())
    assert bool(coarse.contains(plain.upper).all())
    ratio = coarse.width().double().mean() / plain.width().double().mean()
    assert 1.005 < float(ratio) <= 1.035


@torch.no_grad()
def test_a_packed_network_is_wider_by_its_radii_alone(emulated_tiles):
    model, shape = mlp()
    packed = pack(model, bits=4, group_size=128)
    x = torch.rand(6, *shape)
    plain = packed(Interval.ball(x, 2 / 255))
    assert emulated_tiles.take_interval_counters()["products"] == 0
    with radius_precision("bfloat16"):
        coarse = packed(Interval.ball(x, 2 / 255))
    assert emulated_tiles.take_interval_counters()["products"] > 1000
    assert bool(coarse.contains(plain.lower).all())
    assert bool(coarse.contains(plain.upper).all())
    ratio = coarse.width().double().mean() / plain.width().double().mean()
    assert 1.003 < float(ratio) < 1.014  # float weights: 1.017


# --- the instructions ----------------------------------------------------------------------------


def manual_product(left, right, sums):
    """Two chains of fused multiply-adds whose sum joins the old one, in float64 and rounded."""
    even, odd = torch.zeros(16, 16), torch.zeros(16, 16)
    for k in range(0, 32, 2):  # products of bfloat16 are exact, and so is their sum in float64
        even = (even.double() + torch.outer(left[:, k], right[k]).double()).float()
        odd = (odd.double() + torch.outer(left[:, k + 1], right[k + 1]).double()).float()
    return sums + (even + odd)


def emulated_product(shim, left, right, sums):
    words = right.reshape(16, 2, 16).permute(0, 2, 1).contiguous()
    result = sums.clone()
    shim.bfloat16_product(
        left.bfloat16().view(torch.int16), words.bfloat16().view(torch.int16), result
    )
    return result


def test_an_emulated_product_is_the_manuals(emulated_tiles):
    left, right = torch.randn(16, 32).bfloat16().float(), torch.randn(32, 16).bfloat16().float()
    sums = torch.randn(16, 16)
    result = emulated_product(emulated_tiles, left, right, sums)
    assert torch.equal(result, manual_product(left, right, sums))
    emulated_tiles.cut_bfloat16_sums(True)
    cut = emulated_product(emulated_tiles, left.abs(), right.abs(), sums.abs())
    exact = sums.abs().double() + left.abs().double() @ right.abs().double()
    assert bool((cut <= exact).all())
    assert int((cut < exact).sum()) > 200  # the others' sums are exact
    assert bool((cut.double() > exact * (1 - 32 * 2.0**-23)).all())


def test_an_emulated_product_takes_denormals_for_zero(emulated_tiles):
    one, least = torch.ones(16, 32), 2.0**-126
    for cut in (False, True):
        emulated_tiles.cut_bfloat16_sums(cut)
        zero = torch.zeros(16, 16)
        small = torch.full((32, 16), least / 2)
        assert bool((emulated_product(emulated_tiles, one, small, zero) == 0).all())
        halves = emulated_product(emulated_tiles, one / 2, torch.full((32, 16), least), zero)
        assert bool((halves <= 16 * least).all())
        old = emulated_product(emulated_tiles, one * 0, one.T * 0, zero + least / 2)
        assert bool((old == 0).all())


@pytest.mark.skipif(not OBJECTS, reason="no build tree beside the tests")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_the_real_kernel_is_made_of_tile_instructions():
    run = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(OBJECTS[0])],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    instructions = re.findall(r"^\s*[0-9a-f]+:\s+(\w+)\s*(\S*)", run.stdout, re.MULTILINE)
    names = {name for name, _ in instructions}
    assert {"ldtilecfg", "tilezero", "tileloadd", "tilestored", "tilerelease"} <= names
    operands = {text for name, text in instructions if name == "tdpbf16ps"}
    # AT&T order: inputs, |W|, sums
    assert operands == {
        f"%tmm{6 + g},%tmm{4 + i},%tmm{2 * i + g}" for i in range(2) for g in range(2)
    }
    assert not {name for name in names if name.startswith("tdp")} - {"tdpbf16ps"}


@pytest.mark.skipif("amx" not in _native.supported_isas(), reason="no AMX here")
def test_the_processor_adds_as_the_emulation(emulated_tiles, monkeypatch):
    x, weight = torch.randn(40, 300), torch.randn(90, 300)
    upper = x + 0.1 * torch.rand_like(x)
    with radius_precision("bfloat16"):
        expected = interval_linear(x - 0.1, upper, weight)
    monkeypatch.undo()
    before = _native.isa()
    _native.set_isa("amx")
    try:
        with radius_precision("bfloat16"):
            ends = interval_linear(x - 0.1, upper, weight)
    finally:
        _native.set_isa(before)
    assert torch.equal(ends[0], expected[0])
    assert torch.equal(ends[1], expected[1])
    assert math.isfinite(float(ends[1].sum()))
