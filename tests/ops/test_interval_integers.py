"""Bounds of few inputs under packed weights by integer sums: exact containment, bits, widths."""

from __future__ import annotations

import math

import pytest
import torch

from pyrobust import _native
from pyrobust.ops.interval import interval_linear, interval_packed_linear
from pyrobust.ops.packed_weight import WeightExtras
from pyrobust.quantize import round_to_codebook, round_to_nearest, round_to_two_level

from .test_interval_exact import cancelling, denormal, huge_bias, spread, violations

SOUND = ["real", "deployed"]
FORMATS = [(bits, True) for bits in (1, 1.58, 2, 3, 4, 8)]
FORMATS += [(bits, False) for bits in (2, 3, 4, 8)]
# Rows of W, columns and a group: tails of panels, blocks and groups, groups that no panel takes.
SHAPES = [(37, 200, 64), (33, 150, 40), (70, 384, 128), (5, 7, 1), (100, 300, 1000), (32, 64, 64)]
SHAPES += [(37, 200, 32), (40, 161, 96)]  # groups that end within a block
SHAPES += [(40, 200, 16), (33, 101, 12), (70, 210, 24)]  # groups that panels fill up


@pytest.fixture(autouse=True)
def default_panels():
    before = _native.set_panels(2, 1 << 17)
    yield
    _native.set_panels(*before)


def boxes(kind: str, columns: int, batch: int = 2):
    """Boxes wide enough for integers."""
    if kind == "signed":
        x = torch.rand(batch, columns) - 0.5
        return x - 0.02, x + 0.02
    x = torch.rand(batch, columns) * (torch.rand(batch, columns) < 0.5)
    return (x - 0.02).relu(), x + 0.02 * torch.rand(batch, columns)


def bound(ends, q, bias, rounding="real", extras=None):
    return interval_packed_linear(
        *ends, q.codes, q.scale, q.zero, bias, in_features=q.shape[1], bits=q.bits,
        group_size=q.group_size, rounding=rounding, extras=extras or q.extras,
        allow_infinite=True,
    )  # fmt: skip


def every_way(ends, q, bias, rounding="real", threads=(1,)):
    """The ends on every instruction set, with and without panels."""
    before = _native.isa()
    found = []
    try:
        for isa in _native.supported_isas():
            _native.set_isa(isa)
            for product in (0, 1):
                _native.set_panels(product, 0)
                for count in threads:
                    torch.set_num_threads(count)
                    found.append(bound(ends, q, bias, rounding))
    finally:
        _native.set_isa(before)
        torch.set_num_threads(1)
    return found


def exact_ends(lower, upper, weight, bias):
    centre, radius = (lower.double() + upper.double()) / 2, (upper.double() - lower.double()) / 2
    middle, reach = centre @ weight.double().T + bias.double(), radius @ weight.double().abs().T
    return middle - reach, middle + reach


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("kind", ["signed", "rectified"])
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_bits_are_those_of_every_set_and_ends_are_tight(bits, symmetric, kind, rounding):
    for rows, columns, group_size in SHAPES:
        weight = torch.randn(rows, columns)
        q = round_to_nearest(weight, bits=bits, group_size=group_size, symmetric=symmetric)
        bias, ends = torch.randn(rows), boxes(kind, columns)
        first, *others = every_way(ends, q, bias, rounding)
        for other in others:
            assert torch.equal(first[0], other[0])
            assert torch.equal(first[1], other[1])
        low, high = exact_ends(*ends, q.dequantize(), bias)
        assert (first[0] < low).all()
        assert (first[1] > high).all()
        widening = (first[1].double() - first[0]) / (high - low)
        assert widening.mean() < (1.0011 if rounding == "real" else 1.004)


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("make", [huge_bias, cancelling, denormal])
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_no_attained_corner_lies_outside(bits, symmetric, make, rounding):
    for rows, columns, group_size in SHAPES[:4]:
        lower, upper, weight, bias = make(3, columns, rows)
        if make is not huge_bias:  # boxes so wide that integers serve them
            upper = upper + upper.abs().amax() * 0.05
        if make is denormal:
            weight = weight.clamp(min=-1e30, max=1e30)
        q = round_to_nearest(weight, bits=bits, group_size=group_size, symmetric=symmetric)
        for ends in every_way((lower, upper), q, bias, rounding)[::2]:
            assert violations(ends, lower, upper, q.dequantize(), bias)[0] == 0


@pytest.mark.parametrize("rounding", SOUND)
def test_no_attained_corner_lies_outside_of_wide_exponents(isa, rounding):
    for exponents in (6, 20, 40):
        x, width = spread((4, 128), -exponents, exponents), spread((4, 128), -8, exponents).abs()
        q = round_to_nearest(spread((40, 128), -20, 20), bits=4, group_size=64)
        ends, bias = (x - width, x + width), spread((40,), -40, 60)
        assert violations(bound(ends, q, bias, rounding), *ends, q.dequantize(), bias)[0] == 0


def test_codebooks_two_levels_and_zeros_beyond_the_codes():
    weight, bias = torch.randn(70, 256), torch.randn(70)
    ends = boxes("signed", 256)
    shifted = round_to_nearest(weight, bits=4, group_size=64)
    shifted.zero.copy_(torch.randint(0, 256, shifted.zero.shape, dtype=torch.uint8))
    for q in (
        round_to_codebook(weight, group_size=64),
        round_to_two_level(weight, bits=4, group_size=64),
        shifted,
    ):
        first, *others = every_way(ends, q, bias)
        assert all(torch.equal(first[i], other[i]) for other in others for i in (0, 1))
        low, high = exact_ends(*ends, q.dequantize(), bias)
        assert (first[0] < low).all()
        assert (first[1] > high).all()
        assert ((first[1].double() - first[0]) < 1.0011 * (high - low)).all()


def test_negative_scales():
    q = round_to_nearest(torch.randn(40, 128), bits=4, group_size=64)
    q.scale.neg_()
    ends, bias = boxes("signed", 128), torch.zeros(40)
    for found in every_way(ends, q, bias):
        low, high = exact_ends(*ends, q.dequantize(), bias)
        assert (found[0] < low).all()
        assert (found[1] > high).all()


def test_threads_change_no_bit():
    q = round_to_nearest(torch.randn(1100, 1024), bits=4, group_size=128)
    found = every_way(boxes("rectified", 1024, 1), q, torch.randn(1100), threads=(1, 2, 3))
    assert all(torch.equal(found[0][i], other[i]) for other in found for i in (0, 1))


def test_an_input_is_served_by_itself(isa):
    q = round_to_nearest(torch.randn(40, 128), bits=4, group_size=64)
    lower, upper = boxes("signed", 128, 4)
    lower[2] = upper[2]  # a point: floats serve it
    together = bound((lower, upper), q, None)
    for i in range(4):
        alone = bound((lower[i : i + 1], upper[i : i + 1]), q, None)
        assert torch.equal(together[0][i], alone[0][0])
        assert torch.equal(together[1][i], alone[1][0])


@pytest.mark.parametrize("rounding", SOUND)
def test_points_and_narrow_boxes_stay_as_narrow_as_floats_make_them(isa, rounding):
    q = round_to_nearest(torch.randn(40, 128), bits=4, group_size=64)
    x = torch.rand(1, 128)
    for eps in (0.0, 1e-5, 1e-3):
        low, high = bound((x - eps, x + eps), q, None, rounding)
        dense = interval_linear(x - eps, x + eps, q.dequantize(), rounding=rounding)
        assert ((high - low) <= 1.001 * (dense[1] - dense[0]) + 1e-5).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_ends_that_are_not_finite_give_everything(isa, bad):
    q = round_to_nearest(torch.randn(40, 128) + 0.1, bits=8, group_size=64)
    lower, upper = boxes("signed", 128, 1)
    lower[0, 77] = bad if bad < 0 else lower[0, 77]
    upper[0, 77] = upper[0, 77] if bad < 0 else bad
    low, high = bound((lower, upper), q, None)
    assert (low == -math.inf).all()
    assert (high == math.inf).all()


def test_sums_that_overflow_are_infinite(isa):
    q = round_to_nearest(torch.randn(40, 128), bits=4, group_size=64)
    x = torch.rand(1, 128) * 3e38
    low, high = bound((x * 0.5, x), q, None)
    exact = exact_ends(x * 0.5, x, q.dequantize(), torch.zeros(40))
    assert (low <= exact[0]).all()
    assert (high >= exact[1]).all()
    assert low.isinf().any()


@pytest.mark.parametrize("columns", [65_536, 65_600])
def test_the_largest_sums_of_a_group(isa, columns):
    # all codes and all parts of the input at the ends of their ranges: sums near 2^31
    codes = torch.full((2, columns), 255, dtype=torch.uint8)
    codes[1] = 0
    scale, ends = torch.full((2, 1), 2.0**-10), torch.full((1, columns), 1.0)
    for zero in (torch.tensor([[0], [255]], dtype=torch.uint8), None):
        options = {"in_features": columns, "bits": 8, "group_size": columns}
        low, high = interval_packed_linear(ends * 0.0, ends, codes, scale, zero, **options)
        size = 255 if zero is not None else 127
        assert float(high[0, 0]) == pytest.approx(size * columns * 2.0**-10, rel=2e-3)
        assert high[0, 0] >= size * columns * 2.0**-10
        assert low[0, 0] <= 0 <= high[1, 0] if len(high) > 1 else True
        size = 255 if zero is not None else 128
        assert low[0, 1] <= -size * columns * 2.0**-10


def test_extras_without_integers_are_left_to_floats(isa):
    q = round_to_nearest(torch.randn(9, 64), bits=4, group_size=64)
    offsets = torch.arange(10) * 1
    extras = WeightExtras(
        values=torch.ones(9) * 0.0, columns=torch.arange(9, dtype=torch.int32), offsets=offsets
    )
    ends = boxes("signed", 64)
    with_remainder = bound(ends, q, None, extras=extras)
    low, high = exact_ends(*ends, q.dequantize(), torch.zeros(9))
    assert (with_remainder[0] < low).all()
    assert (with_remainder[1] > high).all()
