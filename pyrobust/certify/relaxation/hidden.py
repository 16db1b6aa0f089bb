"""Bounds of the hidden values that intervals leave undecided, in parts that fit memory and cache.

The work is a list of pairs of an image and an element. Neurons of a convolution are pulled back in
windows, since they depend on a few places of the values before. Where an image has many undecided
elements they are treated together: the product with a linear layer then leaves out what meets the
units that are off in that image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from pyrobust.certify.relaxation.backward import Problem
from pyrobust.certify.relaxation.elements import (
    Bounds,
    by_fixed_lines,
    element_bounds,
    pair_bounds,
    starts_in_window,
)
from pyrobust.certify.relaxation.frames import WHOLE, Frame
from pyrobust.certify.relaxation.graph import Step
from pyrobust.certify.relaxation.slopes import Search, best_bounds

__all__ = ["ALPHA_COPIES", "COPIES", "hidden_bounds", "rows_that_fit", "searched_bounds"]

# Copies of the coefficients of the largest value that are alive at once, measured; convolutions of
# few channels make most of them, whose layout inside has a multiple of 16.
COPIES = {False: 14, True: 24}  # in sound mode magnitudes too
# Products hold four parts of the coefficients beside those of both factors.
_COPIES_AT_PLANES = 18
# Numbers kept per number of all values and row whose slopes are optimised.
ALPHA_COPIES = 24
# Undecided elements of an image from which units that are off pay for passes of their own.
_MANY = 64
# Bytes of coefficients treated together: twice and four times as many were slower, whose new
# memory has to be mapped page by page.
_CACHE = 2 << 20
# Rows treated together all the same, so that weights are read seldom.
_FEWEST = 128


def rows_that_fit(problem: Problem, max_memory: int) -> int:
    """Rows of coefficients of the largest value to treat together, at least 1."""
    largest = max(box.lower[0].numel() for box in problem.boxes.values())
    return _fitting(problem, largest, max_memory)


def _fitting(problem: Problem, largest: int, max_memory: int) -> int:
    item = next(iter(problem.boxes.values())).lower.element_size()
    copies = max(COPIES[problem.sound], _COPIES_AT_PLANES if problem.planes else 0)
    rows = max_memory // (largest * item * copies)
    if not torch.is_grad_enabled():
        rows = min(rows, max(_CACHE // (largest * item), _FEWEST))
    return max(rows, 1)


def hidden_bounds(
    problem: Problem, node: fx.Node, undecided: Tensor, max_memory: int
) -> tuple[Tensor, Tensor]:
    """``(B, N)`` ends of a value: those of a backward pass where undecided, else what it has.

    Args:
        problem: the model so far.
        node: the value, the result of an affine step or one with planes.
        undecided: ``(B, N)`` bool.
        max_memory: bytes that coefficients may take.
    """
    box = problem.boxes[node]
    low, high = box.lower.flatten(1), box.upper.flatten(1)
    if not problem.separable:
        size = max(rows_that_fit(problem, max_memory) // (2 * len(low)), 1)
        return _of_all_images(problem, node, undecided.any(0).nonzero()[:, 0], size)
    many = int(undecided.sum()) >= _MANY * len(undecided) and not torch.is_grad_enabled()
    if many and low.ndim == box.lower.ndim:
        return _image_by_image(problem, node, undecided, max_memory)
    images, elements = undecided.nonzero(as_tuple=True)
    widest = max(_numbers_before(problem, node, waiting=True))
    size = max(_fitting(problem, widest, max_memory) // 2, 1)
    found = [
        pair_bounds(problem, node, *part)
        for part in zip(images.split(size), elements.split(size), strict=True)
    ]
    bounds = torch.cat(found, 1)
    low = low.index_put((images, elements), bounds[0])
    return low, high.index_put((images, elements), -bounds[1])


def searched_bounds(
    problem: Problem, node: fx.Node, undecided: Tensor, max_memory: int, search: Search
) -> tuple[Tensor, Tensor]:
    """:func:`hidden_bounds` with the slopes that a search finds for each end."""
    box = problem.boxes[node]
    low, high = box.lower.flatten(1), box.upper.flatten(1)

    def bounds_of(problem: Problem, start: fx.Node, coefficients: Tensor, frame: Frame) -> Tensor:
        return best_bounds(problem, start, coefficients, search, frame)

    numbers = sum(_numbers_before(problem, node)) * low.element_size()
    size = max(max_memory // (2 * ALPHA_COPIES * numbers), 1)
    if not problem.separable:
        elements = undecided.any(0).nonzero()[:, 0]
        each = max(size // len(low), 1)
        return _of_all_images(problem, node, elements, each, bounds_of)
    images, elements = undecided.nonzero(as_tuple=True)
    found = [
        pair_bounds(problem, node, *part, bounds_of)
        for part in zip(images.split(size), elements.split(size), strict=True)
    ]
    bounds = torch.cat(found, 1)
    low = low.index_put((images, elements), bounds[0])
    return low, high.index_put((images, elements), -bounds[1])


def _of_all_images(
    problem: Problem,
    node: fx.Node,
    elements: Tensor,
    size: int,
    bounds_of: Bounds = by_fixed_lines,
) -> tuple[Tensor, Tensor]:
    """Where operations cannot be applied to a part of the batch; ``size`` elements at a time."""
    box = problem.boxes[node]
    low, high = box.lower.flatten(1), box.upper.flatten(1)
    for part in elements.split(size):
        bounds = element_bounds(problem, node, part, WHOLE, bounds_of).expand(-1, len(low))
        low = low.index_copy(1, part, bounds[: len(part)].mT)
        high = high.index_copy(1, part, -bounds[len(part) :].mT)
    return low, high


def _image_by_image(
    problem: Problem, node: fx.Node, undecided: Tensor, max_memory: int
) -> tuple[Tensor, Tensor]:
    box = problem.boxes[node]
    low, high = box.lower.flatten(1).clone(), box.upper.flatten(1).clone()
    size = max(rows_that_fit(problem, max_memory) // 2, 1)
    for image, chosen in enumerate(undecided):
        frame = Frame(slice(image, image + 1))
        for part in chosen.nonzero()[:, 0].split(size):
            bounds = element_bounds(problem, node, part, frame)[:, 0]
            low[image, part] = bounds[: len(part)]
            high[image, part] = -bounds[len(part) :]
    return low, high


def _numbers_before(problem: Problem, node: fx.Node, *, waiting: bool = False) -> list[int]:
    """Coefficients of one element at each value; ``waiting``: with all that wait for their turn."""
    start: list[int] | None = [1, 1] if starts_in_window(problem, node) else None
    windows: dict[fx.Node, list[int] | None] = {node: start}
    numbers = [1]
    for step in reversed(problem.steps):
        if step.node not in windows:
            continue
        counts = [_count(problem.shape(n), window) for n, window in windows.items()]
        window = windows.pop(step.node)
        numbers.append(sum(counts) if waiting else _count(problem.shape(step.node), window))
        if _count(problem.shape(step.node), window) >= problem.shape(step.node).numel():
            window = None
        for entering in step.inputs:
            before = None if window is None else _before(step, window)
            other = windows.get(entering, [0, 0])
            if before is None or other is None:
                windows[entering] = None
            else:
                windows[entering] = [max(pair) for pair in zip(before, other, strict=True)]
    return numbers


def _count(shape: torch.Size, window: list[int] | None) -> int:
    """Coefficients of a window of a value, or of all of it."""
    whole = shape.numel()
    if window is None or len(shape) != 3:
        return whole
    return min(shape[0] * math.prod(window), whole)


def _before(step: Step, window: list[int]) -> list[int] | None:
    """The window of the input that a window of the result reads; None for all of it."""
    affine = step.affine
    if step.planes is not None:
        return None
    if affine is None or affine.local:
        return window
    if affine.options is None or affine.weight is None:
        return None
    stride, dilation = affine.options["stride"], affine.options["dilation"]
    taps = zip(window, stride, dilation, affine.weight.shape[2:], strict=True)
    return [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in taps]
