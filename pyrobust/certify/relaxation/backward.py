"""Lower bounds of linear functions of a value, pulled back to the input operation by operation.

A function ``sum A y`` of a value is replaced by one of the values before it: exactly through affine
operations, through the lower line where a coefficient is positive and the upper line where it is
negative, and by the interval's ends at cuts and at the input.

Rounding. Coefficients are rounded as they are computed, so each step leaves a residual: the pulled
coefficients times the old point differ from the old function by at most ``gamma_n sum |A| T``,
where ``T`` bounds the sum of the magnitudes of all terms of the value over the box (``reach``) and
``n`` the operations that met in one number. In sound mode these residuals are summed and taken off
the bound; they need no second pass with the magnitudes of the weights.

Source: H. Zhang et al., "Efficient Neural Network Robustness Certification with General Activation
Functions", NeurIPS 2018, arXiv 1811.00866, section 3 (CROWN); K. Xu et al., "Automatic Perturbation
Analysis for Scalable Certified Robustness and Beyond", NeurIPS 2020, arXiv 2002.12920 (graphs).
Departures: the rounding residuals, which the sources leave out.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, fx

from pyrobust.certify.relaxation.convolution import pull_convolution
from pyrobust.certify.relaxation.frames import (
    WHOLE,
    Frame,
    Part,
    cleaned,
    joined,
    spread,
)
from pyrobust.certify.relaxation.gradients import bend, bend_and_pull, pull
from pyrobust.certify.relaxation.graph import Affine, Step
from pyrobust.certify.relaxation.lines import Lines
from pyrobust.certify.relaxation.problem import Box, Problem, layer_of, numbers_of, offset_of
from pyrobust.interval.outward import bound_of_roundings
from pyrobust.ops._dense_product import product

__all__ = ["Box", "OwnLines", "Problem", "lower_bounds", "offset_of"]


class OwnLines(Protocol):
    """Lines that each function has for itself."""

    def of(self, step: Step, part: Part) -> tuple[Part, Lines]:
        """Coefficients behind a bend, 0 beyond borders, and ``(S, b, *part)`` lines."""


LinesOf = dict[fx.Node, Lines] | OwnLines


def lower_bounds(
    problem: Problem,
    start: fx.Node,
    coefficients: Tensor,
    lines: LinesOf,
    frame: Frame = WHOLE,
) -> Tensor:
    """``(S, b)`` lower bounds over the input box of ``coefficients * value``, summed.

    Args:
        problem: the model and its intervals.
        start: whose value the function is of.
        coefficients: ``(S, 1 or b, *value)``, or of windows of the value.
        lines: to use; :attr:`Problem.lines`, or lines that each function has for itself.
        frame: the images, and the windows, that the coefficients are of.
    """
    total, joint = _pulled_back(problem, start, coefficients, lines, frame, cut=False)
    if not joint:
        return total
    # planes can be looser than the interval of the value that they bound
    at_intervals, _ = _pulled_back(problem, start, coefficients, lines, frame, cut=True)
    return torch.maximum(total, at_intervals)


def _pulled_back(
    problem: Problem,
    start: fx.Node,
    coefficients: Tensor,
    lines: LinesOf,
    frame: Frame,
    *,
    cut: bool,
) -> tuple[Tensor, bool]:
    """Bounds, and whether planes or operations written out were met; ``cut`` stops at those."""
    pending = {start: Part(coefficients, frame, clean=frame.window is None)}
    total = coefficients.new_zeros(1, 1)
    joint = False
    for step in reversed(problem.steps):
        part = pending.pop(step.node, None)
        if part is None:
            continue
        part = _fitted(problem, step, part)
        several = step.planes is not None or step.closed
        joint |= several
        if several and cut:
            total = total + _concretise(problem, step.node, part)
        elif step.affine is not None:
            total = total + _affine(problem, step, part, pending)
        elif step.bend is not None:
            total = total + _bend(problem, step, part, pending, lines)
        elif step.planes is not None:
            total = total + _planes(problem, step, part, pending)
        else:
            total = total + _concretise(problem, step.node, part)
        if not pending:
            break
    return total, joint


def _fitted(problem: Problem, step: Step, part: Part) -> Part:
    """The part, of whole values where the step has no windows or they are no smaller."""
    window = part.frame.window
    if window is None:
        return part
    shape = problem.shape(step.node)
    affine = step.affine
    serves = affine is None or affine.options is not None or affine.local
    serves = serves and step.planes is None
    if not serves or part.a.shape[-2:].numel() >= shape[1:].numel():
        part = spread(part, shape)
    return part if affine is None else cleaned(part, shape)


def _concretise(problem: Problem, node: fx.Node, part: Part) -> Tensor:
    box, a = problem.boxes[node], part.a
    low, high = (part.frame.take(end, a.shape[3:]) for end in (box.lower, box.upper))
    centre, radius = (low + high) / 2, (high - low) / 2
    if not problem.sound:
        return _sum(a, centre) - _sum(a.abs(), radius)
    # |a| meets radius and residual in one product
    with torch.no_grad():
        share = 4 * bound_of_roundings(8 + len(problem.steps) + a[0, 0].numel(), a.dtype)
        size = torch.maximum(low.abs(), high.abs())
    return _sum(a, centre) - _sum(a.abs(), radius + share * size) - 1e-300


def _sum(a: Tensor, values: Tensor) -> Tensor:
    """``(S, b, ...)`` times ``(B, ...)``, summed to ``(S, B)``; values of channels count once."""
    if a.ndim > 3 and values.shape[2:].numel() == 1:
        a = a.flatten(3).sum(3)
    flat, points = a.flatten(2), values.flatten(1)
    if flat.shape[1] == 1 and points.shape[0] != 1:
        return flat[:, 0] @ points.mT
    return torch.einsum("sbn,bn->sb", flat, points.expand(flat.shape[1], -1))


def _residual(problem: Problem, part: Part, reach: Tensor) -> Tensor | float:
    """``gamma sum |A| T``: what rounding can have cost in a step."""
    if not problem.sound:
        return 0.0
    a = part.a
    with torch.no_grad():
        count = 8 + len(problem.steps) + 3 * a[0, 0].numel()
        reach = part.frame.take(reach, a.shape[3:])
        # 4: the residual itself is computed in floating point
        return _sum(a.abs(), reach) * (4 * bound_of_roundings(count, a.dtype)) + 1e-300


def _affine(problem: Problem, step: Step, part: Part, pending: dict[fx.Node, Part]) -> Tensor:
    a = part.a
    layer = layer_of(problem, step) if _trained(problem, part) else None
    if layer is not None:
        pulled, raised = pull(a, *numbers_of(problem, step), layer)
        _put(problem, pending, step, Part(pulled, part.frame))
        return raised
    value: Any = a.new_zeros(1, 1)
    offset = offset_of(problem, step)
    if offset is not None:
        value = _sum(a, part.frame.take(offset, a.shape[3:]))
    value = value - _residual(problem, part, _reach(problem, step))
    _put(problem, pending, step, *_pull(problem, step, part))
    result: Tensor = value
    return result


def _trained(problem: Problem, part: Part) -> bool:
    """Whether products are differentiated, of whole values and without rounding residuals."""
    return torch.is_grad_enabled() and not problem.sound and part.frame.window is None


def _put(problem: Problem, pending: dict[fx.Node, Part], step: Step, *parts: Part) -> None:
    """Add the coefficients of a step's inputs to those of other paths."""
    for node, part in zip(step.inputs, parts, strict=True):
        before = pending.get(node)
        pending[node] = part if before is None else joined(before, part, problem.shape(node))


@torch.no_grad()
def _reach(problem: Problem, step: Step) -> Tensor:
    assert step.affine is not None
    if not problem.sound:
        return torch.zeros(())
    if step.node not in problem.reaches:
        sizes = [problem.boxes[n].magnitude for n in step.inputs]
        problem.reaches[step.node] = step.affine.reach(*sizes) * (1 + 1e-9)
    return problem.reaches[step.node]


def _pull(problem: Problem, step: Step, part: Part) -> list[Part]:
    """The coefficients of the step's inputs."""
    affine, a, frame = step.affine, part.a, part.frame
    assert affine is not None
    if affine.options is not None:
        return [_through_convolution(problem, step, part, affine)]
    if affine.weight is not None:
        return [Part(_through_weight(problem, step, part, affine.weight), frame)]
    if affine.pull is not None:
        pulls = affine.pull(a, problem.shape(step.inputs[0]))
        return [Part(pulled, frame) for pulled in pulls]
    count = frame.count(len(problem.boxes[step.inputs[0]].lower))
    points = [a.new_zeros(count, *problem.shape(n)) for n in step.inputs]
    pull = torch.func.vjp(affine.apply, *points)[1]
    wide = a.expand(-1, count, *a.shape[2:])
    return [Part(pulled, frame) for pulled in torch.func.vmap(pull)(wide)]


def _through_convolution(problem: Problem, step: Step, part: Part, affine: Affine) -> Part:
    a, window, options = part.a, part.frame.window, affine.options
    assert affine.weight is not None
    assert options is not None
    frame, size = part.frame, list(problem.shape(step.inputs[0])[1:])
    if window is not None:
        frame = Frame(frame.images, window.before(options["stride"], options["padding"]))
        taps = zip(options["stride"], options["dilation"], affine.weight.shape[2:], strict=True)
        size = [
            (n - 1) * s + d * (k - 1) + 1 for n, (s, d, k) in zip(a.shape[3:], taps, strict=True)
        ]
        options = {**options, "padding": (0, 0)}
    pulled = pull_convolution(a.flatten(0, 1), affine.weight, options, size)
    return Part(pulled.reshape(*a.shape[:2], *pulled.shape[1:]), frame, clean=window is None)


def _through_weight(problem: Problem, step: Step, part: Part, weight: Tensor) -> Tensor:
    """``a @ weight`` without the rows that meet zeros and the columns nobody will read.

    A ReLU that is off all over the box has coefficients 0 behind it and leaves those before it
    unread. About half of the units of a network are off for an image, which saves half of the
    product on either side. Left out where gradients are wanted.
    """
    a = part.a
    small = a.shape[0] * a.shape[1] < 4 * len(weight) // 64
    if a.shape[1] != 1 or a.ndim != 3 or small or torch.is_grad_enabled():
        return _rows_times(a, weight)
    read = _read_elements(problem, step.inputs[0], part.frame)
    used = (a != 0).flatten(0, 1).any(0).nonzero()[:, 0]
    if len(used) < 0.8 * len(weight):
        a, weight = a.index_select(2, used), weight.index_select(0, used)
    if read is None:
        return _rows_times(a, weight)
    whole = a.new_zeros(*a.shape[:2], weight.shape[1])
    return whole.index_copy_(2, read, _rows_times(a, weight.index_select(1, read)))


def _rows_times(a: Tensor, weight: Tensor) -> Tensor:
    return product(a.flatten(0, -2), weight).view(*a.shape[:-1], -1)


def _read_elements(problem: Problem, node: fx.Node, frame: Frame) -> Tensor | None:
    """Indices of the elements of an activation with a slope in some image; None for most."""
    lines = problem.lines.get(node)
    if lines is None or lines.lower_slope.ndim != 2:
        return None
    lines = _met(lines, Part(lines.lower_slope.unsqueeze(0), frame))
    slopes = (lines.lower_slope != 0) | (lines.upper_slope != 0)
    shifts = (lines.lower_shift != 0) | (lines.upper_shift != 0)
    read = (slopes | shifts).any(0).nonzero()[:, 0]
    return read if len(read) < 0.8 * slopes.shape[1] else None


def _met(lines: Lines, part: Part) -> Lines:
    """The lines of the elements that the coefficients meet."""
    size, take = part.a.shape[3:], part.frame.take
    return Lines(
        take(lines.lower_slope, size),
        take(lines.lower_shift, size),
        take(lines.upper_slope, size),
        take(lines.upper_shift, size),
    )


def _bend(
    problem: Problem, step: Step, part: Part, pending: dict[fx.Node, Part], lines_of: LinesOf
) -> Tensor:
    own = not isinstance(lines_of, dict)
    if isinstance(lines_of, dict):
        lines = _met(lines_of[step.node], part)
    else:
        part, lines = lines_of.of(step, part)
    a = part.a
    slopes = lines.lower_slope - lines.upper_slope
    if not own and _trained(problem, part) and len(slopes) == a.shape[1]:
        return _trained_bend(problem, step, part, pending, lines)
    # max(a, 0) lower + min(a, 0) upper = a upper + max(a, 0) (lower - upper): one copy less
    above = a.clamp(min=0)
    value = _line_sum(a, lines.upper_shift)
    value = value + _line_sum(above, lines.lower_shift - lines.upper_shift)
    if a.requires_grad or own or slopes.requires_grad:
        pulled = a * lines.upper_slope + above * slopes
    else:
        pulled = above.mul_(slopes) if a.shape[1] == len(slopes) else above * slopes
        pulled.addcmul_(a, lines.upper_slope)
    _put(problem, pending, step, Part(pulled, part.frame))
    if not problem.sound:
        return value
    (node,) = step.inputs
    with torch.no_grad():
        size = part.frame.take(problem.boxes[node].magnitude, a.shape[3:])
        slope = torch.maximum(lines.lower_slope.abs(), lines.upper_slope.abs())
        shift = torch.maximum(lines.lower_shift.abs(), lines.upper_shift.abs())
        count = 16 + len(problem.steps) + a[0, 0].numel()
        share = 4 * bound_of_roundings(count, a.dtype)
        slack = _line_sum(a.abs(), slope * size + shift) * share
    return value - slack - 1e-300


def _planes(problem: Problem, step: Step, part: Part, pending: dict[fx.Node, Part]) -> Tensor:
    a, frame = part.a, part.frame
    planes = problem.planes[step.node]
    pulled = planes.pull(a, lambda values: frame.take(values, a.shape[3:]))
    _put(problem, pending, step, *(Part(some, frame) for some in pulled.parts))
    if not problem.sound or pulled.reach is None:
        return pulled.value
    with torch.no_grad():
        count = 16 + len(problem.steps) + 3 * a[0, 0].numel() + planes.terms
        slack = pulled.reach * (4 * bound_of_roundings(count, a.dtype))
    return pulled.value - slack - 1e-300


def _trained_bend(
    problem: Problem, step: Step, part: Part, pending: dict[fx.Node, Part], lines: Lines
) -> Tensor:
    """The bend, together with the layer before it where nothing else reads that."""
    four = lines.lower_slope, lines.lower_shift, lines.upper_slope, lines.upper_shift
    (node,) = step.inputs
    before = problem.step_of(node)
    layer = layer_of(problem, before) if problem.readers(node) == 1 else None
    if layer is None:
        pulled, value = bend(part.a, *four)
        _put(problem, pending, step, Part(pulled, part.frame))
        return value
    pulled, value = bend_and_pull(part.a, four, *numbers_of(problem, before), layer)
    _put(problem, pending, before, Part(pulled, part.frame))
    return value


def _line_sum(a: Tensor, values: Tensor) -> Tensor:
    """:func:`_sum` where the values may differ by specification, ``(S, B, ...)``."""
    if values.ndim == a.ndim:
        return (a * values).flatten(2).sum(-1)
    return _sum(a, values)
