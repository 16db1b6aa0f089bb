"""Exact corners for every rounding mode, weight format and path of a convolution."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pyrobust.ops.interval import (
    interval_conv2d,
    interval_linear,
    interval_packed_conv2d,
    interval_packed_linear,
    radius_precision,
)
from pyrobust.quantize import round_to_nearest

from .test_interval_exact import KINDS, denormal, denormal_weights, overflowing, violations

pytestmark = pytest.mark.emulated_tiles

PROMISES = ["real", "deployed", "deployed-tf32", "deployed-bfloat16"]
FORMATS = ["float32", "bfloat16", 1, 1.58, 2, 3, 4, 8]
PRECISIONS = ["float32", "bfloat16"]
OF_PACKED = [kind for kind in KINDS if kind not in (denormal, denormal_weights, overflowing)]

GEOMETRIES = [  # channels, height, width, rows of W, window, options
    (2, 5, 6, 5, (2, 3), {"stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)}),
    (3, 4, 19, 13, (3, 3), {"padding": (0, 1)}),  # rows of 16 pixels are read in place
    (4, 6, 6, 6, (3, 2), {"groups": 2, "padding": "same"}),
    (8, 5, 16, 24, (3, 3), {"padding": 1}),  # radii in bfloat16 pay
]
FILTERED = (16, 16, 16, 16, (3, 3), {"padding": 1})  # minimal filtering, from 16 rows of W on


def as_bfloat16(weight):
    """The nearest weights that are finite in bfloat16."""
    half = weight.bfloat16()
    return torch.where(half.isinf(), torch.zeros_like(half), half)


def linear_violations(problem, form, rounding):
    lower, upper, weight, bias = problem
    if form == "float32":
        ends = interval_linear(*problem, rounding=rounding, allow_infinite=True)
    elif form == "bfloat16":
        weight = as_bfloat16(weight)
        ends = interval_linear(lower, upper, weight, bias, rounding=rounding, allow_infinite=True)
    else:
        packed = round_to_nearest(weight, bits=form, group_size=16)
        ends = interval_packed_linear(
            lower, upper, packed.codes, packed.scale, packed.zero, bias,
            in_features=weight.shape[1], bits=form, group_size=16, rounding=rounding,
            allow_infinite=True,
        )  # fmt: skip
        weight = packed.dequantize()
    return violations(ends, lower, upper, weight.float(), bias)


def images_of(kind, batch, geometry):
    """Boxes of images, a weight and a bias of a kind of numbers."""
    channels, height, width, rows, window, options = geometry
    lower, upper, _, bias = kind(batch * height * width, channels, rows)
    terms = channels // options.get("groups", 1) * math.prod(window)
    weight = kind(1, terms, rows)[2]
    shape = (batch, height, width, channels)
    ends = (end.reshape(shape).permute(0, 3, 1, 2).contiguous() for end in (lower, upper))
    return *ends, weight, bias


def patches_of(image, geometry):
    """``(groups, pixels, terms)`` by torch's own unfolding, which only copies."""
    _, _, _, _, window, options = geometry
    groups, steps = options.get("groups", 1), {}
    padding = options.get("padding", 0)
    if padding == "same":
        total = [k - 1 for k in window]
        image = F.pad(image, [total[1] // 2, total[1] - total[1] // 2, total[0] // 2,
                              total[0] - total[0] // 2])  # fmt: skip
        padding = 0
    for name in ("stride", "dilation"):
        steps[name] = options.get(name, 1)
    columns = F.unfold(image, window, padding=padding, **steps)  # (B, terms, pixels)
    split = columns.reshape(len(image), groups, -1, columns.shape[-1])
    return split.permute(1, 0, 3, 2).reshape(groups, -1, split.shape[2])


def convolution_violations(kind, batch, geometry, form, rounding, pixels):
    """Violations at some pixels, and how many corners were looked at."""
    channels, _, _, rows, window, options = geometry
    lower, upper, weight, bias = images_of(kind, batch, geometry)
    per_group = channels // options.get("groups", 1)
    if isinstance(form, str):
        weight = as_bfloat16(weight) if form == "bfloat16" else weight
        kernel = weight.reshape(rows, per_group, *window)
        ends = interval_conv2d(
            lower, upper, kernel, bias, rounding=rounding, allow_infinite=True, **options
        )
    else:
        packed = round_to_nearest(weight, bits=form, group_size=16)
        ends = interval_packed_conv2d(
            lower, upper, packed.codes, packed.scale, packed.zero, bias,
            in_channels=channels, kernel_size=window, bits=form, group_size=16,
            rounding=rounding, allow_infinite=True, **options,
        )  # fmt: skip
        weight = packed.dequantize()
    sides = [patches_of(end, geometry) for end in (lower, upper)]
    results = [end.permute(0, 2, 3, 1).reshape(-1, rows) for end in ends]
    some = torch.randperm(sides[0].shape[1])[:pixels]
    outside = checked = 0
    groups = len(sides[0])
    for g in range(groups):
        own = slice(g * rows // groups, (g + 1) * rows // groups)
        found = violations(
            [end[some][:, own] for end in results],
            *(side[g][some] for side in sides),
            weight[own].float(),
            bias[own],
        )
        outside, checked = outside + found[0], checked + found[1]
    return outside, checked


def kinds_for(form):
    return KINDS if isinstance(form, str) else OF_PACKED


@pytest.mark.parametrize("rounding", PROMISES)
@pytest.mark.parametrize("form", FORMATS)
def test_no_attained_corner_lies_outside(isa, form, rounding):
    for kind in kinds_for(form):
        assert linear_violations(kind(5, 37, 12), form, rounding)[0] == 0
        for geometry in GEOMETRIES:
            assert convolution_violations(kind, 1, geometry, form, rounding, 10)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("form", FORMATS)
def test_no_attained_corner_of_a_million_lies_outside(isa, form, precision):
    if precision == "bfloat16" and isa not in ("avx512", "amx"):
        pytest.skip("only AVX-512 multiplies bfloat16; the other sets take float32 radii")
    total = 0
    with radius_precision(precision):
        for seed in range(3):
            torch.manual_seed(seed)
            for kind in kinds_for(form):
                for rounding in PROMISES:
                    for batch, rows in ((3, 60), (40, 30)):
                        problem = kind(batch, 20 + 17 * seed, rows)
                        outside, checked = linear_violations(problem, form, rounding)
                        assert outside == 0
                        total += checked
                    for geometry in GEOMETRIES:
                        outside, checked = convolution_violations(
                            kind, 3, geometry, form, rounding, 60
                        )
                        assert outside == 0
                        total += checked
                    outside, checked = convolution_violations(kind, 8, FILTERED, form, rounding, 40)
                    assert outside == 0
                    total += checked
    assert total > 500_000  # eight formats: over five million a set, ten with both radii
