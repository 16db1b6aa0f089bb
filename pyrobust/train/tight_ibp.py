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

import torch
from torch import Tensor, nn

from pyrobust._checks import check_at_least, check_open_unit, check_positive, check_unit
from pyrobust.certify.bound import bound, margin_specification
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
        total = inside.new_zeros(())
        for box in boxes:
            radius = (box.upper - box.lower).mean() / 2
            balance = self._balance(box)
            # Left out where it costs nothing: the slope of the quotient overflows at radius 0.
            if bool(inside < self.tol * radius):
                total = total + (self.tol - inside / radius) / self.tol
            if bool(torch.isfinite(balance)):
                total = total + balance
        return total / max(len(boxes), 1)

    def _balance(self, box: Interval) -> Tensor:
        centre = (box.upper + box.lower) / 2
        active, dead = _moments(centre, box.lower > 0), _moments(centre, box.upper < 0)
        if active is None or dead is None:
            return centre.new_zeros(())
        pairs = ((active[0], -dead[0]), (active[1], dead[1]))
        # min / max, not min(a / b, b / a): its slope is finite where one of the two is 0.
        terms = [self.tol - torch.minimum(a, b) / torch.maximum(a, b) for a, b in pairs]
        return (terms[0].clamp_min(0) + terms[1].clamp_min(0)) / self.tol


def _moments(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and variance of the chosen entries; None where none is chosen."""
    count = int(chosen.sum())
    if count == 0:
        return None
    # Products with the mask: gathering entries and scattering their gradients takes longer.
    x, mask = x.flatten(), chosen.flatten().to(x.dtype)
    mean = torch.dot(mask, x) / count
    apart = (x - mean) * mask
    return mean, torch.dot(apart, apart) / count


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
        with torch.no_grad():
            classes = int((model(x[:1]) if clean is None else clean).shape[-1])
        box = Interval.ball(x, eps, clamp=self.clamp, rounding="nearest")
        boxes: list[Interval] = []
        handles = [
            module.register_forward_pre_hook(lambda m, inputs: boxes.append(inputs[0]))
            for module in model.modules()
            if isinstance(module, nn.ReLU)
        ]
        try:
            margins = bound(model, box, margin_specification(labels, classes))
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
