"""The parts without which interval training often collapses: start, ramp, regulariser.

Weights start so that interval radii neither grow nor vanish with depth; the radius follows a ramp
that is smooth where it begins; during the ramp a regulariser holds the widths of the layers' boxes
together and keeps both states of the ReLUs in use.

Source: Shi, Wang, Zhang, Yi, Hsieh, "Fast Certified Robust Training with Short Warmup", NeurIPS
2021, arXiv 2103.17268, section 3; with the settings of arXiv 2306.10426, appendix C.
Departures: none known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyrobust._checks import check_at_least, check_open_unit, check_positive, check_unit
from pyrobust.certify.bound import interval_margins
from pyrobust.interval import Interval

__all__ = ["FastRegularizer", "IBPLoss", "SmoothEpsSchedule", "ibp_init_"]


def ibp_init_(model: nn.Module, *, generator: torch.Generator | None = None) -> nn.Module:
    """Draw all weights but the last from ``N(0, sigma)``, ``sigma = sqrt(2 pi) / fan_in``.

    Weights are parameters of two or more dimensions; vectors (biases, batch-norm) stay.

    Returns:
        ``model``, changed in place.
    """
    weights = [p for p in model.parameters() if p.ndim >= 2]
    with torch.no_grad():
        for weight in weights[:-1]:
            sigma = math.sqrt(2 * math.pi) / weight[0].numel()
            weight.copy_(sigma * torch.randn(weight.shape, generator=generator))
    return model


@dataclass(frozen=True)
class SmoothEpsSchedule:
    """A radius that rises as a power first and then straight, value and slope continuous.

    Args:
        start: where the ramp begins, in the unit of the call (share of training or step).
        end: where it arrives, ``> start``.
        eps: the final radius, ``> 0``.
        mid: share of the ramp at which the power ends, in (0, 1).
        exponent: the power, ``>= 1``.

    Example:
        >>> SmoothEpsSchedule(0.0, 1.0, eps=0.3)(1.0)
        0.3
    """

    start: float
    end: float
    eps: float
    mid: float = 0.25
    exponent: float = 4.0

    def __post_init__(self) -> None:
        check_positive(type(self).__name__, "eps", self.eps)
        check_positive(type(self).__name__, "end - start", self.end - self.start)
        check_open_unit(type(self).__name__, "mid", self.mid)
        check_at_least(type(self).__name__, "exponent", self.exponent, 1.0)

    def __call__(self, done: float) -> float:
        """The radius at ``done``."""
        share = min(max((done - self.start) / (self.end - self.start), 0.0), 1.0)
        if share == 1.0:
            return self.eps
        power, mid = self.exponent, self.mid
        # a t^p up to mid, then a straight line of the slope there that ends in 1.
        a = 1 / (power * mid ** (power - 1) * (1 - mid) + mid**power)
        if share <= mid:
            return float(self.eps * a * share**power)
        return float(self.eps * (1 - a * power * mid ** (power - 1) * (1 - share)))


@dataclass(frozen=True)
class FastRegularizer:
    """Keeps boxes from widening through the layers and ReLUs from falling into one state.

    Args:
        weight: factor of the whole term, ``>= 0``; scaled by ``1 - eps / eps_end``.
        tol: ratios above it cost nothing, in (0, 1).
    """

    weight: float = 0.5
    tol: float = 0.5

    def __post_init__(self) -> None:
        check_at_least(type(self).__name__, "weight", self.weight, 0.0)
        check_open_unit(type(self).__name__, "tol", self.tol)

    def __call__(self, entering: Interval, boxes: list[Interval]) -> Tensor:
        """The term for an input box and the boxes that enter the ReLUs, unweighted.

        A layer whose term is not finite is left out.
        """
        inside = (entering.upper - entering.lower).mean() / 2
        if not boxes:
            return inside.new_zeros(())
        moments = torch.stack([_moments_of(box.lower, box.upper) for box in boxes])
        radius, active, dead, *spreads = moments.unbind(1)
        # No look at the numbers, which would stop a GPU. A term is left out where it costs nothing,
        # since the slope of the quotient overflows at radius 0.
        wide = inside < self.tol * radius
        ratio = inside / torch.where(wide, radius, 1.0)
        narrow = torch.where(wide, (self.tol - ratio) / self.tol, 0.0)
        balance = self._shortfall(active, -dead) + self._shortfall(*spreads)
        return (narrow + torch.where(balance.isfinite(), balance, 0.0)).mean()

    def _shortfall(self, a: Tensor, b: Tensor) -> Tensor:
        # min / max, not min(a / b, b / a): its slope is finite where one of the two is 0.
        return (self.tol - torch.minimum(a, b) / torch.maximum(a, b)).clamp_min(0) / self.tol


class _Moments(torch.autograd.Function):
    """Mean radius of a box; mean centre of its active and of its dead entries; their variances.

    Five numbers; NaN where no entry is active, or dead. One pass of gradients instead of one for
    each operation, and none where a number is NaN.
    """

    @staticmethod
    def forward(ctx: Any, lower: Tensor, upper: Tensor) -> Tensor:
        centre = (lower + upper) * 0.5
        flat = _in_order_of_memory(centre)
        found = [_moments(flat, _in_order_of_memory(m)) for m in (lower > 0, upper < 0)]
        counts, means, variances = (torch.stack(each) for each in zip(*found, strict=True))
        ctx.save_for_backward(lower, upper, counts, means)
        radius = (upper - lower).mean() * 0.5
        return torch.cat([radius.unsqueeze(0), means, variances])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper, counts, means = ctx.saved_tensors
        to_radius, to_means, to_variances = gradient[0], gradient[1:3], gradient[3:5]
        # of an entry: (to_mean + 2 to_variance (centre - mean)) / count, a line of lower + upper
        rise = to_variances / counts
        level = to_means / counts - 2 * rise * means
        rise, level = (each.nan_to_num(0.0, 0.0, 0.0) * 0.5 for each in (rise, level))
        total = lower + upper
        of_active = torch.addcmul(level[0], rise[0], total)
        of_dead = torch.addcmul(level[1], rise[1], total)
        to_centre = torch.where(lower > 0, of_active, torch.where(upper < 0, of_dead, 0.0))
        share = to_radius * (0.5 / lower.numel())
        return to_centre - share, to_centre + share


def _moments_of(lower: Tensor, upper: Tensor) -> Tensor:
    found: Tensor = _Moments.apply(lower, upper)  # type: ignore[no-untyped-call]
    return found


def _in_order_of_memory(x: Tensor) -> Tensor:
    """``x`` as a vector, without a copy where its memory has no gaps."""
    strides = x.stride()
    return x.permute(sorted(range(x.ndim), key=lambda axis: -strides[axis])).flatten()


def _moments(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance of the chosen entries of a vector."""
    # Products with the mask: gathering entries and scattering their gradients takes longer.
    mask = chosen.to(x.dtype)
    count = mask.sum()
    mean = torch.dot(mask, x) / count
    apart = (x - mean) * mask
    return count, mean, torch.dot(apart, apart) / count


@dataclass(frozen=True)
class IBPLoss:
    """Cross-entropy of the worst margins of the interval bounds; an ``Objective`` of the loop.

    The last layer is folded into the margins. Until the ramp starts it is plain cross-entropy.

    Args:
        eps_schedule: the radius as a function of the share of training.
        regularizer: added during the ramp; None for none.
        clamp: range of valid inputs, cut from the ball; None for no limit.
        kappa: weight of the clean cross-entropy where the radius has arrived, in [0, 1]; it falls
            to that from 1 as the radius grows (equation 12 of Gowal et al., arXiv 1810.12715).

    Raises:
        ValueError: ``kappa`` lies outside [0, 1].
    """

    eps_schedule: SmoothEpsSchedule
    regularizer: FastRegularizer | None = field(default_factory=FastRegularizer)
    clamp: tuple[float, float] | None = (0.0, 1.0)
    kappa: float = 0.0

    def __post_init__(self) -> None:
        check_unit(type(self).__name__, "kappa", self.kappa)

    def __call__(self, model: nn.Module, x: Tensor, labels: Tensor, done: float) -> Tensor:
        """Mean loss of a batch after the share ``done`` of training."""
        eps = self.eps_schedule(done)
        clean: Tensor | None = model(x) if self.kappa > 0 else None
        box = Interval.ball(x, eps, clamp=self.clamp, rounding="nearest")
        boxes: list[Interval] = []
        handles = [
            module.register_forward_pre_hook(lambda m, inputs: boxes.append(inputs[0]))
            for module in model.modules()
            if isinstance(module, nn.ReLU)
        ]
        try:
            margins = interval_margins(model, box, labels)
        finally:
            for handle in handles:
                handle.remove()
        against = -margins.lower
        worst = torch.cat([torch.zeros_like(against[:, :1]), against], 1)
        loss = worst.logsumexp(1).mean()
        factor = 1 - eps / self.eps_schedule.eps
        if clean is not None:
            weight = self.kappa + (1 - self.kappa) * factor
            loss = (1 - weight) * loss + weight * nn.functional.cross_entropy(clean, labels)
        if self.regularizer is not None and factor > 0 and eps > 0:
            loss = loss + self.regularizer.weight * factor * self.regularizer(box, boxes)
        return loss
