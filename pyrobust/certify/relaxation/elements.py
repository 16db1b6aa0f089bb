"""Bounds of single elements of an affine value: the rows with which a backward pass starts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from pyrobust.certify.relaxation.backward import Problem, lower_bounds, offset_of
from pyrobust.certify.relaxation.convolution import is_plain
from pyrobust.certify.relaxation.frames import WHOLE, Frame, Window
from pyrobust.interval.outward import UNIT

__all__ = ["by_fixed_lines", "element_bounds", "pair_bounds", "starts_in_window"]


Bounds = Callable[[Problem, fx.Node, Tensor, Frame], Tensor]
"""``bounds(problem, start, coefficients, frame)``, as :func:`lower_bounds` of some lines."""


def by_fixed_lines(problem: Problem, start: fx.Node, coefficients: Tensor, frame: Frame) -> Tensor:
    """:func:`lower_bounds` with the lines of the problem."""
    return lower_bounds(problem, start, coefficients, problem.lines, frame)


def element_bounds(
    problem: Problem,
    node: fx.Node,
    elements: Tensor,
    frame: Frame = WHOLE,
    bounds_of: Bounds = by_fixed_lines,
) -> Tensor:
    """``(2 P, b)`` lower bounds of some elements of an affine value, then of their negations.

    Both signs share the products up to the first activation, and the rows of a linear layer are
    its weights as they stand, without a product.

    Args:
        problem: the model and its intervals.
        node: the value, the result of an affine step or one with planes.
        elements: ``(P,)`` indices into the flattened value of an image.
        frame: some images.
        bounds_of: makes the backward pass.
    """
    step = problem.step_of(node)
    affine = step.affine
    if affine is None or affine.weight is None or len(problem.shape(node)) > 1:
        start = _one_hot(problem, node, elements).unsqueeze(1)
        return bounds_of(problem, node, torch.cat([start, -start]), frame)
    rows = affine.weight[elements].unsqueeze(1)
    both = torch.cat([rows, -rows])
    del rows
    bounds = bounds_of(problem, step.inputs[0], both, frame)
    offset = offset_of(problem, step)
    if offset is None:
        return bounds
    value = frame.take(offset, torch.Size()).flatten(1)[:, elements].mT
    return _raised(problem, bounds, torch.cat([value, -value]))


def pair_bounds(
    problem: Problem,
    node: fx.Node,
    images: Tensor,
    elements: Tensor,
    bounds_of: Bounds = by_fixed_lines,
) -> Tensor:
    """``(2, P)`` lower bounds of one element of an affine value in one image each, and of its
    negation.

    Args:
        problem: the model and its intervals.
        node: the value, the result of an affine step or one with planes.
        images: ``(P,)`` int64, rising.
        elements: ``(P,)`` indices into the flattened value of an image.
        bounds_of: makes the backward pass.
    """
    step = problem.step_of(node)
    affine = step.affine
    shape = problem.shape(node)
    if affine is None:
        rows, start, frame = _one_hot(problem, node, elements), node, Frame(images)
    elif affine.weight is not None and len(shape) == 1:
        rows, start, frame = affine.weight[elements], step.inputs[0], Frame(images)
    elif not starts_in_window(problem, node):
        rows, start, frame = _one_hot(problem, node, elements), node, Frame(images)
    else:
        size = shape[1:].numel()
        places = torch.stack([elements % size // shape[2], elements % shape[2]])
        window, channels = Window.at(places), elements // size
        if affine.weight is None or affine.options is None:  # a sum of convolutions, or a norm
            rows, start = problem.boxes[node].lower.new_zeros(len(elements), shape[0]), node
            rows = rows.scatter_(1, channels.unsqueeze(1), 1.0)[:, :, None, None]
        else:
            window = window.before(affine.options["stride"], affine.options["padding"])
            rows, start = affine.weight[channels], step.inputs[0]
        frame = Frame(images, window)
    bounds = bounds_of(problem, start, torch.stack([rows, -rows]), frame)
    offset = None if start is node else offset_of(problem, step)
    if offset is None:
        return bounds
    flat = offset.expand(-1, *shape).flatten(1)
    value = flat[images if len(flat) > 1 else 0, elements]
    return _raised(problem, bounds, torch.stack([value, -value]))


def starts_in_window(problem: Problem, node: fx.Node) -> bool:
    """Whether an element of a value is pulled back as a window of one place."""
    affine = problem.step_of(node).affine
    if affine is None or len(problem.shape(node)) != 3:
        return False
    return affine.local if affine.weight is None else is_plain(affine.options)


def _one_hot(problem: Problem, node: fx.Node, elements: Tensor) -> Tensor:
    """``(P, *value)`` with a 1 at the element of each row."""
    shape = problem.shape(node)
    rows = problem.boxes[node].lower.new_zeros(len(elements), shape.numel())
    rows.scatter_(1, elements.unsqueeze(1), 1.0)
    return rows.reshape(-1, *shape)


def _raised(problem: Problem, bounds: Tensor, value: Tensor) -> Tensor:
    """The sum of bounds and an exact value, less what rounding of the sum can have added."""
    total: Tensor = bounds + value
    if not problem.sound:
        return total
    lowered: Tensor = total - 2 * UNIT[total.dtype] * total.detach().abs() - 1e-300
    return lowered
