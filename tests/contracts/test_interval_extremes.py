"""Every rule of Interval far from ordinary numbers: overflow, underflow, cancellation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyrobust import Interval
from pyrobust.interval.finite import infinite_ends

from .test_interval_rules import EACH, IMAGE, points_of

TINY = torch.finfo(torch.float32).tiny
SCALES = [2.0**e for e in (-145, -130, -60, 60, 62, 63, 90, 120)]


def ordinary(row, scale):
    return torch.randn(row.shape) * scale


def cancelling(row, scale):
    """Numbers that are all nearly the same."""
    return scale * (1 + torch.randn(row.shape) * 2.0**-20)


def wide(row, scale):
    """Numbers of all sizes up to the scale."""
    return torch.randn(row.shape) * scale ** torch.rand(row.shape)


def boxes(row, rounding):
    """Boxes of widths from none to a few times their numbers."""
    for kind in (ordinary, cancelling, wide):
        for scale in (*SCALES, 1.0, 2.0**10, 2.0**20):
            centre = kind(row, scale)
            share = torch.exp2(torch.randint(-24, 3, row.shape).float())
            reach = centre.abs() * share * (torch.rand(row.shape) > 0.3)
            lower, upper = centre - reach, centre + reach
            if row.low > 0:
                centre = centre.abs() + TINY
                lower, upper = centre * (1 - share / 8), centre * (1 + share / 8)
            if row.high < 0:
                centre = -centre.abs() - TINY
                lower, upper = centre * (1 + share / 8), centre * (1 - share / 8)
            if bool((lower.isfinite() & upper.isfinite()).all()):
                yield Interval(lower, upper, rounding=rounding)


def images(row, rounding):
    """``(box, its image)`` of those that are not refused."""
    for box in boxes(row, rounding):
        try:
            image = row.call(box)
        except OverflowError:
            continue
        except ValueError as error:  # where flushing of denormals puts a zero in
            if "break this" not in str(error):
                raise
            continue
        yield box, image


def flushed(call, point):
    """The result on a processor that flushes denormals, as such a processor reads it."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    try:
        value = call(point.clone())
    finally:
        torch.set_flush_denormal(False)
    return torch.where(value.abs() < TINY, 0.0, value)


@EACH
def test_evaluations_in_float32_lie_inside_deployed_boxes(row):
    checked = 0
    for box, image in images(row, "deployed"):
        for point in points_of(box.lower, box.upper, 4):
            assert bool(image.contains(row.call(point.clone())).all())
            assert bool(image.contains(flushed(row.call, point)).all())
            checked += 1
    assert checked


@EACH
def test_evaluations_in_float64_lie_inside(row):
    if row.name == "gelu":
        pytest.skip("torch's own cancels in float64; tests/interval has references for its tail")
    for box, image in images(row, "real"):
        low, high = image.lower.double(), image.upper.double()
        assert bool((low <= high).all())
        for point in points_of(box.lower, box.upper, 4):
            value = row.call(point.double()).double()
            # float64 may cancel where the box does not, but not beyond its own inputs
            slack = 1e-13 * (value.abs() + TINY)
            assert bool(((low <= value + slack) & (value - slack <= high)).all())


# -- what such numbers once broke ----------------------------------------------------------------


def test_sums_that_start_with_the_added_term_lie_inside():
    """2^24 loses each of a hundred ones that follow it, and keeps all of a hundred that precede."""
    weight = torch.ones(100, 1)
    x = torch.ones(1, 100)
    for term in (torch.full((1,), 2.0**24), torch.full((1, 1), 2.0**24)):
        box = torch.addmm(term, Interval(x, x, rounding="deployed"), weight)
        assert float(box.lower) <= 2.0**24
        assert float(box.upper) >= 2.0**24 + 100
        box = torch.addmm(Interval(term, term, rounding="deployed"), Interval(x, x), weight)
        assert box.rounding == "real"
    boxed = Interval(term, term, rounding="deployed")
    box = torch.addmm(boxed, Interval(x, x, rounding="deployed"), weight)
    assert float(box.lower) <= 2.0**24


NORMS = {
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "rms_norm": lambda x: F.rms_norm(x, (6,), eps=1e-6),
    "group_norm": lambda x: F.group_norm(x[..., None], 2),
    "instance_norm": lambda x: F.instance_norm(x[None]),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_whose_squares_overflow_in_float32_are_refused(name):
    x = torch.randn(2, 6) * 2.0**64
    assert bool(Interval(x, x).lower.isfinite().all())
    NORMS[name](Interval(x, x))  # the real image is finite
    with pytest.raises(OverflowError, match=f"{name} leaves the range"):
        NORMS[name](Interval(x, x, rounding="deployed"))


def test_norms_of_equal_numbers_hold_what_the_rounded_mean_leaves():
    """A mean that is off by a unit makes all deviations alike: the norm is 1, or -1, throughout."""
    x = torch.full((1, 6), 1000.1)
    box = F.layer_norm(Interval(x, x, rounding="deployed"), (6,), eps=1e-12)
    assert bool((box.upper >= 1).all())
    assert bool((box.lower <= -1).all())
    assert float(F.layer_norm(Interval(x, x), (6,), eps=1e-12).width().max()) < 1e-5


def test_norms_without_eps_of_numbers_whose_squares_vanish_are_refused():
    x = torch.full((1, 6), 2.0**-80)
    F.rms_norm(Interval(x, x), (6,), eps=0.0)
    with pytest.raises(OverflowError, match="rms_norm leaves the range"):
        F.rms_norm(Interval(x, x, rounding="deployed"), (6,), eps=0.0)


def test_averages_whose_sums_overflow_are_refused():
    x = torch.full((1, 4), 2.0**127)
    for call in (lambda x: x.mean(), lambda x: F.avg_pool1d(x, 4)):
        assert float(call(Interval(x, x)).upper) >= 2.0**127
        with pytest.raises(OverflowError, match="leaves the range"):
            call(Interval(x, x, rounding="deployed"))


@pytest.mark.parametrize("rounding", ["real", "deployed"])
def test_attention_over_scores_that_overflow_is_refused(rounding):
    x = torch.randn(1, 4, 3) * 2.0**90
    box = Interval(x, x, rounding=rounding)
    with pytest.raises(OverflowError, match="scaled_dot_product_attention leaves the range"):
        F.scaled_dot_product_attention(box, box, box)


def test_a_softmax_of_boxes_without_end_holds_everything():
    for sign in (1.0, -1.0):
        x = Interval(*(torch.full((1, 3), 3e38) for _ in range(2)))
        with infinite_ends():
            weights = (x * (3 * sign)).softmax(-1)
        assert bool((weights.lower <= 0).all())
        assert bool((weights.upper >= 1).all())


def test_batch_norm_that_overflows_on_the_way_is_refused():
    x = torch.full(IMAGE, 2.0**127)
    statistics = torch.full((3,), -(2.0**127)), torch.full((3,), 2.0**100)
    F.batch_norm(Interval(x, x), *statistics)
    with pytest.raises(OverflowError, match="batch_norm leaves the range"):
        F.batch_norm(Interval(x, x, rounding="deployed"), *statistics)
