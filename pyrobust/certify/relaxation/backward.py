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

__all__ = ["Box", "Problem", "lower_bounds"]


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
    """

    steps: list[Step]
    boxes: dict[fx.Node, Box]
    lines: dict[fx.Node, Lines]
    sound: bool
    offsets: dict[fx.Node, Tensor | None] = field(default_factory=dict)
    reaches: dict[fx.Node, Tensor] = field(default_factory=dict)


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


def _concretise(problem: Problem, node: fx.Node, a: Tensor) -> Tensor:
    box = problem.boxes[node]
    value = _sum(a.clamp(min=0), box.lower) + _sum(a.clamp(max=0), box.upper)
    return value - _residual(problem, a, box.magnitude)


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
        return [a @ affine.weight]
    first = problem.boxes[step.inputs[0]].lower
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


def _bend(
    problem: Problem, step: Step, a: Tensor, pending: dict[fx.Node, Tensor], lines: Lines
) -> Tensor:
    above, below = a.clamp(min=0), a.clamp(max=0)
    (node,) = step.inputs
    _add(pending, node, above * lines.lower_slope + below * lines.upper_slope)
    value = _line_sum(above, lines.lower_shift) + _line_sum(below, lines.upper_shift)
    if not problem.sound:
        return value
    with torch.no_grad():
        size = problem.boxes[node].magnitude
        slope = torch.maximum(lines.lower_slope.abs(), lines.upper_slope.abs())
        shift = torch.maximum(lines.lower_shift.abs(), lines.upper_shift.abs())
        count = 16 + a[0, 0].numel()
        slack = _line_sum(a.abs(), slope * size + shift) * (4 * bound_of_roundings(count, a.dtype))
    return value - slack - 1e-300


def _line_sum(a: Tensor, values: Tensor) -> Tensor:
    """:func:`_sum` where the values may differ by specification, ``(S, B, ...)``."""
    if values.ndim == a.ndim:
        return (a * values).flatten(2).sum(-1)
    return _sum(a, values)
