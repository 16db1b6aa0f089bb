"""Lines above and below a function of one number on an interval.

For any slope ``k`` the best line above ``f`` on ``[l, u]`` has the intercept ``max (f(x) - k x)``.
The maximum lies at an end, at a kink, or where ``f'(x) = k``; between kinks and inflections ``f'``
is monotone, so each such piece holds at most one root, found by bisection. So every slope gives a
valid line: slopes can be chosen for tightness, optimised, or learned, and validity never depends
on the choice.

In the sound modes values of ``f`` are enclosed outward, and the intercept moves by what bisection
and rounding can have missed: at a root known to a width ``w`` the value differs from the extremum
by at most ``max |f''| w^2 / 2``.

Source: H. Zhang et al., "Efficient Neural Network Robustness Certification with General Activation
Functions", NeurIPS 2018, arXiv 1811.00866 (lines and slopes).
Departures: parallel and tangent lines are cases of one search over slopes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrobust.interval.finite import infinite_ends
from pyrobust.interval.outward import UNIT
from pyrobust.interval.type import Interval, wrap

__all__ = ["Bend", "Lines", "best_lines", "inside", "lines_for"]

_HALVINGS = 48


@dataclass(frozen=True)
class Bend:
    """How a function bends.

    Attributes:
        function: the torch function, called on tensors and on Intervals.
        slope: its derivative, away from kinks.
        borders: increasing points between which the derivative is monotone; kinks among them.
            Numbers, or tensors that broadcast with the input.
        curvature: largest ``|f''|`` away from kinks, a number or a function of the ends; 0 for
            piecewise linear functions.
        slack: absolute error of ``function`` against the function meant, if any.
        lines: the best lines in closed form on finite boxes, where there is one.
        rays: whether every line through 0 with a slope between those of the pieces lies below, and
            the chord is the best line above.
    """

    function: Callable[..., object]
    slope: Callable[[Tensor], Tensor]
    borders: tuple[float | Tensor, ...] = ()
    curvature: float | Callable[[Tensor, Tensor], Tensor] = 0.0
    slack: float = 0.0
    lines: Callable[[Tensor, Tensor, bool], Lines] | None = None
    rays: bool = False

    @property
    def curved(self) -> bool:
        """Whether it bends between kinks."""
        return callable(self.curvature) or self.curvature > 0

    def curvature_over(self, low: Tensor, high: Tensor) -> Tensor:
        """The largest ``|f''|`` over boxes."""
        if callable(self.curvature):
            return self.curvature(low, high)
        return torch.full_like(low, self.curvature)


@dataclass
class Lines:
    """``lower_slope x + lower_shift <= f(x) <= upper_slope x + upper_shift`` on the box.

    Shapes are those of the box, or ``(S, *box)`` with a line for each of ``S`` specifications.
    """

    lower_slope: Tensor
    lower_shift: Tensor
    upper_slope: Tensor
    upper_shift: Tensor


def best_lines(bend: Bend, low: Tensor, high: Tensor, sound: bool) -> Lines:
    """The tightest lines among the slopes at the ends, at points between, and of the chord.

    The tightest line has the highest (lower line) or lowest (upper line) value in the middle.

    Args:
        bend: the function.
        low: lower ends, float32 or float64, any shape.
        high: upper ends, ``>= low``.
        sound: round outward.
    """
    if bend.lines is not None and bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        return bend.lines(low, high, sound)
    with torch.no_grad():
        slopes = _candidates(bend, low, high)
        middle = low.detach() / 2 + high.detach() / 2
        shifts = [_shifts(bend, low.detach(), high.detach(), k, sound) for k in slopes]
        lower = torch.stack([k * middle + s[0] for k, s in zip(slopes, shifts, strict=True)])
        upper = torch.stack([k * middle + s[1] for k, s in zip(slopes, shifts, strict=True)])
        stacked = torch.stack(slopes)
        down = stacked.gather(0, lower.argmax(0, keepdim=True))[0]
        up = stacked.gather(0, upper.argmin(0, keepdim=True))[0]
    chord = _chord(bend, low, high)
    # a chord's slope moves with the ends, which matters to training
    down = torch.where(down == chord.detach(), chord, down)
    up = torch.where(up == chord.detach(), chord, up)
    return lines_for(bend, low, high, down, up, sound)


def lines_for(
    bend: Bend, low: Tensor, high: Tensor, lower_slope: Tensor, upper_slope: Tensor, sound: bool
) -> Lines:
    """The lines of given slopes; slopes may carry leading axes of their own."""
    lower = _shifts(bend, low, high, lower_slope, sound)[0]
    upper = _shifts(bend, low, high, upper_slope, sound)[1]
    bounded = torch.isfinite(low) & torch.isfinite(high)
    if callable(bend.curvature):  # flat where it is infinite, as of a root at 0
        with torch.no_grad():
            bounded &= torch.isfinite(bend.curvature(low, high))
    if not bool(bounded.all()):
        flat = _image(bend, low, high)
        lower = torch.where(bounded, lower, flat[0])
        upper = torch.where(bounded, upper, flat[1])
        lower_slope = torch.where(bounded, lower_slope, 0.0)
        upper_slope = torch.where(bounded, upper_slope, 0.0)
    return Lines(lower_slope, lower, upper_slope, upper)


def _image(bend: Bend, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    with infinite_ends():  # of a box without end, or of a logarithm's at 0
        box = bend.function(wrap(low, high, "real"))
    assert isinstance(box, Interval)
    return box.lower, box.upper


def _candidates(bend: Bend, low: Tensor, high: Tensor) -> list[Tensor]:
    low, high = low.detach(), high.detach()
    slopes = [_chord(bend, low, high), bend.slope(low), bend.slope(high)]
    if bend.curved:
        slopes += [bend.slope(low + share * (high - low)) for share in (0.25, 0.5, 0.75)]
    return [torch.where(torch.isfinite(slope), slope, 0.0) for slope in slopes]


def _chord(bend: Bend, low: Tensor, high: Tensor) -> Tensor:
    width = high - low
    first, last = bend.function(low), bend.function(high)
    assert isinstance(first, Tensor)
    assert isinstance(last, Tensor)
    safe = torch.where(width > 0, width, 1.0)
    return torch.where(width > 0, (last - first) / safe, bend.slope(low.detach()))


def _shifts(
    bend: Bend, low: Tensor, high: Tensor, slope: Tensor, sound: bool
) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of ``f(x) - slope x`` over the box, pushed outward where sound."""
    # borders first: at a tie, as of a ReLU with slope 0 or 1, theirs is the derivative that counts
    points = [*(inside(border, low, high) for border in bend.borders), low, high]
    if bend.curved:
        points += _roots(bend, low.detach(), high.detach(), slope.detach())
    lowest, highest = [], []
    for point in points:
        below, above = _values(bend, point, sound)
        reach = slope * point
        error = 4 * UNIT[low.dtype] * (reach.abs() + below.abs()) if sound else 0.0
        lowest.append(below - reach - error)
        highest.append(above - reach + error)
    stacked = torch.stack(torch.broadcast_tensors(*lowest))
    least = stacked.gather(0, stacked.detach().argmin(0, keepdim=True))[0]
    stacked = torch.stack(torch.broadcast_tensors(*highest))
    most = stacked.gather(0, stacked.detach().argmax(0, keepdim=True))[0]
    if not sound:
        return least, most
    missed = _missed(bend, low, high)
    return least - missed, most + missed


def _missed(bend: Bend, low: Tensor, high: Tensor) -> Tensor:
    """What bisection may miss: its last width, and the rounding of ``f'`` over the box."""
    width = (high - low).detach()
    last = width * 2.0**-_HALVINGS + 4 * UNIT[low.dtype] * torch.maximum(low.abs(), high.abs())
    if not bend.curved:
        return 0.0 * width + bend.slack + 1e-300
    steep = torch.maximum(bend.slope(low).abs(), bend.slope(high).abs()).clamp(min=1.0)
    rounding = 32 * UNIT[low.dtype] * width * steep
    return (bend.curvature_over(low, high) * last * last + rounding).detach() + bend.slack + 1e-300


def _values(bend: Bend, point: Tensor, sound: bool) -> tuple[Tensor, Tensor]:
    value = bend.function(point)
    assert isinstance(value, Tensor)
    if not sound:
        return value, value
    # 1 lies in the domain of every function; what it gives there is not used
    finite = torch.where(torch.isfinite(point), point, 1.0).detach()
    below, above = _image(bend, finite, finite)
    return below, above


def inside(border: float | Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The border, moved to the nearer end where it lies outside."""
    at = torch.as_tensor(border, dtype=low.dtype, device=low.device)
    return torch.minimum(torch.maximum(at.expand_as(low), low), high)


@torch.no_grad()
def _roots(bend: Bend, low: Tensor, high: Tensor, slope: Tensor) -> list[Tensor]:
    """In each piece the point where the derivative passes ``slope``, or one of its ends."""
    edges = [low, *(inside(border, low, high) for border in bend.borders), high]
    found = []
    for ends in itertools.pairwise(edges):
        left, right, wanted = torch.broadcast_tensors(*ends, slope)
        # one-sided derivatives at kinks: look a little inside the piece
        rising = bend.slope(right - 1e-3 * (right - left)) > bend.slope(
            left + 1e-3 * (right - left)
        )
        for _ in range(_HALVINGS):
            middle = left / 2 + right / 2
            go_right = (bend.slope(middle) < wanted) == rising
            left, right = torch.where(go_right, middle, left), torch.where(go_right, right, middle)
        found.append(left / 2 + right / 2)
    return found
