"""Interval-bound training: a network whose interval bounds stay tight enough to certify.

The loss mixes the clean one with the cross-entropy of the worst logits that interval propagation
allows inside an l-infinity ball. The radius grows and the weight of the clean term falls during
training; the network learns weights for which plain intervals are nearly exact.

Source: Gowal et al., "On the effectiveness of interval bound propagation for training verifiably
robust models", 2018, arXiv 1810.12715, equations 11 and 12 and the schedules of section 5.
Departures: the final layer is not folded into the margins (no elision); training bounds are
rounded to nearest, since only certification needs outward rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust._checks import check_at_least, check_positive, check_unit
from pyrobust.interval import Interval
from pyrobust.train.loop import GaussianCrossEntropy, Objective
from pyrobust.train.schedules import linear_ramp

__all__ = ["IntervalTraining", "interval_loss", "worst_logits"]


def worst_logits(lower: Tensor, upper: Tensor, labels: Tensor) -> Tensor:
    """The least favourable logits of a box: lower end for the label, upper end for all others.

    The box keeps the label when the largest worst logit is that of the label.

    Args:
        lower: ``(N, K)`` lower ends.
        upper: ``(N, K)`` upper ends.
        labels: ``(N,)`` int64.

    Example:
        >>> worst_logits(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([1]))
        tensor([[1., 0.]])
    """
    mine = F.one_hot(labels, lower.shape[-1]).to(torch.bool)
    return torch.where(mine, lower, upper)


def interval_loss(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    eps: float,
    clamp: tuple[float, float] | None = (0.0, 1.0),
) -> Tensor:
    """Mean cross-entropy of the worst logits over the l-infinity balls around ``x``.

    It bounds from above, up to float rounding, the loss of any point of the ball.

    Args:
        model: a classifier that accepts an :class:`~pyrobust.Interval`.
        x: ``(N, ...)`` float inputs.
        labels: ``(N,)`` int64.
        eps: radius, ``>= 0``, in the units of the input.
        clamp: range of valid inputs, cut from the ball; None for no limit.

    Raises:
        ValueError: ``eps`` is negative.
    """
    check_at_least("interval_loss", "eps", eps, 0.0)
    box = model(Interval.ball(x, eps, clamp=clamp, rounding="nearest"))
    return F.cross_entropy(worst_logits(box.lower, box.upper, labels), labels)


@dataclass(frozen=True)
class IntervalTraining:
    """The objective ``kappa * clean + (1 - kappa) * interval_loss`` with both schedules.

    Args:
        eps: final radius, ``> 0``, in the units of the input.
        kappa: final weight of the clean term, in [0, 1].
        begin: share of training before the radius starts to grow, in [0, 1].
        end: share of training when radius and weight arrive, in [0, 1].
        clean: objective of the clean term.
        clamp: range of valid inputs; None for no limit.

    Raises:
        ValueError: an argument is out of range.
    """

    eps: float
    kappa: float = 0.5
    begin: float = 0.1
    end: float = 0.6
    clean: Objective = field(default_factory=GaussianCrossEntropy)
    clamp: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_positive(type(self).__name__, "eps", self.eps)
        for name in ("kappa", "begin", "end"):
            check_unit(type(self).__name__, name, getattr(self, name))
        check_at_least(type(self).__name__, "end", self.end, self.begin)

    def __call__(self, model: nn.Module, x: Tensor, labels: Tensor, done: float) -> Tensor:
        """The loss after the share ``done`` of training."""
        clean = self.clean(model, x, labels, done)
        ramp = linear_ramp(done, begin=self.begin, end=self.end)
        if ramp == 0:
            return clean
        kappa = 1 - (1 - self.kappa) * ramp
        worst = interval_loss(model, x, labels, eps=self.eps * ramp, clamp=self.clamp)
        return kappa * clean + (1 - kappa) * worst
