"""Log-sum-exp of elements or of all others, and its planes: what softmax is made of.

A softmax is ``sigmoid(x_i - L_i)`` with ``L_i = log sum_{j != i} exp x_j``, and its logarithm is
``logsigmoid`` of the same number. So it needs planes of ``L`` only: the argument of the sigmoid is
exact in ``x_i``, and the lines of the sigmoid bend once. ``L`` is convex. Below it lies the tangent
in the middle of the box. Above it lies the tangent of the logarithm over the sum of the chords of
the exponentials.

A coefficient of ``L_i`` reaches all ``x_j`` but ``x_i``. Sums over the others are taken from both
sides, so nothing cancels and the work is linear in the number of elements.

Source: D. Wei et al., "Convex Bounds on the Softmax Function with Applications to Robustness
Verification", AISTATS 2023, arXiv 2303.01713 (chords of exponentials inside the logarithm, tangents
of the log-sum-exp).
Departures: the source bounds all of the softmax by one exponential, the element's own among the
chords; here its own is exact and the sigmoid takes the place of the exponential.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrobust.certify.relaxation.planes import Ends, Planes, Pulled, dot, open_elements
from pyrobust.interval.operands import working
from pyrobust.interval.outward import bound_of_roundings, enclose
from pyrobust.interval.type import Interval, wrap

__all__ = ["LogSum", "log_sum_of_others"]

# Exponents further below the largest one count as this far below.
_DEPTH = {torch.float32: 60.0, torch.float64: 600.0}


def log_sum_of_others(x: Any, dim: int, keep: Tensor | None = None) -> Any:
    """``log sum_{j != i} exp x_j`` along ``dim``, for tensors and Intervals.

    Args:
        x: at least one element besides ``i`` is kept, else the result is 0.
        dim: along which to sum.
        keep: bool, broadcast with ``x``; the elements that count.
    """
    if not isinstance(x, Interval):
        return _log_of_others(x, dim, keep)
    low, high = working(x)
    lower, upper = _log_of_others(low, dim, keep), _log_of_others(high, dim, keep)
    if x.rounding == "nearest":
        return wrap(lower, upper, x.rounding)
    with torch.no_grad():
        reach = 1 + torch.maximum(low.abs(), high.abs()).amax(dim, keepdim=True)
        error = 8 * bound_of_roundings(x.shape[dim] + 16, torch.float64) * reach
    return wrap(*enclose(lower, upper, error, x.dtype), x.rounding)


def _log_of_others(x: Tensor, dim: int, keep: Tensor | None) -> Tensor:
    counted = x if keep is None else torch.where(keep, x, -torch.inf)
    before = _shifted(counted.logcumsumexp(dim), dim, -torch.inf)
    behind = _shifted(counted.flip(dim).logcumsumexp(dim), dim, -torch.inf).flip(dim)
    ones = torch.ones_like(x.detach())
    some = _sum_of_others(ones if keep is None else ones * keep, dim) > 0
    return torch.where(some, torch.logaddexp(torch.where(some, before, 0.0), behind), 0.0)


def _shifted(x: Tensor, dim: int, first: float) -> Tensor:
    """Moved by one along ``dim``, with ``first`` at the start."""
    border = torch.full_like(x.narrow(dim, 0, 1), first)
    return torch.cat([border, x.narrow(dim, 0, x.shape[dim] - 1)], dim)


def _sum_of_others(x: Tensor, dim: int) -> Tensor:
    before = _shifted(x.cumsum(dim), dim, 0.0)
    return before + _shifted(x.flip(dim).cumsum(dim), dim, 0.0).flip(dim)


class LogSum:
    """The log-sum-exp of all elements, or for each of all others.

    Attributes:
        dim: along which, not the batch.
        others: whether the element itself is left out; else the sum keeps its axis.
        keep: bool, the elements that count, or None.
    """

    def __init__(self, dim: int, others: bool, keep: Tensor | None = None):
        self.dim, self.others, self.keep = dim, others, keep

    def undecided(self, boxes: list[Ends]) -> list[Tensor]:
        """Every element counts."""
        return [open_elements(boxes[0])]

    def planes(self, boxes: list[Ends], sound: bool) -> Planes:
        """Tangents below and above."""
        return _LogSumPlanes(boxes[0], self, sound)


class _LogSumPlanes:
    """``shift + sum_j slope_j x_j / scale_i`` on either side, ``j`` over what ``i`` sums."""

    def __init__(self, box: Ends, kind: LogSum, sound: bool):
        self.kind = kind
        low, high = box
        self.axis = kind.dim % low.ndim
        self.terms = 4 * low.shape[self.axis] + 64
        self.depth = _DEPTH[low.dtype]
        with torch.no_grad():
            # a tangent at any point is valid, so the point may be moved up and carries no gradient
            keep = self._kept(torch.ones_like(low))
            top = torch.where(keep > 0, high, -torch.inf).amax(self.axis, keepdim=True)
            top = torch.where(torch.isfinite(top), top, 0.0)
            self.some = self._sum(keep) > 0
        self.below = self._tangent((low + high) / 2, top, keep)
        self.above = self._chords(low, high, top, keep)
        self.reach = self._reach(box, top) if sound else None
        if sound:
            self._widen()

    def _kept(self, ones: Tensor) -> Tensor:
        return ones if self.kind.keep is None else ones * self.kind.keep

    def _sum(self, values: Tensor) -> Tensor:
        if self.kind.others:
            return _sum_of_others(values, self.axis)
        return values.sum(self.axis, keepdim=True)

    def _none(self, values: Tensor, instead: float) -> Tensor:
        return torch.where(self.some, values, instead)

    def _tangent(self, at: Tensor, top: Tensor, keep: Tensor) -> list[Tensor]:
        """``[slope, scale, shift]``; the weights ``slope_j / scale_i`` sum to 1 over ``j``."""
        depth = torch.maximum(at - top, at.new_full((), -self.depth))
        slope = keep * torch.exp(depth)
        scale = self._none(self._sum(slope), 1.0)
        mean = self._sum(slope * (top + depth)) / scale
        return [slope, scale, self._none(top + torch.log(scale) - mean, 0.0)]

    def _chords(self, low: Tensor, high: Tensor, top: Tensor, keep: Tensor) -> list[Tensor]:
        first, last = torch.exp(low - top), torch.exp(high - top)
        width = high - low
        open_ = width > torch.finfo(low.dtype).tiny
        slope = torch.where(open_, (last - first) / torch.where(open_, width, 1.0), 0.0)
        slope = keep * slope
        rest = torch.maximum(first - slope * low, last - slope * high)
        rest = keep * torch.where(open_, rest, last)
        middle = slope * (low + high) / 2 + rest
        least = torch.exp(torch.full((), -self.depth, dtype=low.dtype))
        scale = self._none(torch.maximum(self._sum(middle), least.to(low.device)), 1.0)
        shift = top + torch.log(scale) + self._sum(rest) / scale - 1
        return [slope, scale, self._none(shift, 0.0)]

    @torch.no_grad()
    def _reach(self, box: Ends, top: Tensor) -> Tensor:
        """Magnitudes of all terms of either plane, and of what their errors depend on."""
        size = torch.maximum(box[0].abs(), box[1].abs())
        widest = 1 + top.abs() + self._kept(size).amax(self.axis, keepdim=True)
        distance = (top - box[0]).clamp(max=self.depth)
        total = 8 * widest
        for slope, scale, shift in (self.below, self.above):
            terms = self._sum(slope * (size + top.abs() + distance)) / scale
            total = total + terms + shift.abs() + torch.log(scale).abs()
        # a chord is at least half as high in the middle as at its upper end, so the errors of the
        # exponentials count at most twice
        return 4 * total

    def _widen(self) -> None:
        """Take what rounding may have done to slopes, scales and shifts off the shifts."""
        assert self.reach is not None
        slack = 16 * bound_of_roundings(self.terms, self.reach.dtype) * self.reach + 1e-300
        self.below[2] = self.below[2] - slack
        self.above[2] = self.above[2] + slack

    def pull(self, a: Tensor, take: Callable[[Tensor], Tensor]) -> Pulled:
        """Sums over the results that an element is part of."""
        axis = self.axis + 1
        value: Tensor = a.new_zeros(1, 1)
        parts = []
        for signed, plane in ((a.clamp(min=0), self.below), (a.clamp(max=0), self.above)):
            slope, scale, shift = (take(v) for v in plane)
            value = value + dot(signed, shift)
            share = torch.where(take(self.some), signed / scale, 0.0)
            if self.kind.others:
                share = _sum_of_others(share, axis)
            parts.append(slope * share)
        reach = None if self.reach is None else dot(a.detach().abs(), take(self.reach))
        return Pulled([parts[0] + parts[1]], value, reach)
