"""Radii in bfloat16: the promises of float32 hold, and the box is a little wider."""

from __future__ import annotations

import pytest
import torch

from pyrobust import _native
from pyrobust.ops.interval import interval_conv2d, interval_linear, radius_precision

from .test_interval_conv import WINDOWS as SMALL_WINDOWS
from .test_interval_conv import problem as images_problem
from .test_interval_conv import reference
from .test_interval_exact import KINDS, SOUND, violations

pytestmark = pytest.mark.emulated_tiles

# a batch below a panel, an odd number of panels, tiles of every height, odd terms, two chunks
SHAPES = [(5, 64, 24), (9, 65, 29), (17, 300, 31), (34, 129, 26), (33, 520, 25)]
WINDOWS = [
    ((2, 8, 6, 6), (24, 8, 3, 3), {"padding": 1}),
    ((2, 7, 9, 9), (25, 7, 5, 5), {"stride": 2}),
    ((3, 8, 5, 16), (27, 8, 3, 3), {"padding": 1}),
    ((2, 34, 6, 19), (26, 34, 3, 3), {"padding": (0, 1)}),
    ((2, 16, 9, 71), (60, 8, 3, 3), {"stride": (3, 2), "padding": (2, 1), "groups": 2}),
    ((1, 7, 5, 20), (24, 7, 3, 5), {}),
]
WIDEST = (1 + 2**-7) ** 2 + 1e-4


def used():
    """Whether this processor and instruction set multiply bfloat16."""
    if _native.isa() == "amx" and _native.has_bfloat16_tiles():
        return True
    return _native.has_bfloat16_products() and _native.isa() in ("avx512", "amx")


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("kind", KINDS)
def test_no_attained_corner_lies_outside(isa, kind, rounding):
    for shape in SHAPES:
        problem = kind(*shape)
        with radius_precision("bfloat16"):
            ends = interval_linear(*problem, rounding=rounding, allow_infinite=True)
        outside, checked = violations(ends, *problem)
        assert outside == 0
        assert checked == 2 * shape[0] * shape[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_attained_corner_of_a_million_lies_outside(kind):
    total = 0
    with radius_precision("bfloat16"):
        for seed in range(10):
            torch.manual_seed(seed)
            problem = kind(90, 64 + 13 * seed, 90)
            for rounding in SOUND:
                outside, checked = violations(
                    interval_linear(*problem, rounding=rounding, allow_infinite=True), *problem
                )
                assert outside == 0
                total += checked
    assert total == 324_000  # eight kinds: 2.6 million


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_are_wider_by_at_most_two_roundings(isa, shape):
    x, weight = torch.randn(shape[0], shape[1]), torch.randn(shape[2], shape[1])
    ends = x - 0.1, x + 0.1 * torch.rand_like(x)  # equal radii are not multiplied
    plain = interval_linear(*ends, weight)
    with radius_precision("bfloat16"):
        coarse = interval_linear(*ends, weight)
    ratio = (coarse[1] - coarse[0]) / (plain[1] - plain[0])
    assert ratio.max() <= WIDEST
    if used():
        assert 1.002 < ratio.mean() < 1.009
    else:
        assert (ratio == 1).all()


@pytest.mark.parametrize("window", WINDOWS + SMALL_WINDOWS)
def test_convolutions_enclose_float64(isa, window):
    images, weight, options = window
    tensors = images_problem(images, weight)
    low, high = reference(*(t.double() for t in tensors), **options)
    with radius_precision("bfloat16"):
        lower, upper = interval_conv2d(*tensors, **options)
    assert (lower < low).all()
    assert (upper > high).all()
    ratio = (upper.double() - lower) / (high - low)
    assert ratio.max() <= WIDEST * 1.005
    if used() and window in WINDOWS:
        assert ratio.mean() > 1.002


def test_infinite_and_missing_numbers_give_everything():
    x = torch.randn(9, 70)
    x[0, 3], x[1, 5], x[2, 60] = float("inf"), float("-inf"), float("nan")
    with radius_precision("bfloat16"):
        lower, upper = interval_linear(x, x + 1, torch.randn(24, 70), allow_infinite=True)
    assert (lower[:3] == -float("inf")).all()
    assert (upper[:3] == float("inf")).all()
    assert torch.isfinite(lower[3:]).all()


def test_the_block_ends_with_the_setting_before():
    x, weight = torch.randn(9, 64), torch.randn(32, 64)
    ends = x, x + torch.rand_like(x)
    plain = interval_linear(*ends, weight)
    with radius_precision("bfloat16"):
        coarse = interval_linear(*ends, weight)
        with radius_precision("float32"):
            assert torch.equal(interval_linear(*ends, weight)[0], plain[0])
        assert torch.equal(interval_linear(*ends, weight)[0], coarse[0])
    assert torch.equal(interval_linear(*ends, weight)[0], plain[0])
    with pytest.raises(ValueError, match=r"radius_precision: name must be"):
        radius_precision("half").__enter__()


@pytest.mark.skipif(not _native.has_bfloat16_products(), reason="nothing is rounded here")
def test_one_permission_serves_many_blocks():
    x, weight = torch.randn(9, 64), torch.randn(32, 64)
    upper = x + torch.rand(9, 64)
    plain = interval_linear(x, upper, weight)[0]
    permission = radius_precision("bfloat16")
    bounds = permission(lambda: interval_linear(x, upper, weight)[0])  # as a decorator
    assert not torch.equal(bounds(), plain)
    with permission, permission:
        coarse = interval_linear(x, upper, weight)[0]
    assert torch.equal(coarse, bounds())
    assert torch.equal(interval_linear(x, upper, weight)[0], plain)
