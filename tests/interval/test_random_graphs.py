"""Random compositions of operations on boxes: no attained value may leave its box."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyrobust import Interval

from .random_graphs import Findings, look_at


def assert_sound(findings: Findings, least: int) -> None:
    assert not findings.violations, "\n".join(findings.violations[:3])
    assert findings.attained >= least  # of values that were looked at
    assert findings.exact >= least // 1000
    assert sum(findings.refused.values()) < sum(findings.operations.values()) / 10


def test_attained_values_stay_in_their_boxes():
    assert_sound(look_at(range(150), points=4), 80_000)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(10_000, 20_000, 1_000))
def test_many_attained_values_stay_in_their_boxes(first):
    assert_sound(look_at(range(first, first + 1_000)), 1_000_000)


# -- what random graphs found ----------------------------------------------------------------


def test_an_evaluation_of_nearly_equal_numbers_may_lose_their_variance():
    """The mean square less the squared mean may be zero where the deviations are not."""
    lower, upper = torch.tensor([8609823.0, 9654075.0]), torch.tensor([9875153.0, 10919405.0])
    box = F.layer_norm(Interval(lower, upper, rounding="deployed"), (2,), eps=1e-12)
    x = torch.tensor([9771313.0, 9772243.0])
    variance = ((x * x).mean() - x.mean() ** 2).clamp(min=0.0)
    assert float(variance) == 0
    assert bool(box.contains((x - x.mean()) * (variance + 1e-12).rsqrt()).all())
    exact = F.layer_norm(Interval(lower, upper), (2,), eps=1e-12)
    assert float(exact.upper.max()) < 1.001


def test_a_zero_weight_does_not_hide_that_a_norm_may_overflow():
    box = Interval.ball(torch.tensor([1e30, -1e24, 1e24]), 0.0, rounding="deployed")
    with pytest.raises(OverflowError, match="layer_norm leaves the range"):
        F.layer_norm(box, (3,), torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize("constant", [torch.tensor([8e-39]), 8e-39, torch.tensor([-8e-39])])
def test_constants_may_be_flushed_like_inputs(constant):
    box = Interval.ball(torch.tensor([3.0]), 0.5, rounding="deployed")
    for rule in (lambda x: x * constant, lambda x: constant * x):
        result = rule(box)
        assert bool(result.contains(rule(torch.tensor([3.0]))).all())
        assert bool(result.contains(torch.zeros(1)).all())
    assert not bool((Interval.ball(torch.tensor([3.0]), 0.5) * constant).contains(torch.zeros(1)))


@pytest.mark.parametrize(
    "function", [torch.sigmoid, F.silu, lambda x: F.gelu(x, approximate="tanh")]
)
def test_gradients_far_from_zero_are_finite(function):
    lower = torch.tensor([-1e6, 720.0, 1153.0, 1e6]).requires_grad_()
    box = function(Interval(lower, lower + 1))
    (slope,) = torch.autograd.grad(box.upper.sum() + box.lower.sum(), lower)
    assert bool(slope.isfinite().all())


def test_a_bias_that_no_tap_reaches_may_be_flushed():
    box = Interval.ball(torch.ones(1, 1, 3), 0.5, rounding="deployed")
    shifted = F.conv_transpose1d(box, torch.ones(1, 1, 2), torch.tensor([1e-38]), 2, 0, 0, 1, 2)
    assert bool(shifted.contains(torch.zeros(shifted.shape))[..., 1].all())
    assert float(shifted.upper[..., 1].max()) == float(torch.tensor(1e-38))


def test_numbers_that_float32_cannot_hold_are_filled_in_both_ways():
    box = Interval.ball(torch.zeros(2), 0.1)
    filled = box.masked_fill(torch.tensor([True, False]), 0.1)
    assert bool(filled.contains(torch.tensor([0.1, 0.0], dtype=torch.float64)).all())
    assert bool(filled.contains(torch.tensor([0.1, 0.0])).all())
