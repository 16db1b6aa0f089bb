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

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from pyrobust.certify.relaxation.graph import Step
from pyrobust.certify.relaxation.lines import Lines
from pyrobust.interval.outward import bound_of_roundings

__all__ = ["Box", "Problem", "element_bounds", "lower_bounds"]


@dataclass
class Box:
    """Ends ``(B, ...)`` in the working dtype."""

    lower: Tensor
    upper: Tensor

    @property
    def magnitude(self) -> Tensor:
        """The largest magnitude of a point."""
        return torch.maximum(self.lower.abs(), self.upper.abs()).detach()


@dataclass
class Problem:
    """A traced model with the intervals of its values.

    Attributes:
        steps: operations in order, the input first.
        boxes: intervals by node.
        lines: of each bending operation, by its node.
        sound: account for rounding.
        offsets: values of affine operations at 0, filled on demand.
        reaches: sums of magnitudes of affine operations, filled on demand.
        separable: whether every operation can be applied to a part of the batch.
    """

    steps: list[Step]
    boxes: dict[fx.Node, Box]
    lines: dict[fx.Node, Lines]
    sound: bool
    offsets: dict[fx.Node, Tensor | None] = field(default_factory=dict)
    reaches: dict[fx.Node, Tensor] = field(default_factory=dict)
    separable: bool = True

    def of_images(self, images: slice) -> Problem:
        """The same problem for some images of the batch; needs :attr:`separable`."""
        boxes = {n: Box(box.lower[images], box.upper[images]) for n, box in self.boxes.items()}
        lines = {
            n: Lines(
                line.lower_slope[images],
                line.lower_shift[images],
                line.upper_slope[images],
                line.upper_shift[images],
            )
            for n, line in self.lines.items()
        }
        part = Problem(self.steps, boxes, lines, self.sound)
        for step in self.steps:
            if step.affine is None:
                continue
            offset = _offset(self, step)
            shared = offset is None or len(offset) == 1
            part.offsets[step.node] = offset if offset is None or shared else offset[images]
            if self.sound:
                part.reaches[step.node] = _reach(self, step)[images]
        return part


def lower_bounds(
    problem: Problem, start: fx.Node, coefficients: Tensor, lines: dict[fx.Node, Lines]
) -> Tensor:
    """``(S, B)`` lower bounds over the input box of ``coefficients * value``, summed.

    Args:
        problem: the model and its intervals.
        start: whose value the function is of.
        coefficients: ``(S, 1 or B, *value)``.
        lines: to use; :attr:`Problem.lines` or others of the same boxes.
    """
    pending: dict[fx.Node, Tensor] = {start: coefficients}
    total = coefficients.new_zeros(1, 1)
    for step in reversed(problem.steps):
        a = pending.pop(step.node, None)
        if a is None:
            continue
        if step.affine is not None:
            total = total + _affine(problem, step, a, pending)
        elif step.bend is not None:
            total = total + _bend(problem, step, a, pending, lines[step.node])
        else:
            total = total + _concretise(problem, step.node, a)
        if not pending:
            break
    return total


def element_bounds(problem: Problem, node: fx.Node, elements: Tensor) -> Tensor:
    """``(2 P, B)`` lower bounds of some elements of an affine value, then of their negations.

    Both signs share the products up to the first activation, and the rows of a linear layer are
    its weights as they stand, without a product.

    Args:
        problem: the model and its intervals.
        node: the value, the result of an affine step.
        elements: ``(P,)`` indices into the flattened value of an image.
    """
    step = next(s for s in problem.steps if s.node is node)
    shape = problem.boxes[node].lower.shape[1:]
    affine = step.affine
    assert affine is not None
    places = torch.arange(len(elements), device=elements.device)
    if affine.weight is not None and affine.options is None and len(shape) == 1:
        rows = affine.weight[elements].unsqueeze(1)
        offset = _offset(problem, step)
        value = rows.new_zeros(1, 1) if offset is None else offset[:, elements].mT
        slack: Tensor | float = 0.0  # the rows are exact
    else:
        eye = problem.boxes[node].lower.new_zeros(len(elements), 1, shape.numel())
        eye[places, 0, elements] = 1.0
        start = eye.reshape(len(elements), 1, *shape)
        if len(step.inputs) > 1:
            return lower_bounds(problem, node, torch.cat([start, -start]), problem.lines)
        (rows,) = _pull(problem, step, start)
        offset = _offset(problem, step)
        value = start.new_zeros(1, 1) if offset is None else offset.flatten(1)[:, elements].mT
        slack = _residual(problem, start, _reach(problem, step), 2 * start[0, 0].numel())
        del eye, start
    both = torch.cat([rows, -rows])
    del rows
    value = value.expand(len(elements), -1)
    bounds = lower_bounds(problem, step.inputs[0], both, problem.lines)
    return bounds + torch.cat([value - slack, -value - slack])


def _concretise(problem: Problem, node: fx.Node, a: Tensor) -> Tensor:
    box = problem.boxes[node]
    centre, radius = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2
    if not problem.sound:
        return _sum(a, centre) - _sum(a.abs(), radius)
    # |a| meets radius and residual in one product
    with torch.no_grad():
        share = 4 * bound_of_roundings(8 + a[0, 0].numel(), a.dtype)
    return _sum(a, centre) - _sum(a.abs(), radius + share * box.magnitude) - 1e-300


def _sum(a: Tensor, values: Tensor) -> Tensor:
    """``(S, b, ...)`` times ``(B, ...)``, summed to ``(S, B)``."""
    flat, points = a.flatten(2), values.flatten(1)
    if flat.shape[1] == 1 and points.shape[0] != 1:
        return flat[:, 0] @ points.mT
    return torch.einsum("sbn,bn->sb", flat, points.expand(flat.shape[1], -1))


def _residual(problem: Problem, a: Tensor, reach: Tensor, operations: int = 8) -> Tensor | float:
    """``gamma sum |A| T``: what rounding can have cost in a step."""
    if not problem.sound:
        return 0.0
    with torch.no_grad():
        count = operations + a[0, 0].numel()
        # 4: the residual itself is computed in floating point
        return _sum(a.abs(), reach) * (4 * bound_of_roundings(count, a.dtype)) + 1e-300


def _add(pending: dict[fx.Node, Tensor], node: fx.Node, a: Tensor) -> None:
    pending[node] = a if node not in pending else pending[node] + a


def _affine(problem: Problem, step: Step, a: Tensor, pending: dict[fx.Node, Tensor]) -> Tensor:
    assert step.affine is not None
    value: Any = a.new_zeros(1, 1)
    offset = _offset(problem, step)
    if offset is not None:
        value = _sum(a, offset)
    value = value - _residual(problem, a, _reach(problem, step), 2 * a[0, 0].numel())
    for node, part in zip(step.inputs, _pull(problem, step, a), strict=True):
        _add(pending, node, part)
    result: Tensor = value
    return result


def _offset(problem: Problem, step: Step) -> Tensor | None:
    """The value at 0, or None where it is 0."""
    assert step.affine is not None
    if step.node not in problem.offsets and step.affine.offset is not None:
        problem.offsets[step.node] = step.affine.offset(problem.boxes[step.node].lower)
    if step.node not in problem.offsets:
        zeros = [torch.zeros_like(problem.boxes[n].lower) for n in step.inputs]
        if step.affine.weight is not None:
            zeros = [zero[:1] for zero in zeros]
        offset = step.affine.apply(*zeros)
        empty = not offset.requires_grad and not bool(offset.any())
        problem.offsets[step.node] = None if empty else offset
    return problem.offsets[step.node]


@torch.no_grad()
def _reach(problem: Problem, step: Step) -> Tensor:
    assert step.affine is not None
    if not problem.sound:
        return torch.zeros(())
    if step.node not in problem.reaches:
        sizes = [problem.boxes[n].magnitude for n in step.inputs]
        problem.reaches[step.node] = step.affine.reach(*sizes) * (1 + 1e-9)
    return problem.reaches[step.node]


def _pull(problem: Problem, step: Step, a: Tensor) -> list[Tensor]:
    """The coefficients of the step's inputs."""
    affine = step.affine
    assert affine is not None
    if affine.weight is not None and affine.options is None:
        return [_through_weight(problem, step, a, affine.weight)]
    first = problem.boxes[step.inputs[0]].lower
    if affine.pull is not None:
        return affine.pull(a, first.shape[1:])
    if affine.weight is not None and affine.options is not None:
        size = (a.shape[0] * a.shape[1], *first.shape[1:])
        grad: Tensor = torch.nn.grad.conv2d_input(
            size, affine.weight, a.flatten(0, 1), **affine.options
        )
        return [grad.unflatten(0, a.shape[:2])]
    points = [torch.zeros_like(problem.boxes[n].lower) for n in step.inputs]
    pull = torch.func.vjp(affine.apply, *points)[1]
    wide = a.expand(-1, first.shape[0], *a.shape[2:])
    return list(torch.func.vmap(pull)(wide))


def _through_weight(problem: Problem, step: Step, a: Tensor, weight: Tensor) -> Tensor:
    """``a @ weight`` without the rows that meet zeros and the columns nobody will read.

    A ReLU that is off all over the box has coefficients 0 behind it and leaves those before it
    unread. About half of the units of a network are off for an image, which saves half of the
    product on either side. Left out where gradients are wanted.
    """
    small = a.shape[0] * a.shape[1] < 4 * len(weight) // 64
    if a.shape[1] != 1 or a.ndim != 3 or small or torch.is_grad_enabled():
        return a @ weight
    read = _read_elements(problem, step.inputs[0])
    used = (a != 0).flatten(0, 1).any(0).nonzero()[:, 0]
    if len(used) < 0.8 * len(weight):
        a, weight = a.index_select(2, used), weight.index_select(0, used)
    if read is None:
        return a @ weight
    whole = a.new_zeros(*a.shape[:2], weight.shape[1])
    return whole.index_copy_(2, read, a @ weight.index_select(1, read))


def _read_elements(problem: Problem, node: fx.Node) -> Tensor | None:
    """Indices of the elements of an activation with a slope in some image; None for most."""
    lines = problem.lines.get(node)
    if lines is None or lines.lower_slope.ndim != 2:
        return None
    slopes = (lines.lower_slope != 0) | (lines.upper_slope != 0)
    shifts = (lines.lower_shift != 0) | (lines.upper_shift != 0)
    read = (slopes | shifts).any(0).nonzero()[:, 0]
    return read if len(read) < 0.8 * slopes.shape[1] else None


def _bend(
    problem: Problem, step: Step, a: Tensor, pending: dict[fx.Node, Tensor], lines: Lines
) -> Tensor:
    # max(a, 0) lower + min(a, 0) upper = a upper + max(a, 0) (lower - upper): one copy less
    above = a.clamp(min=0)
    (node,) = step.inputs
    value = _line_sum(a, lines.upper_shift)
    value = value + _line_sum(above, lines.lower_shift - lines.upper_shift)
    sizes = None if not problem.sound else a.abs()
    if a.requires_grad or lines.lower_slope.requires_grad or lines.lower_slope.ndim == a.ndim:
        pulled = a * lines.upper_slope + above * (lines.lower_slope - lines.upper_slope)
    else:
        slopes = lines.lower_slope - lines.upper_slope
        pulled = above.mul_(slopes) if a.shape[1] == len(slopes) else above * slopes
        pulled.addcmul_(a, lines.upper_slope)
    _add(pending, node, pulled)
    if not problem.sound:
        return value
    assert sizes is not None
    with torch.no_grad():
        size = problem.boxes[node].magnitude
        slope = torch.maximum(lines.lower_slope.abs(), lines.upper_slope.abs())
        shift = torch.maximum(lines.lower_shift.abs(), lines.upper_shift.abs())
        count = 16 + a[0, 0].numel()
        slack = _line_sum(sizes, slope * size + shift) * (4 * bound_of_roundings(count, a.dtype))
    return value - slack - 1e-300


def _line_sum(a: Tensor, values: Tensor) -> Tensor:
    """:func:`_sum` where the values may differ by specification, ``(S, B, ...)``."""
    if values.ndim == a.ndim:
        return (a * values).flatten(2).sum(-1)
    return _sum(a, values)
