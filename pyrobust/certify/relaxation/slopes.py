"""Bounds whose lines have the best slopes that gradient steps find, for each function by itself.

Each function of a value is bounded with slopes of its own, in each image and, for neurons of a
convolution, in the window that it depends on. Slopes are free numbers, since every slope has a
valid line; the first ones are those of the fixed lines, and the best ones seen are kept, so that a
bound is never below that of the fixed lines (up to rounding).

Source: K. Xu et al., "Fast and Complete: Enabling Complete Verification with Rapid and Massively
Parallel Incomplete Verifiers", ICLR 2021, arXiv 2011.13824, section 3.2.
Departures: none known in what is optimised for one function; see
:mod:`pyrobust.certify.relaxation.crown` for the order of functions.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from pyrobust.certify.relaxation.backward import Problem, lower_bounds
from pyrobust.certify.relaxation.frames import WHOLE, Frame, Part, cleaned, spread
from pyrobust.certify.relaxation.graph import Step
from pyrobust.certify.relaxation.lines import Bend, Lines, inside, lines_for

__all__ = ["Search", "best_bounds"]

# What the steps are shortened by each time, and those of curves against those of pieces: measured
# on ReLU, tanh and sigmoid networks at 20 steps.
_DECAY = 0.97
_CURVED = 0.1


@dataclass(frozen=True)
class Search:
    """Steps of Adam, at least 1, and the length of the first one, in ranges of the slopes."""

    iterations: int
    learning_rate: float


def best_bounds(
    problem: Problem, start: fx.Node, coefficients: Tensor, search: Search, frame: Frame = WHOLE
) -> Tensor:
    """``(S, b)`` lower bounds as of :func:`lower_bounds`, with the slopes that a search finds.

    Args:
        problem: the model and its intervals.
        start: whose value the functions are of.
        coefficients: ``(S, 1 or b, *value)``, or of windows of the value.
        search: how long.
        frame: the images, and the windows, that the coefficients are of.
    """
    slopes = _Slopes(problem, len(coefficients), frame)
    steps = [_without_gradients(step) for step in problem.steps]
    relaxed = Problem(steps, problem.boxes, {}, False, planes=problem.planes)
    rows, best = coefficients.detach(), None
    optimizer: torch.optim.Adam | None = None
    for _ in range(search.iterations):
        with torch.enable_grad():
            values = lower_bounds(relaxed, start, rows, slopes, frame)
            leaves = slopes.leaves()
            if not leaves:
                break
            gradients = torch.autograd.grad(-values.sum(), leaves, allow_unused=True)
        values = values.detach().nan_to_num(-torch.inf, torch.inf, -torch.inf)
        slopes.keep(None if best is None else values > best)
        best = values if best is None else torch.maximum(best, values)
        optimizer = optimizer or torch.optim.Adam(slopes.groups(search.learning_rate))
        for leaf, gradient in zip(leaves, gradients, strict=True):
            # where a line has no finite slope the place stays
            leaf.grad = None if gradient is None else gradient.nan_to_num(0.0, 0.0, 0.0)
        optimizer.step()
        slopes.limit()
        for group in optimizer.param_groups:
            group["lr"] *= _DECAY
    if best is not None and not problem.sound and not torch.is_grad_enabled():
        return best
    slopes.finish(problem.sound)
    # without the fixed lines, by which units that are off would be left out
    found = lower_bounds(replace(problem, lines={}), start, coefficients, slopes, frame)
    # Sums that met both infinities say nothing.
    return torch.where(found.isnan(), -torch.inf, found)


def _without_gradients(step: Step) -> Step:
    """The step with constant weights: only slopes are optimised."""
    affine = step.affine
    if affine is None or affine.weight is None:
        return step
    return replace(step, affine=replace(affine, weight=affine.weight.detach()))


@dataclass
class _Bent:
    """The slopes at one operation: ``first + width * place``.

    Attributes:
        low: ``(b, *part)`` or ``(1, *part)`` ends of what it bends, like all but the places.
        high: upper ends.
        fixed: its lines without a search.
        least: the smallest derivative in the box; a smaller slope is never better.
        most: the largest one.
        places: ``(S, b, *part)``, of the lower line and, unless the chord is best, the upper one.
        kept: the best ones.
    """

    low: Tensor
    high: Tensor
    fixed: Lines
    least: Tensor
    most: Tensor
    places: list[Tensor]
    kept: list[Tensor]

    @property
    def first(self) -> list[Tensor]:
        """The slopes without a search."""
        return [self.fixed.lower_slope, self.fixed.upper_slope][: len(self.places)]

    def slopes(self, final: bool) -> list[Tensor]:
        """The present ones, or the best."""
        width = self.most - self.least
        places = self.kept if final else self.places
        slopes = [torch.addcmul(k, width, at) for k, at in zip(self.first, places, strict=True)]
        # rounding may have left the range, outside which not every line is valid
        return [k.clamp(self.least, self.most) for k in slopes] if final else slopes

    def limit(self) -> None:
        """Keep the slopes between the derivatives."""
        width = self.most - self.least
        safe = torch.where(width > 0, width, 1.0)
        for k, at in zip(self.first, self.places, strict=True):
            at.clamp_((self.least - k) / safe, (self.most - k) / safe)


class _Slopes:
    """The lines of each function; they come to be where a backward pass first meets a bend."""

    def __init__(self, problem: Problem, rows: int, frame: Frame) -> None:
        self._problem, self._rows = problem, rows
        batch = len(next(iter(problem.boxes.values())).lower)
        self._places = frame.count(batch)
        # passes cut at planes may meet a value in other windows
        self._whole = bool(problem.planes) or any(step.closed for step in problem.steps)
        self._bent: dict[fx.Node, _Bent] = {}
        steps = problem.steps
        self._curved = {s.node: s.bend.curved for s in steps if s.bend is not None}
        self._sound, self._final = False, False

    def of(self, step: Step, part: Part) -> tuple[Part, Lines]:
        """The coefficients behind a bend, 0 beyond borders, and their lines."""
        shape = self._problem.shape(step.node)
        part = spread(part, shape) if self._whole else cleaned(part, shape)
        bent = self._bent.get(step.node)
        if bent is None:
            bent = self._bent[step.node] = self._first(step, part)
        slopes = bent.slopes(self._final)
        assert step.bend is not None
        if step.bend.rays:  # the chord above; below, every line of these slopes through 0
            fixed = bent.fixed
            zero = torch.zeros_like(slopes[0])
            above = (k.expand_as(zero) for k in (fixed.upper_slope, fixed.upper_shift))
            return part, Lines(slopes[0], zero, *above)
        return part, lines_for(step.bend, bent.low, bent.high, slopes[0], slopes[1], self._sound)

    def _first(self, step: Step, part: Part) -> _Bent:
        problem, bend, size = self._problem, step.bend, part.a.shape[3:]
        assert bend is not None
        box, lines = problem.boxes[step.inputs[0]], problem.lines[step.node]
        four = (lines.lower_slope, lines.lower_shift, lines.upper_slope, lines.upper_shift)
        ends = (box.lower, box.upper)
        # Beyond borders coefficients are 0, and a box of 0 may be none of the function's.
        taken = [part.frame.take(v.detach(), size, "replicate") for v in (*four, *ends)]
        fixed, (low, high) = Lines(*taken[:4]), taken[4:]
        shape = (self._rows, self._places, *part.a.shape[2:])
        count = 1 if bend.rays else 2
        least, most = _derivatives(bend, low, high)
        for slope in (fixed.lower_slope, fixed.upper_slope)[:count]:
            least, most = torch.minimum(least, slope), torch.maximum(most, slope)
        places = [low.new_zeros(shape, requires_grad=True) for _ in range(count)]
        return _Bent(low, high, fixed, least, most, places, [at.detach() for at in places])

    def leaves(self) -> list[Tensor]:
        """What to optimise."""
        return [at for bent in self._bent.values() for at in bent.places]

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """The same for an optimiser: steps of curves are shorter than those of pieces."""
        return [
            {"params": bent.places, "lr": rate * (_CURVED if self._curved[node] else 1.0)}
            for node, bent in self._bent.items()
        ]

    @torch.no_grad()
    def keep(self, better: Tensor | None) -> None:
        """Note the slopes where they are ``better``, ``(S, b)``; None: all."""
        for bent in self._bent.values():
            for i, current in enumerate(bent.places):
                if better is None:
                    bent.kept[i] = current.detach().clone()
                    continue
                mask = better.reshape(*better.shape, *[1] * (current.ndim - 2))
                bent.kept[i] = torch.where(mask, current, bent.kept[i])

    @torch.no_grad()
    def limit(self) -> None:
        """Keep all slopes between the derivatives."""
        for bent in self._bent.values():
            bent.limit()

    def finish(self, sound: bool) -> None:
        """Give the best slopes from now on, their lines rounded outward where ``sound``."""
        self._final, self._sound = True, sound


def _derivatives(bend: Bend, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest derivative over boxes, at borders and between them; equal ones
    where a box is infinite or a derivative is.
    """
    edges = [low, *(inside(border, low, high) for border in bend.borders), high]
    points = [*edges, *(a / 2 + b / 2 for a, b in itertools.pairwise(edges))]
    found = torch.stack([bend.slope(point) for point in points])
    bounded = torch.isfinite(low) & torch.isfinite(high) & torch.isfinite(found).all(0)
    least, most = found.amin(0), found.amax(0)
    any_slope = torch.full_like(least, torch.inf)
    return torch.where(bounded, least, any_slope), torch.where(bounded, most, -any_slope)
