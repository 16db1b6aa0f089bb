"""Rules made of other passes: clamps by floats, instance norm by groups, powers by quotients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyrobust import Interval
from pyrobust.interval import arithmetic, elementwise, normalization


@pytest.mark.parametrize("rounding", ["real", "deployed"])
@pytest.mark.parametrize(
    "bounds", [(-0.3, 0.7), (None, 0.1), (1 / 3, None), (0.5, 0.3), (-1e-3, 0)]
)
def test_bounds_beyond_float32_are_the_floats_around_them(rounding, bounds):
    x = torch.cat([torch.randn(2000), torch.tensor([b for b in bounds if b is not None])])
    box = Interval(x - 0.01, x + 0.01, rounding=rounding)
    for values in (box.lower, box.upper, x):
        result = torch.clamp(box, *bounds)
        assert bool(result.contains(values.clamp(*bounds)).all())
        assert bool(result.contains(values.double().clamp(*bounds)).all())
    point = torch.clamp(Interval(x, x, rounding=rounding), *bounds)
    exact, narrow = x.double().clamp(*bounds), x.clamp(*bounds)
    for end, towards in ((point.lower, torch.inf), (point.upper, -torch.inf)):
        inner = torch.nextafter(end, torch.full_like(end, towards)).double()
        off = end.double() != exact  # where a bound was taken, the float on its outer side
        beyond = inner > exact if towards > 0 else inner < exact
        assert bool((beyond | ~off | (end == narrow)).all())


@pytest.mark.parametrize("bound", [0.3, -0.3, 1e-30, 1e30, 1 / 3])
def test_floats_around_a_bound_are_neighbours(bound):
    box = Interval(torch.zeros(1), torch.ones(1))
    below, above = elementwise._floats_around(bound, box)
    assert below < bound < above
    near = torch.tensor([below, above], dtype=torch.float64).float()
    assert near.tolist() == [below, above]
    assert float(torch.nextafter(near[0], near[1])) == above


@pytest.mark.parametrize("rounding", ["real", "deployed"])
def test_instance_norm_is_a_group_norm_of_channels(rounding, watch_passes):
    passes = watch_passes("box_row_norm")
    box = Interval.ball(torch.randn(2, 6, 5, 7), 0.05, rounding=rounding)
    weight, bias = torch.randn(6), torch.randn(6)
    fast = F.instance_norm(box, weight=weight, bias=bias)
    slow = normalization.RULES["instance_norm"](box, weight=weight, bias=bias)
    assert passes == ["box_row_norm"]
    tail = 2.0**-20 * slow.width().amax()
    assert bool((fast.lower >= slow.lower - tail).all())
    assert bool((fast.upper <= slow.upper + tail).all())
    assert bool(fast.contains(F.instance_norm(box.center, weight=weight, bias=bias)).all())
    assert bool(
        fast.contains(
            F.instance_norm(box.center.double(), weight=weight.double(), bias=bias.double())
        ).all()
    )
    with pytest.raises(ValueError, match="instance_norm"):
        F.instance_norm(box, weight=weight[:5])


@pytest.mark.parametrize("rounding", ["real", "deployed"])
@pytest.mark.parametrize("exponent", [-1, -2, -3, -1.5])
def test_powers_below_zero_divide_by_the_pass(rounding, exponent, watch_passes):
    passes = watch_passes("interval_constant")
    x = torch.rand(500) + 0.1
    box = Interval(x, x * 1.01, rounding=rounding)
    fast, slow = box**exponent, arithmetic.power(box, exponent)
    assert passes == ["interval_constant"]
    assert bool((fast.lower >= slow.lower).all() & (fast.upper <= slow.upper).all())
    for value in (x**exponent, x.double() ** exponent):
        assert bool(
            (fast.contains(value) | ((rounding == "real") & (value.dtype == x.dtype))).all()
        )


@pytest.mark.parametrize(
    "call", [F.leaky_relu, F.gelu, torch.square, lambda b: b + torch.tensor(2.0), lambda b: b * 0.3]
)
def test_boxes_of_one_number_pass(call):
    box = Interval(torch.tensor(1.0), torch.tensor(2.0))
    result = call(box)
    assert result.shape == ()
    assert bool(result.contains(call(torch.tensor(1.5))))
