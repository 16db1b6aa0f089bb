"""Inputs whose radii are all the same, as balls have them: one product, and the same promises.

More than eight inputs are needed for it, so blocks of eight show what two products give.
"""

from __future__ import annotations

import pytest
import torch

from pyrobust import Interval
from pyrobust.ops.interval import interval_linear, interval_packed_linear, radius_precision
from pyrobust.ops.matmul import packed_linear
from pyrobust.quantize import round_to_nearest

from .test_interval_exact import SOUND, evaluations, violations
from .test_interval_formats_exact import FORMATS, PROMISES, linear_violations

pytestmark = pytest.mark.emulated_tiles

SHAPES = [(9, 64, 16), (17, 100, 33), (20, 600, 19)]
WIDEST = 1 + 1 / 64  # of what two products give


def ball(x, radius):
    box = Interval.ball(x, radius)
    return box.lower, box.upper


def of_images(batch, terms, rows):
    return *ball(torch.rand(batch, terms), 2 / 255), torch.randn(rows, terms), torch.randn(rows)


def narrow(batch, terms, rows):
    """Radii hardly above what is refused, and sums that lose more than slack makes up for."""
    x = 1 - torch.rand(batch, terms) ** 4 * 0.5
    return *ball(x, (terms + 70) * 2.0**-18), torch.rand(rows, terms), torch.zeros(rows)


def normalized(batch, terms, rows):
    lower, upper = ball(torch.rand(batch, terms), 2 / 255)
    return (lower - 0.13) / 0.31, (upper - 0.13) / 0.31, torch.randn(rows, terms), None


def of_several_radii(batch, terms, rows):
    radius = torch.exp2(torch.randint(-3, 20, (batch, 1)).float())
    x = torch.randn(batch, terms) * torch.rand(batch, 1)
    return x - radius, x + radius, torch.randn(rows, terms), torch.full((rows,), 2.0**25)


def mostly_zero(batch, terms, rows):
    x = torch.rand(batch, terms) * (torch.rand(batch, terms) < 0.1)
    return *ball(x, 0.01), torch.randn(rows, terms), torch.randn(rows)


def one_weight_a_row(batch, terms, rows):
    weight = torch.zeros(rows, terms)
    weight[torch.arange(rows), torch.randint(terms, (rows,))] = torch.randn(rows)
    weight[0] = 0.0
    return *of_images(batch, terms, rows)[:2], weight, None


def weights_whose_squares_leave_the_range(batch, terms, rows):
    weight = torch.randn(rows, terms) * torch.exp2(torch.randint(-149, 100, (rows, 1)).float())
    weight[1, terms // 2] = 2.0**90
    return *of_images(batch, terms, rows)[:2], weight, None


def weights_of_all_sizes(batch, terms, rows):
    weight = torch.randn(rows, terms) * torch.exp2(torch.randint(-90, 60, (rows, terms)).float())
    return *of_images(batch, terms, rows)[:2], weight, torch.full((rows,), -0.0)


def cancelling(batch, terms, rows):
    half = torch.randn(rows, (terms + 1) // 2)
    weight = torch.cat([half, -half * (1 + 2.0**-22)], 1)[:, :terms]
    x = 1 + torch.rand(batch, 1).expand(-1, terms) * 2.0**-20
    return *ball(x, 2.0**-9), weight, torch.zeros(rows)


def signed(batch, terms, rows):
    """Every product is of one sign: partial sums grow, and with them what they lose."""
    x = torch.rand(batch, terms) - 0.5
    return *ball(x, 0.01), (torch.rand(rows, terms) + 0.1) * x[0].sign(), torch.zeros(rows)


KINDS = [
    of_images,
    narrow,
    normalized,
    of_several_radii,
    mostly_zero,
    one_weight_a_row,
    weights_whose_squares_leave_the_range,
    weights_of_all_sizes,
    cancelling,
    signed,
]


def by_blocks(lower, upper, *rest, image=interval_linear, **options):
    """The ends by two products."""
    blocks = zip(lower.split(8), upper.split(8), strict=True)
    ends = [image(*block, *rest, **options) for block in blocks]
    return torch.cat([low for low, _ in ends]), torch.cat([high for _, high in ends])


def equal(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("kind", KINDS)
def test_no_attained_corner_lies_outside_and_boxes_are_hardly_wider(isa, kind, rounding):
    for shape in SHAPES:
        problem = kind(*shape)
        ends = interval_linear(*problem, rounding=rounding, allow_infinite=True)
        assert violations(ends, *problem)[0] == 0
        plain = by_blocks(*problem, rounding=rounding, allow_infinite=True)
        assert not equal(ends, plain)
        finite = torch.isfinite(plain[0]) & torch.isfinite(plain[1])
        assert torch.equal(finite, torch.isfinite(ends[0]) & torch.isfinite(ends[1]))
        widths = [(high.double() - low)[finite] for low, high in (ends, plain)]
        steps = 4e-7 * plain[0].double().abs().maximum(plain[1].abs())[finite] + 1e-36
        assert bool((widths[0] <= WIDEST * widths[1] + steps).all())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_attained_corner_of_a_million_lies_outside(isa, kind):
    total = 0
    for seed in range(6):
        torch.manual_seed(seed)
        problem = kind(90, 64 + 13 * seed, 90)
        for rounding in SOUND:
            ends = interval_linear(*problem, rounding=rounding, allow_infinite=True)
            outside, checked = violations(ends, *problem)
            assert outside == 0
            total += checked
    assert total > 190_000  # ten kinds and every instruction set: several millions


@pytest.mark.parametrize("rounding", PROMISES)
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_and_arithmetic(isa, form, rounding):
    for kind in (of_images, narrow, of_several_radii, mostly_zero):
        lower, upper, weight, bias = kind(17, 100, 16)
        bias = torch.zeros(16) if bias is None else bias
        assert linear_violations((lower, upper, weight, bias), form, rounding)[0] == 0


def test_mean_widths(isa):
    lower, upper, weight, bias = of_images(32, 784, 64)
    reach = (upper.double() - lower) / 2 @ weight.double().abs().T
    for rounding, most in (("real", 1.0002), ("deployed", 1.003)):
        low, high = interval_linear(lower, upper, weight, bias, rounding=rounding)
        assert float(((high.double() - low) / 2 / reach).mean()) < most


@pytest.mark.parametrize("rounding", SOUND)
def test_inputs_of_which_one_is_not_uniform_meet_both_products(isa, rounding):
    weight, bias = torch.randn(24, 130), torch.randn(24)
    x = torch.rand(22, 130)
    x[:, 0] = 1.0
    for row, column in ((0, 0), (0, 129), (13, 77), (21, 129)):
        for step, uniform in ((2.0**-22, True), (2.0**-18, False), (0.5, False)):
            lower, upper = ball(x, 2 / 255)
            upper[row, column] += step
            ends = interval_linear(lower, upper, weight, bias, rounding=rounding)
            assert violations(ends, lower, upper, weight, bias)[0] == 0
            plain = by_blocks(lower, upper, weight, bias, rounding=rounding)
            assert equal(ends, plain) != uniform


@pytest.mark.parametrize("rounding", ["nearest", *SOUND])
def test_narrow_and_wide_radii_points_and_little_work_meet_both_products(isa, rounding):
    def same(x, radius, rows=24):
        problem = (x - radius, x + radius, torch.randn(rows, x.shape[1]))
        options = {"rounding": rounding, "allow_infinite": True}
        return equal(interval_linear(*problem, **options), by_blocks(*problem, **options))

    x = torch.rand(22, 130)
    assert not same(x, 0.01)
    for radius in (0.0, 2.0**-60, 2.0**-16, 2.0**61):
        assert same(x, radius)
    assert same(torch.zeros(22, 130), 2.0**-45)
    assert same(torch.zeros(22, 130), 0.0)
    assert same(x, 0.01, rows=15)
    assert same(torch.rand(22, 63), 0.01)
    assert same(torch.rand(22, 1), 0.01)


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3e38])
def test_ends_that_are_not_finite_or_too_large(isa, value, rounding):
    weight = torch.randn(24, 130)
    for row in (0, 13):
        lower, upper = ball(torch.rand(22, 130), 2 / 255)
        upper[row, 70] = value
        if value < 0:
            lower[row, 70] = value
        options = {"rounding": rounding, "allow_infinite": True}
        ends = interval_linear(lower, upper, weight, **options)
        plain = by_blocks(lower, upper, weight, **options)
        for end, expected in zip(ends, plain, strict=True):
            torch.testing.assert_close(end, expected, rtol=0, atol=0, equal_nan=True)
        if abs(value) == float("inf"):
            assert bool((ends[0][row] == -float("inf")).all())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_bound_nothing(isa, value):
    lower, upper, weight, bias = of_images(22, 130, 24)
    weight[3, 40] = value
    low, high = interval_linear(lower, upper, weight, bias, allow_infinite=True)
    assert bool((low[:, 3] == -float("inf")).all() and (high[:, 3] == float("inf")).all())
    assert int(low.isinf().sum() + high.isinf().sum()) == 44


def test_sums_that_overflow_bound_nothing(isa):
    lower, upper, weight, bias = of_images(22, 130, 24)
    weight[5] = 3e38
    for rounding in SOUND:
        low, high = interval_linear(
            lower, upper, weight, bias, rounding=rounding, allow_infinite=True
        )
        assert bool((low[:, 5] == -float("inf")).all() and (high[:, 5] == float("inf")).all())
        assert not bool(low.isnan().any() or high.isnan().any())


def test_a_relu_before_the_layer(isa):
    x = torch.rand(20, 100) + 0.1
    weight = torch.randn(24, 100)
    x[:, ::3] = -0.5
    lower, upper = x - 0.01, x + 0.01
    clipped = (lower.relu(), upper.relu(), weight)
    ends = interval_linear(lower, upper, weight, rectified=True)
    assert equal(ends, interval_linear(*clipped))
    x = torch.rand(20, 100) + 0.1  # nothing is clipped
    ends = interval_linear(x - 0.01, x + 0.01, weight, rectified=True)
    assert equal(ends, interval_linear(x - 0.01, x + 0.01, weight))
    assert not equal(ends, by_blocks(x - 0.01, x + 0.01, weight))


@pytest.mark.parametrize("kind", [of_images, narrow, mostly_zero, cancelling, signed])
def test_deployed_contains_every_order(isa, kind):
    lower, upper, weight, bias = kind(9, 64, 16)
    low, high = interval_linear(lower, upper, weight, bias, rounding="deployed")
    for b in range(0, 9, 4):
        share = torch.rand(64).round() if b % 2 == 0 else torch.rand(64)
        x = torch.minimum(lower[b] + share * (upper[b] - lower[b]), upper[b])
        for y in evaluations(torch.maximum(x, lower[b]), weight, bias):
            assert (low[b].numpy() <= y).all()
            assert (y <= high[b].numpy()).all()


@pytest.mark.parametrize("rounding", ["real", "deployed", "nearest"])
def test_neither_passes_over_the_terms_nor_threads_change_a_bit(isa, rounding):
    weight, bias = torch.randn(50, 1600), torch.randn(50)
    x = torch.rand(540, 1600)  # so many inputs that a pass has 512 terms
    ends = interval_linear(x - 0.1, x + 0.1, weight, bias, rounding=rounding)
    for rows in (slice(0, 9), slice(512, 540)):  # all terms in one pass
        few = interval_linear(x[rows] - 0.1, x[rows] + 0.1, weight, bias, rounding=rounding)
        assert equal([end[rows] for end in ends], few)
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    try:
        others = interval_linear(x - 0.1, x + 0.1, weight, bias, rounding=rounding)
    finally:
        torch.set_num_threads(before)
    assert equal(ends, others)


def test_nearest_mode_is_centre_and_radius(isa):
    for shape in SHAPES:
        lower, upper, weight, bias = of_images(*shape)
        ends = interval_linear(lower, upper, weight, bias, rounding="nearest")
        centre = (lower.double() + upper) / 2 @ weight.double().T + bias
        reach = (upper.double() - lower) / 2 @ weight.double().abs().T
        torch.testing.assert_close(ends[0].double(), centre - reach, rtol=0, atol=2e-5)
        torch.testing.assert_close(ends[1].double(), centre + reach, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", [of_images, weights_whose_squares_leave_the_range])
def test_flushed_denormals_change_nothing(isa, kind):
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    torch.set_flush_denormal(False)
    problem = kind(17, 100, 20)
    expected = interval_linear(*problem, allow_infinite=True)
    torch.set_flush_denormal(True)
    try:
        ends = interval_linear(*problem, allow_infinite=True)
    finally:
        torch.set_flush_denormal(False)
    assert equal(ends, expected)


def test_radii_that_may_be_bfloat16_are_not(isa):
    problem = of_images(22, 130, 33)
    with radius_precision("bfloat16"):
        ends = interval_linear(*problem)
    assert equal(ends, interval_linear(*problem))


@pytest.mark.parametrize("rounding", ["nearest", *SOUND])
def test_activations_in_8_bits(isa, rounding):
    x, weight, bias = torch.rand(17, 130), torch.randn(24, 130), torch.randn(24)
    packed = round_to_nearest(weight, bits=4, group_size=32)
    parts = (packed.codes, packed.scale, packed.zero, bias)
    form = {"in_features": 130, "bits": 4, "group_size": 32, "activations": "int8"}
    lower, upper = ball(x, 0.01)
    options = {**form, "rounding": rounding, "image": interval_packed_linear}
    plain = by_blocks(lower, upper, *parts, **options)
    low, high = interval_packed_linear(lower, upper, *parts, **form, rounding=rounding)
    assert not equal((low, high), plain)
    ratio = (high - low) / (plain[1] - plain[0])
    assert float(ratio.min()) > 0.99999
    assert float(ratio.max()) < (1.0001 if rounding == "nearest" else WIDEST)
    if rounding == "nearest":
        return
    for share in (0.0, 0.5, 1.0, torch.rand(17, 130).round(), torch.rand(17, 130)):
        y = packed_linear(lower + share * (upper - lower), *parts, **form)
        assert bool(((low <= y) & (y <= high)).all())
