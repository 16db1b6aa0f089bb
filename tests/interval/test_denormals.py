"""Ends below the smallest normal number: rounded outward to their neighbours, flushed or not."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyrobust import Interval
from pyrobust.interval.table import RULES
from pyrobust.nn import PackedLinear
from pyrobust.ops._interval_fallback import round_outward

from .random_graphs import denormals

pytestmark = pytest.mark.emulated_tiles

TINY = torch.finfo(torch.float32).tiny
LAST = 2.0**-149
NORMAL = 0x800000
SHARES = (-0.75, -0.5, -0.25, 0.0, 2.0**-40, 0.5, 0.75)


def all_floats(stride, most=2 * NORMAL):
    """Float32 numbers of both signs up to ``2**-125``."""
    positive = np.arange(0, most, stride, dtype=np.uint32).view(np.float32)
    return torch.from_numpy(np.concatenate([positive, -positive]))


@pytest.mark.parametrize("stride", [97, pytest.param(1, marks=pytest.mark.slow)])
def test_ends_become_the_nearest_floats_that_are_not_inside(stride):
    for part in all_floats(stride).split(1 << 20):
        for share in SHARES:
            exact = part.double() + share * LAST
            low, high = round_outward(exact, exact, torch.float32)
            infinity = torch.tensor(torch.inf)
            assert bool((low.double() <= exact).all())
            assert bool((torch.nextafter(low, infinity).double() > exact).all())
            assert bool((high.double() >= exact).all())
            assert bool((torch.nextafter(high, -infinity).double() < exact).all())


def test_rounding_stays_outward_and_rising_where_denormals_are_flushed():
    exact = torch.cat(
        [part.double() + share * LAST for share in SHARES for part in [all_floats(9973)]]
    )
    exact = exact.sort().values
    with denormals(True):
        low, high = round_outward(exact, exact, torch.float32)
    assert bool((low.double() <= exact).all())
    assert bool((high.double() >= exact).all())
    assert bool((low.double().diff() >= 0).all())
    assert bool((high.double().diff() >= 0).all())
    assert bool((low.double() >= exact - TINY).all())


def spread(*shape):
    """Numbers of both signs from the smallest denormal to some 2^20 times the smallest normal."""
    whole = torch.randint(-(2**24), 2**24, shape).double()
    return (whole * torch.exp2(torch.randint(-149, -121, shape).double() - 10)).float()


def drawn_box(*shape, rounding):
    ends = torch.stack([spread(*shape), spread(*shape)]).sort(0).values
    return Interval(*ends, rounding=rounding)


@pytest.mark.parametrize("rounding", ["real", "deployed"])
def test_a_native_sum_is_that_of_the_rule_below_the_normal_numbers(isa, rounding):
    for _ in range(10):
        x, y = (drawn_box(40, 50, rounding=rounding) for _ in range(2))
        fast, slow = x + y, RULES[torch.add](x, y)
        assert torch.equal(fast.lower, slow.lower)
        assert torch.equal(fast.upper, slow.upper)


def least_above(value):
    """The smallest float32 that is at least a fraction below ``2**-125``."""
    return math.ceil(value / Fraction(LAST)) * Fraction(LAST)


NARROW = float(np.float32(0.3))
EXACT = {
    "mul": (lambda x: x * 0.3, lambda v: v * Fraction(0.3), lambda v: v * Fraction(NARROW)),
    "div": (lambda x: x / 3, lambda v: v / 3, lambda v: v / 3),
    "add": (lambda x: x + 2.0**-140, lambda v: v + Fraction(2) ** -140),
}


@pytest.mark.parametrize("name", EXACT)
def test_points_have_the_least_image_that_denormals_can_hold(name):
    call, *readings = EXACT[name]
    x = all_floats(99_991, NORMAL)
    image = call(Interval(x, x))
    ends = image.lower.tolist(), image.upper.tolist()
    for value, low, high in zip(x.tolist(), *ends, strict=True):
        exact = [reading(Fraction(value)) for reading in readings]
        assert Fraction(high) == least_above(max(exact))
        assert Fraction(low) == -least_above(-min(exact))


@pytest.mark.parametrize("exponent", [3, 1.5, 2.5, 1.7])
def test_powers_that_are_denormal_contain_evaluations(exponent):
    root = torch.linspace(2.0 ** (-149 / exponent), 2.0 ** (-125 / exponent), 20_001)
    box = Interval(root, root, rounding="deployed") ** exponent
    for flush in (False, True):
        with denormals(flush):
            value = root**exponent
        read = torch.where(value.abs() < TINY, 0.0, value) if flush else value
        assert bool(box.contains(read).all())


def test_products_with_numbers_beyond_float32_round_outward():
    """10 x 0.3 is 3 in float64, and less exactly."""
    for ten in (10.0, -10.0):
        point = torch.tensor([ten, 0.0])
        image = Interval(point, point) * 0.3
        exact = Fraction(ten) * Fraction(0.3)
        assert Fraction(float(image.lower[0])) <= exact <= Fraction(float(image.upper[0]))
        assert float(image.lower[1]) == float(image.upper[1]) == 0
    whole = torch.tensor([3], dtype=torch.int64)
    assert float((Interval(point[:1], point[:1]) * whole).width()) == 0
    large = torch.tensor([2**53 - 1])
    image = Interval(torch.tensor([3.0]), torch.tensor([3.0])) * large
    exact = 3 * (2**53 - 1)
    assert int(image.lower[0]) <= exact <= int(image.upper[0])


def test_powers_read_exponents_beyond_float32_both_ways():
    x = torch.logspace(-22, 22, 1001)
    for p in (1.7, 0.1, -1.3):
        for rounding in ("real", "deployed"):
            image = Interval(x, x, rounding=rounding) ** p
            narrow = float(np.float32(p))
            assert bool(image.contains(x.double() ** p).all())
            assert bool(image.contains(x.double() ** narrow).all())
        assert bool(image.contains(x**p).all())


def test_attention_holds_what_is_left_of_values_whose_shares_are_flushed():
    scores, value = torch.zeros(1, 4, 3), torch.full((1, 4, 3), 1.5 * TINY)
    query = Interval(scores, scores, rounding="deployed")
    box = F.scaled_dot_product_attention(query, scores, value)
    with denormals(True):
        shares = torch.softmax(scores @ scores.mT, -1)
        mixed = sum(shares[..., i : i + 1] * value[:, i : i + 1] for i in range(4))
    assert float(mixed.abs().max()) == 0
    assert bool(box.contains(mixed).all())


# -- batch norm ------------------------------------------------------------------------------

SIZES = torch.tensor([0.0, 1e-45, 1e-39, 2e-38, 1e-30, 1e-12, 1.0, 1e6, 1e12])


def channels_of(pixels):
    """A box around denormal and other inputs, and statistics of all sizes in every combination."""
    count = len(SIZES)
    variance, weight = SIZES.repeat(count), SIZES.repeat_interleave(count)
    weight = weight * torch.randint(0, 2, weight.shape).sub(0.5).sign()
    mean = SIZES[torch.randint(0, 4, weight.shape)]
    bias = SIZES[torch.randint(0, 4, weight.shape)]
    x = mean[:, None] + spread(len(mean), pixels) * torch.exp2(torch.randint(0, 40, (pixels,)))
    return x[None], (mean, variance, weight, bias)


def evaluations(x, mean, variance, weight, bias, eps):
    """Batch norm in float32 by every order of its factors."""
    mean, variance, weight, bias = (t[:, None] for t in (mean, variance, weight, bias))
    square = variance + torch.tensor(eps, dtype=torch.float32)
    roots = square.rsqrt(), 1 / square.sqrt()
    for root in roots:
        scale = weight * root
        yield (x - mean) * scale + bias
        yield x * scale + (bias - mean * scale)
        yield (x - mean) * root * weight + bias
        yield (x - mean) * weight * root + bias
    yield (x - mean) / square.sqrt() * weight + bias


def read(value, flush):
    return torch.where(value.abs() < TINY, 0.0, value) if flush else value


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("eps", [1e-5, 1e-12, 1e-30])
@pytest.mark.parametrize("pixels", [1, 17])
def test_batch_norm_holds_evaluations_whose_parameters_are_flushed(isa, pixels, eps, flush):
    looked_at = 0
    x, parameters = channels_of(pixels)
    for c in range(x.shape[1]):
        point, own = x[:, c : c + 1], [t[c : c + 1] for t in parameters]
        point = point if pixels > 1 else point[..., 0]
        for rule in (F.batch_norm, RULES[F.batch_norm]):
            box = Interval(point, point, rounding="deployed")
            try:
                image = rule(box, *own, eps=eps)
            except OverflowError:
                continue
            if rule is not F.batch_norm and not bool(image.upper.isfinite().all()):
                continue
            with denormals(flush):
                found = [read(v, flush) for v in evaluations(point.reshape(1, 1, -1), *own, eps)]
            for value in found:
                looked_at += value.numel()
                assert bool(image.contains(value.reshape(point.shape)).all()), (c, own)
    assert looked_at > 500


def test_a_deployed_batch_norm_whose_variance_may_be_read_as_zero_is_refused():
    box = Interval.ball(torch.ones(1, 1, 4), 0.1, rounding="deployed")
    statistics = torch.zeros(1), torch.full((1,), 1e-39)
    real = F.batch_norm(Interval(box.lower, box.upper), *statistics, eps=0.0)
    assert bool(real.upper.isfinite().all())
    with pytest.raises(OverflowError, match="batch_norm leaves the range"):
        F.batch_norm(box, *statistics, eps=0.0)


@pytest.mark.parametrize("shape", [(2, 4, 3), (5, 4)])
def test_both_rules_of_batch_norm_widen_alike_for_denormal_parameters(isa, shape):
    parameters = torch.zeros(4), torch.tensor([1e-39, 1.0, 1e-40, 1e12]), torch.tensor(
        [1.0, 1e-39, 1e6, 1e12]), torch.zeros(4)  # fmt: skip
    box = Interval(torch.zeros(shape), torch.full(shape, 2.0**-100), rounding="deployed")
    fast = F.batch_norm(box, *parameters, eps=1e-12)
    slow = RULES[F.batch_norm](box, *parameters, eps=1e-12)
    torch.testing.assert_close(fast.lower, slow.lower, rtol=1e-5, atol=LAST)
    torch.testing.assert_close(fast.upper, slow.upper, rtol=1e-5, atol=LAST)


# -- packed weights --------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("size", [1e-39, 1e-40, 1.5e-38])
@pytest.mark.parametrize("activations", [None, "int8"])
def test_packed_layers_hold_evaluations_whose_scales_are_flushed(isa, activations, size, batch):
    layer = PackedLinear(64, 8, bias=False, bits=8, group_size=32, activations=activations)
    with torch.no_grad():
        layer.codes.random_(0, 256)
        layer.scale = torch.full(layer.scale.shape, size)  # float16 has none so small
        layer.zero.zero_()
    x = torch.rand(batch, 64)
    weight = layer.dequantize()
    for scale in (1.0, 2.0**20):
        box = layer(Interval(x * scale, x * scale, rounding="deployed"))
        assert bool(box.contains(torch.zeros(batch, 8)).all())  # scales, or weights, read as zero
        assert bool(layer(x * scale).all())
        assert bool(box.contains(layer(x * scale)).all())
        assert bool(box.contains(F.linear(x * scale, weight)).all())
        with denormals(True):
            found = layer(x * scale)
        assert bool(box.contains(read(found, True)).all())


def test_ends_of_a_native_batch_norm_round_to_neighbours_of_denormals(isa):
    x = spread(1, 1, 4096)
    statistics = torch.zeros(1), torch.ones(1)
    image = F.batch_norm(Interval(x, x), *statistics, torch.full((1,), 0.3), eps=0.0)
    exact = x.double() * float(np.float32(0.3))
    assert bool((image.lower.double() <= exact).all())
    assert bool((image.upper.double() >= exact).all())
    small = exact.abs() < TINY
    assert float((image.upper - image.lower).double()[small].max()) <= 2 * LAST
