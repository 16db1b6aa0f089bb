"""Packed weights against radii in bfloat16: whole numbers that lose nothing, or rounded up."""

from __future__ import annotations

import pytest
import torch

from pyrobust.ops.interval import interval_packed_linear, radius_precision
from pyrobust.ops.matmul import pack_codes
from pyrobust.quantize import round_to_nearest
from pyrobust.quantize.qtensor import QTensor

from .test_interval_exact import KINDS, SOUND, denormal, denormal_weights, overflowing, violations
from .test_interval_formats_exact import convolution_violations
from .test_interval_radius_precision import used

pytestmark = [
    pytest.mark.emulated_tiles,
    pytest.mark.parametrize("isa", ["avx512", "amx"], indirect=True),  # the others have float32
]

OF_PACKED = [kind for kind in KINDS if kind not in (denormal, denormal_weights, overflowing)]
BITS = [1, 1.58, 2, 3, 4, 8]
# rows of x, terms, rows of W, columns of a group: groups that end inside of a tile, a chunk or a
# block of terms, the last one short; whole rows; groups that are no whole runs
SHAPES = [
    (9, 97, 33, 32),
    (17, 300, 33, 64),
    (5, 610, 24, 96),
    (5, 1100, 24, 1100),
    (9, 130, 25, 16),
]
GEOMETRIES = [  # channels, height, width, rows of W, window, options
    (8, 5, 16, 24, (3, 3), {"padding": 1}),
    (16, 3, 19, 25, (3, 3), {"padding": (1, 0)}),
    (7, 5, 9, 24, (3, 4), {}),  # panels of patches
    (32, 3, 18, 50, (3, 3), {"groups": 2, "padding": (1, 0)}),
]
FILTERED = (16, 16, 16, 24, (3, 3), {"padding": 1})


def image(packed, lower, upper, bias, precision, **options):
    form = {"in_features": packed.shape[1], "bits": packed.bits, "group_size": packed.group_size}
    form |= {"group_dim": packed.group_dim, "extras": packed.extras, "allow_infinite": True}
    with radius_precision(precision):
        return interval_packed_linear(
            lower, upper, packed.codes, packed.scale, packed.zero, bias, **form, **options
        )


def compare(packed, lower, upper, bias, **options):
    """Corners outside, and the mean width with radii in bfloat16 over that in float32."""
    ends = image(packed, lower, upper, bias, "bfloat16", **options)
    outside, checked = violations(ends, lower, upper, packed.dequantize(), bias)
    assert checked == 2 * ends[0].numel()
    plain = image(packed, lower, upper, bias, "float32", **options)
    widths = [(high.double() - low).sum() for low, high in (ends, plain)]
    return outside, float(widths[0] / widths[1])


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("kind", OF_PACKED)
def test_no_attained_corner_lies_outside(isa, kind, rounding):
    for batch, terms, rows, group in SHAPES:
        for bits in (1, 1.58, 4, 8):
            lower, upper, weight, bias = kind(batch, terms, rows)
            packed = round_to_nearest(weight, bits=bits, group_size=group)
            assert compare(packed, lower, upper, bias, rounding=rounding)[0] == 0


@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("bits", BITS)
def test_whole_numbers_lose_only_the_radius(isa, bits, group_dim):
    for batch, terms, rows, group in SHAPES:
        x, weight = torch.rand(batch, terms), torch.randn(rows, terms)
        if bits == 8:  # no multiple of a power of two, so that |W| is rounded if it is a float
            weight = weight.sign() * (0.7 + 0.3 * torch.rand(rows, terms))
        radius = 0.5 + torch.rand(batch, terms)
        packed = round_to_nearest(weight, bits=bits, group_size=group, group_dim=group_dim)
        outside, ratio = compare(packed, x - radius, x + radius, torch.zeros(rows))
        assert outside == 0
        if not used():
            assert ratio == 1
        elif group_dim == 1 and (group % 32 == 0 or group == terms):
            assert 1.0015 < ratio < 1.0037
        else:
            assert 1.002 < ratio < 1.009


@pytest.mark.parametrize("part", ["codebook", "row_scale", "remainder"])
def test_extra_parts_of_a_weight(isa, part):
    codes = torch.randint(0, 16, (26, 130)).to(torch.uint8)
    scale, zero = torch.rand(26, 3).bfloat16().float() + 0.5, torch.randint(0, 16, (26, 3))
    rows = book = None
    if part == "codebook":
        book = torch.randperm(256)[:16].to(torch.uint8)
        zero = torch.randint(0, 256, (26, 3))
    if part == "row_scale":
        rows = -(torch.rand(26) + 0.5).bfloat16().float()
        scale = torch.randint(0, 8, (26, 3)).to(torch.uint8)
    packed = QTensor(
        pack_codes(codes, bits=4), scale, zero.to(torch.uint8), 4, (26, 130), 64, 1,
        codebook=book, row_scale=rows,
    )  # fmt: skip
    if part == "remainder":
        packed = packed.with_remainder(packed.dequantize() + 3, torch.rand(26, 130) < 0.02)
    x = torch.randn(9, 130)
    outside, ratio = compare(packed, x - 0.3, x + torch.rand_like(x), torch.randn(26))
    assert outside == 0
    if used():
        assert ratio < (1.009 if part == "remainder" else 1.006)


@pytest.mark.parametrize("power", [-110, -99, 99, 110])
def test_scales_far_from_one(isa, power):
    weight = torch.randn(30, 96) * 2.0**power
    packed = round_to_nearest(weight, bits=4, group_size=32)
    packed.scale[3] = 0.0
    x = torch.randn(9, 96) * 2.0**-5
    outside, ratio = compare(packed, x - x.abs() / 16, x + 2.0**-9, torch.zeros(30))
    assert outside == 0
    assert ratio < 1.1  # the absolute term of underflow is doubled, and shows at 2^-110


def test_sums_of_whole_numbers_that_overflow_give_everything(isa):
    packed = round_to_nearest(torch.randn(24, 128) * 2.0**-60, bits=8, group_size=128)
    x = torch.zeros(9, 128)
    reach = torch.full((9, 128), 2.0**120)
    lower, upper = image(packed, -reach, reach, None, "bfloat16")
    assert violations((lower, upper), -reach, reach, packed.dequantize(), None)[0] == 0
    lower, upper = image(packed, x - 2.0**100, x + 2.0**100, None, "bfloat16")
    assert bool(torch.isfinite(upper).all())


def test_activations_in_8_bits(isa):
    x, weight = torch.randn(9, 128), torch.randn(30, 128)
    packed = round_to_nearest(weight, bits=4, group_size=32)
    outside, ratio = compare(
        packed, x - 0.1, x + 0.1 * torch.rand_like(x), torch.zeros(30), activations="int8"
    )
    assert outside == 0
    if used():
        assert 1.001 < ratio < 1.006


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("bits", [1.58, 4, 8])
def test_no_attained_corner_of_a_convolution_lies_outside(isa, bits, rounding):
    for kind in OF_PACKED:
        with radius_precision("bfloat16"):
            for geometry in GEOMETRIES:
                assert convolution_violations(kind, 2, geometry, bits, rounding, 6)[0] == 0
            assert convolution_violations(kind, 8, FILTERED, bits, rounding, 6)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_no_attained_corner_of_a_million_lies_outside(isa, bits):
    total = 0
    for seed in range(4):
        torch.manual_seed(seed)
        for kind in OF_PACKED:
            for rounding in SOUND:
                lower, upper, weight, bias = kind(90, 64 + 37 * seed, 90)
                packed = round_to_nearest(weight, bits=bits, group_size=32)
                ends = image(packed, lower, upper, bias, "bfloat16", rounding=rounding)
                outside, checked = violations(ends, lower, upper, packed.dequantize(), bias)
                assert outside == 0
                total += checked
    assert total == 4 * len(OF_PACKED) * 2 * 16_200  # six formats: 4.7 million a set
