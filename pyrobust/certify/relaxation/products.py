"""Planes of products of two boxes: elementwise, and matrix products entry by entry.

Over ``[xl, xu] x [yl, yu]`` the convex and concave envelopes of ``x y`` are (McCormick)

- below: ``max(yl x + xl y - xl yl, yu x + xu y - xu yu)``
- above: ``min(yu x + xl y - xl yu, yl x + xu y - xu yl)``

All four have the same value in the middle of the box; of each pair, the one that is tighter at its
worst corner is taken. In a matrix product the choice is made once for an entry of the result, so
that coefficients are pulled back by matrix products with the ends of the factors and no
three-dimensional array of terms is formed.

Source: G. P. McCormick, "Computability of global solutions to factorable nonconvex programs: part
I", Mathematical Programming 10, 1976, section 3; Z. Shi et al., "Robustness Verification for
Transformers", ICLR 2020, arXiv 2002.06622, section 3.3 (in a backward pass).
Departures: the sources' verifiers always take the first of each pair; the choice is ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyrobust.certify.relaxation.planes import Ends, Planes, Pulled, dot, open_elements, summed_to

__all__ = ["Product", "fits"]

Multiply = Callable[[Tensor, Tensor], Tensor]


def fits(first: torch.Size, second: torch.Size, result: torch.Size, matrices: bool) -> bool:
    """Whether a product keeps images apart: all have the batch as their first axis."""
    axes = 3 if matrices else 1
    return len(first) == len(second) == len(result) >= axes and first[0] == second[0] == result[0]


class Product:
    """``x * y``, or ``x @ y`` over the last two axes."""

    def __init__(self, matrices: bool):
        self.matrices = matrices

    def undecided(self, boxes: list[Ends]) -> list[Tensor]:
        """Every element counts."""
        return [open_elements(box) for box in boxes]

    def planes(self, boxes: list[Ends], sound: bool) -> Planes:
        """The four planes of every element and which of each pair is used."""
        return _ProductPlanes(boxes[0], boxes[1], self.matrices, sound)


class _ProductPlanes:
    def __init__(self, x: Ends, y: Ends, matrices: bool, sound: bool):
        self.x, self.y, self.matrices = x, y, matrices
        self.times: Multiply = torch.matmul if matrices else torch.mul
        self.terms = 16 + (x[0].shape[-1] if matrices else 0)
        # the constants: of the lower planes, then of the upper ones
        corners = [(x[0], y[0]), (x[1], y[1]), (x[0], y[1]), (x[1], y[0])]
        self.constants = [self.times(a, b) for a, b in corners]
        with torch.no_grad():
            self.first_below, self.first_above = self._choose()
            sizes = [torch.maximum(low.abs(), high.abs()) for low, high in (x, y)]
            self.reach = 4 * self.times(*sizes) if sound else None

    def _choose(self) -> tuple[Tensor, Tensor]:
        """Whether the first plane of each pair is used, as numbers 0 and 1."""
        low_x, high_x, low_y, high_y = *self.x, *self.y
        below = [self._end(low_x, low_y, -1), self._end(high_x, high_y, -1)]
        above = [self._end(low_x, high_y, 1), self._end(high_x, low_y, 1)]
        offsets = self.constants
        first = below[0] - offsets[0] >= below[1] - offsets[1]
        last = above[0] - offsets[2] <= above[1] - offsets[3]
        return first.to(low_x.dtype), last.to(low_x.dtype)

    def _end(self, at_x: Tensor, at_y: Tensor, sign: int) -> Tensor:
        """The largest (1) or smallest (-1) value of ``at_y x + at_x y`` over the box, summed."""
        by_x = self.times(_middle(self.x), at_y) + sign * self.times(_radius(self.x), at_y.abs())
        by_y = self.times(at_x, _middle(self.y)) + sign * self.times(at_x.abs(), _radius(self.y))
        return by_x + by_y

    def pull(self, a: Tensor, take: Callable[[Tensor], Tensor]) -> Pulled:
        """By products with the ends of the other factor."""
        above, below = a.clamp(min=0), a.clamp(max=0)
        first, last = take(self.first_below), take(self.first_above)
        low = above * first, above * (1 - first)
        high = below * last, below * (1 - last)
        low_x, high_x, low_y, high_y = (take(end) for end in (*self.x, *self.y))
        to_x = self._back_x(low[0] + high[1], low_y) + self._back_x(low[1] + high[0], high_y)
        to_y = self._back_y(low[0] + high[0], low_x) + self._back_y(low[1] + high[1], high_x)
        parts = zip((*low, *high), self.constants, strict=True)
        value = -sum((dot(some, take(c)) for some, c in parts), start=a.new_zeros(1, 1))
        reach = None if self.reach is None else dot(a.detach().abs(), take(self.reach))
        shapes = low_x.shape[1:], low_y.shape[1:]
        return Pulled([summed_to(to_x, shapes[0]), summed_to(to_y, shapes[1])], value, reach)

    def _back_x(self, a: Tensor, y: Tensor) -> Tensor:
        return a @ y.mT if self.matrices else a * y

    def _back_y(self, a: Tensor, x: Tensor) -> Tensor:
        return x.mT @ a if self.matrices else a * x


def _middle(box: Ends) -> Tensor:
    return (box[0] + box[1]) / 2


def _radius(box: Ends) -> Tensor:
    return (box[1] - box[0]) / 2
