"""Containment in exact integer arithmetic: attained corners, adversarial numbers, deployed orders.

A float32 is an integer times ``2**-149``, so corner values are exact as Python integers. Each
checked number is attained: the value of the affine map at a corner of the box.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyrobust.ops.interval import interval_linear, interval_packed_linear
from pyrobust.quantize import round_to_nearest

pytestmark = pytest.mark.emulated_tiles

SOUND = ["real", "deployed"]
_LEAST = -149


def integers(values):
    """Floats as exact multiples of 2**-149, in an object array."""
    mantissa, exponent = np.frexp(values.double().numpy())
    whole = (mantissa * 2.0**24).astype(np.int64).astype(object)
    shift = (exponent - 24 - _LEAST).astype(object)
    return np.where(
        shift >= 0, whole * 2 ** np.maximum(shift, 0), whole // 2 ** np.maximum(-shift, 0)
    )


def corner_values(lower, upper, weight, bias):
    """Exact least and greatest values, ``(B, N)``, as multiples of ``2**-298``."""
    low, high, matrix = integers(lower), integers(upper), integers(weight)
    positive, negative = np.maximum(matrix, 0), np.minimum(matrix, 0)
    shift = 0 if bias is None else integers(bias) * 2**-_LEAST
    least = low.dot(positive.T) + high.dot(negative.T) + shift
    most = high.dot(positive.T) + low.dot(negative.T) + shift
    return least, most


def violations(ends, lower, upper, weight, bias):
    """How many corners lie outside, and how many were checked."""
    least, most = corner_values(lower, upper, weight, bias)
    outside = 0
    for end, exact, sign in ((ends[0], least, 1), (ends[1], most, -1)):
        assert not end.isnan().any()
        finite = torch.isfinite(end)
        assert (end[~finite] * sign < 0).all()
        scaled = integers(torch.where(finite, end, 0.0)) * 2**-_LEAST
        outside += int(((sign * (scaled - exact) > 0) & finite.numpy()).sum())
    return outside, 2 * least.size


def spread(shape, low, high):
    """Random signs and mantissas with exponents uniform in [low, high)."""
    return (torch.rand(shape) - 0.5) * torch.exp2(torch.randint(low, high, shape).float())


def ordinary(batch, terms, rows):
    x, width = torch.rand(batch, terms), (0.5 + torch.rand(batch, terms)) * 2 / 255
    return x - width, x + width, torch.randn(rows, terms), torch.randn(rows)


def no_radius(batch, terms, rows):
    x = torch.randn(batch, terms)
    return x, x, torch.randn(rows, terms), torch.randn(rows)


def wide_exponents(batch, terms, rows):
    x, width = spread((batch, terms), -40, 40), spread((batch, terms), -60, 20).abs()
    return x - width, x + width, spread((rows, terms), -40, 40), spread((rows,), -60, 80)


def cancelling(batch, terms, rows):
    half = spread((rows, (terms + 1) // 2), 0, 30)
    weight = torch.cat([half, -half * (1 + 2.0**-22)], 1)[:, :terms]
    x = 1 + torch.rand(batch, 1).expand(-1, terms) * 2.0**-20
    return x, x * (1 + 2.0**-23), weight, torch.zeros(rows)


def denormal(batch, terms, rows):
    x, width = spread((batch, terms), -148, -120), spread((batch, terms), -149, -130).abs()
    return x - width, x + width, spread((rows, terms), -20, 4), spread((rows,), -149, -120)


def denormal_weights(batch, terms, rows):
    x = spread((batch, terms), -10, 100)
    return x, x + x.abs() * 2.0**-20, spread((rows, terms), -149, -120), torch.zeros(rows)


def mostly_zero(batch, terms, rows):
    """As after a ReLU: each term is exactly zero with probability 0.9."""
    lower, upper, weight, bias = ordinary(batch, terms, rows)
    kept = (torch.rand(batch, terms) < 0.1).float()
    return lower * kept, upper * kept, weight, bias


def huge_bias(batch, terms, rows):
    x = torch.rand(batch, terms) * 0.1
    return -x, x, torch.ones(rows, terms), torch.full((rows,), 2.0**25)


def overflowing(batch, terms, rows):
    x = spread((batch, terms), 120, 127)
    return x - x.abs() / 2, x + x.abs() / 2, spread((rows, terms), -3, 3), spread((rows,), 120, 127)


KINDS = [
    ordinary,
    no_radius,
    wide_exponents,
    cancelling,
    denormal,
    denormal_weights,
    huge_bias,
    mostly_zero,
    overflowing,
]
SHAPES = [(1, 1, 21), (3, 7, 30), (9, 33, 31), (20, 16, 53)]


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("kind", KINDS)
def test_no_attained_corner_lies_outside(isa, kind, rounding):
    for shape in SHAPES:
        problem = kind(*shape)
        outside, checked = violations(
            interval_linear(*problem, rounding=rounding, allow_infinite=True), *problem
        )
        assert outside == 0
        assert checked == 2 * shape[0] * shape[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_attained_corner_of_a_million_lies_outside(isa, kind):
    total = 0
    for seed in range(20):
        torch.manual_seed(seed)
        problem = kind(90, 1 + 3 * seed, 90)
        for rounding in SOUND:
            outside, checked = violations(
                interval_linear(*problem, rounding=rounding, allow_infinite=True), *problem
            )
            assert outside == 0
            total += checked
    assert total > 600_000  # 8 kinds and every instruction set: several millions


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 8])
def test_no_attained_corner_of_a_million_packed_ones_lies_outside(isa, bits):
    total = 0
    for seed in range(10):
        torch.manual_seed(seed)
        for kind in (ordinary, wide_exponents, cancelling, huge_bias):
            # many inputs meet decoded rows, a few meet rows that some sets decode in registers
            for batch, rows, group_size in ((40, 25, 8), (4, 125, 64)):
                lower, upper, weight, bias = kind(batch, 5 + 9 * seed, rows)
                packed = round_to_nearest(weight, bits=bits, group_size=group_size)
                form = {"in_features": weight.shape[1], "bits": bits, "group_size": group_size}
                parts = (packed.codes, packed.scale, packed.zero, bias)
                for rounding in SOUND:
                    ends = interval_packed_linear(
                        lower, upper, *parts, rounding=rounding, allow_infinite=True, **form
                    )
                    outside, checked = violations(ends, lower, upper, packed.dequantize(), bias)
                    assert outside == 0
                    total += checked
    assert total == 240_000  # six formats: 1.44 million on every instruction set


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("batch", [1, 9])
def test_long_sums(isa, batch, rounding):
    for problem in (ordinary(batch, 9_001, 3), cancelling(batch, 9_000, 3)):
        assert violations(interval_linear(*problem, rounding=rounding), *problem)[0] == 0


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 8])
def test_packed_weights(isa, bits, rounding):
    for kind in (ordinary, wide_exponents, huge_bias):
        for batch in (2, 9):
            lower, upper, weight, bias = kind(batch, 37, 25)
            packed = round_to_nearest(weight, bits=bits, group_size=8)
            ends = interval_packed_linear(
                lower, upper, packed.codes, packed.scale, packed.zero, bias,
                in_features=37, bits=bits, group_size=8, rounding=rounding,
            )  # fmt: skip
            assert violations(ends, lower, upper, packed.dequantize(), bias)[0] == 0


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_packed_weights_of_whole_blocks(isa, bits, rounding):
    # the shapes that a set may decode in registers: one cut block, several groups, several runs
    for terms, group_size in ((37, 64), (150, 64), (128, 128), (1100, 2048)):
        for kind in (ordinary, huge_bias):
            lower, upper, weight, bias = kind(2, terms, 7)
            packed = round_to_nearest(weight, bits=bits, group_size=group_size)
            ends = interval_packed_linear(
                lower, upper, packed.codes, packed.scale, packed.zero, bias,
                in_features=terms, bits=bits, group_size=group_size, rounding=rounding,
            )  # fmt: skip
            assert violations(ends, lower, upper, packed.dequantize(), bias)[0] == 0
            dense = interval_linear(lower, upper, packed.dequantize(), bias, rounding=rounding)
            wider = (ends[1] - ends[0]) / (dense[1] - dense[0])
            assert (wider < 1.002).all()  # the steps of integers


@pytest.mark.parametrize("kind", [denormal, denormal_weights, ordinary])
def test_flushed_denormals_change_nothing(isa, kind):
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    torch.set_flush_denormal(False)
    for problem in (kind(2, 20, 9), kind(9, 20, 9)):
        expected = interval_linear(*problem)
        torch.set_flush_denormal(True)
        try:
            ends = interval_linear(*problem)
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(ends[0], expected[0])
        assert torch.equal(ends[1], expected[1])
        assert violations(ends, *problem)[0] == 0


# --- the public counterexamples -----------------------------------------------------------------


def test_half_of_the_bounds_of_nearest_mode_exclude_an_attained_value(isa):
    problem = ordinary(20, 64, 128)
    outside, checked = violations(interval_linear(*problem, rounding="nearest"), *problem)
    assert outside > 0.2 * checked
    for rounding in SOUND:
        assert violations(interval_linear(*problem, rounding=rounding), *problem)[0] == 0


@pytest.mark.parametrize("rounding", ["nearest", *SOUND])
def test_network_with_huge_biases(isa, rounding):
    # x -> relu(x + 2^25) -> minus 2^25: the identity on [-0.1, 0.1], as three equal units.
    ends = (torch.full((1, 1), -0.1), torch.full((1, 1), 0.1))
    ends = interval_linear(*ends, torch.ones(3, 1), torch.full((3,), 2.0**25), rounding=rounding)
    first_unit, back = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([-(2.0**25)])
    lower, upper = interval_linear(
        ends[0].relu(), ends[1].relu(), first_unit, back, rounding=rounding
    )
    contains = bool(lower <= -0.1) and bool(upper >= 0.1)
    assert contains == (rounding != "nearest")


def test_a_linear_classifier_is_not_verified_past_its_radius(isa):
    claims = {"nearest": 0, "real": 0, "deployed": 0}
    for _ in range(300):
        x, weight = torch.rand(1, 64), torch.randn(1, 64)
        value = float((weight.double() * x.double()).sum())
        weight = weight if value > 0 else -weight
        eps = torch.tensor(abs(value) / float(weight.double().abs().sum())).float()
        eps = torch.nextafter(eps, torch.tensor(1.0))
        lower, upper = x - eps, x + eps
        least, _ = corner_values(lower, upper, weight, None)
        for rounding in claims:
            verified = bool(interval_linear(lower, upper, weight, rounding=rounding)[0] > 0)
            claims[rounding] += verified and least[0, 0] <= 0
    assert claims["nearest"] > 0
    assert claims["real"] == claims["deployed"] == 0


# --- deployed: any order ------------------------------------------------------------------------


def greedy(terms, side):
    """The sum in the order that, term by term, rounds most towards `side`."""
    total, rest = terms[0], terms[1:]
    while len(rest):
        sums = total + rest
        errors = sums.astype(np.float64) - (total.astype(np.float64) + rest.astype(np.float64))
        chosen = int(np.argmax(side * errors))
        total, rest = sums[chosen], np.delete(rest, chosen)
    return total


def evaluations(x, weight, bias):
    """Float32 evaluations of one point: orders, groupings, fused or not, bias first or last."""
    terms, row, shift = x.numpy(), weight.numpy(), bias.numpy()
    products = row * terms
    for order in (
        slice(None),
        slice(None, None, -1),
        np.random.default_rng(0).permutation(len(terms)),
    ):
        ordered = products[:, order]
        yield np.add.accumulate(ordered, axis=1)[:, -1] + shift
        yield np.add.accumulate(np.concatenate([shift[:, None], ordered], 1), axis=1)[:, -1]
        total = shift.copy()
        for k in np.arange(len(terms))[order]:  # fused: the product is exact in long double
            fused = row[:, k].astype(np.longdouble) * terms[k] + total
            total = fused.astype(np.float32)
        yield total
    pairs = products
    while pairs.shape[1] > 1:
        pairs = np.pad(pairs, ((0, 0), (0, pairs.shape[1] % 2)))
        pairs = pairs[:, ::2] + pairs[:, 1::2]
    yield pairs[:, 0] + shift
    for climbing in (np.sort(products, axis=1), np.sort(products, axis=1)[:, ::-1]):
        # first all terms of one sign: the largest partial sums
        yield np.add.accumulate(climbing, axis=1)[:, -1] + shift
    yield np.array([greedy(terms, side) for terms in products for side in (1, -1)][::2]) + shift
    yield np.array([greedy(terms, side) for terms in products for side in (1, -1)][1::2]) + shift
    yield torch.nn.functional.linear(x, weight, bias).numpy()


@pytest.mark.parametrize(
    "kind", [ordinary, no_radius, wide_exponents, cancelling, huge_bias, denormal, mostly_zero]
)
def test_deployed_contains_every_order(isa, kind):
    for shape in [(1, 1, 40), (2, 60, 20), (9, 40, 20)]:
        lower, upper, weight, bias = kind(*shape)
        low, high = interval_linear(lower, upper, weight, bias, rounding="deployed")
        for b in range(shape[0]):
            share = torch.rand(shape[1]).round() if b % 2 else torch.rand(shape[1])
            x = torch.minimum(lower[b] + share * (upper[b] - lower[b]), upper[b])
            for y in evaluations(torch.maximum(x, lower[b]), weight, bias):
                assert (low[b].numpy() <= y).all()
                assert (y <= high[b].numpy()).all()


@pytest.mark.parametrize("batch", [1, 9])
def test_deployed_counts_the_terms_that_are_not_zero_and_is_nearly_attained(isa, batch):
    # 2^24 loses each of 199 ones that are added to it; 19800 terms are zero after the ReLU.
    ends = -torch.rand(batch, 20_000)
    ends[:, ::100] = 1.0
    ends[:, 0] = 2.0**24
    weight = torch.ones(2, 20_000)
    low, high = interval_linear(ends, ends, weight, None, rounding="deployed", rectified=True)
    assert bool((low <= 2.0**24).all())
    assert bool((high >= 2.0**24 + 199).all())
    assert bool((low > 2.0**24 - 200).all())  # 155 of them for our own sum
    # a term whose box is wider than zero counts, whatever its weight
    upper = ends.clone()
    upper[:, 1::2] = 2.0**-60
    wider = interval_linear(ends, upper, weight, None, rounding="deployed", rectified=True)
    assert bool((wider[0] < 2.0**24 - 9_000).all())


def test_real_mode_does_not_promise_the_deployed_value():
    # Added one by one to 2^24, every 1 is lost: the float32 sum is 2^24, the real one 2^24 + 19999.
    x = torch.ones(1, 20_000)
    x[0, 0] = 2.0**24
    weight, bias = torch.ones(1, 20_000), torch.zeros(1)
    one_by_one = next(evaluations(x[0], weight, bias))[0]
    assert one_by_one == 2.0**24
    assert interval_linear(x, x, weight, bias, rounding="real")[0] > one_by_one
    assert interval_linear(x, x, weight, bias, rounding="deployed")[0] <= one_by_one
