"""Planes of maxima: max pooling in one to three dimensions, also adaptive, and maxima over axes.

Every result is the largest of some elements of an image, listed in a table. Below it lies any of
them; the one that is highest in the middle of the box is taken, as for a ReLU. Above it lies the
chord of ``max(x_i, m)``, where ``x_i`` is the element with the largest upper end and ``m`` the
largest upper end of the others. The chord is the element itself where it exceeds all others, and
nowhere above the largest upper end.

Source: G. Singh et al., "An Abstract Domain for Certifying Neural Networks", POPL 2019 (one of the
elements below). The chord above is derived as stated; on tight planes above compare Y. Xiao et al.,
"Towards General Robustness Verification of MaxPool-based Convolutional Neural Networks via
Tightening Linear Approximation" (MaxLin), CVPR 2024, arXiv 2406.00699.
Departures: the element below is chosen by the middle of its interval, not by its lower end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrobust.certify.relaxation.planes import Ends, Planes, Pulled, dot
from pyrobust.interval.outward import UNIT

__all__ = ["Maximum", "adaptive_windows", "axis_windows", "pool_windows"]


class Maximum:
    """The largest of the elements of each row of a table.

    Attributes:
        table: ``(N, T)`` int64 indices into a flattened image, -1 for none.
    """

    def __init__(self, table: Tensor):
        self.table = table

    def undecided(self, boxes: list[Ends]) -> list[Tensor]:
        """Elements that may be the largest of a window with other such elements."""
        low, high = (_gathered(end, self.table) for end in boxes[0])
        may_win = high >= low.amax(-1, keepdim=True)
        counts = (may_win & (may_win.sum(-1, keepdim=True) > 1)).to(torch.int32)
        flat = boxes[0][0].flatten(1)
        found = torch.zeros_like(flat, dtype=torch.int32)
        index = self.table.clamp(min=0).flatten().expand(len(flat), -1)
        found.scatter_add_(1, index, (counts * (self.table >= 0)).flatten(1))
        return [(found > 0) & (boxes[0][1] > boxes[0][0]).flatten(1)]

    def planes(self, boxes: list[Ends], sound: bool) -> Planes:
        """One element below, the chord over one element above."""
        return _MaximumPlanes(boxes[0], self.table, sound)


def _gathered(end: Tensor, table: Tensor) -> Tensor:
    """``(B, N, T)`` ends of the elements of each window, infinite where there is none."""
    found = end.flatten(1)[:, table.clamp(min=0)]
    return torch.where(table >= 0, found, -torch.inf)


class _MaximumPlanes:
    def __init__(self, box: Ends, table: Tensor, sound: bool):
        self.shape = box[0].shape[1:]
        self.terms = 16
        low, high = (_gathered(end, table) for end in box)
        with torch.no_grad():
            below = (low / 2 + high / 2).argmax(-1, keepdim=True)
            above = high.argmax(-1, keepdim=True)
            others = high.detach().scatter(-1, above, -torch.inf).argmax(-1, keepdim=True)
            alone = (table >= 0).sum(-1) < 2
        widest = table.expand(len(low), -1, -1)
        self.below = widest.gather(-1, below)[..., 0]
        self.above = widest.gather(-1, above)[..., 0]
        first, last = (end.gather(-1, above)[..., 0] for end in (low, high))
        rest = torch.where(alone, first, high.gather(-1, others)[..., 0])
        self.slope, self.shift = _chord(first, last, rest, sound)
        size = torch.maximum(low.abs(), high.abs()).detach()
        size = torch.where(table >= 0, size, 0.0).amax(-1)
        self.reach = 2 * size + self.shift.detach().abs() if sound else None

    def pull(self, a: Tensor, take: Callable[[Tensor], Tensor]) -> Pulled:
        """Each coefficient goes to one element."""
        flat = a.flatten(2)
        above, below = flat.clamp(min=0), flat.clamp(max=0)
        value = dot(below, take(self.shift))
        tilted = below * take(self.slope)
        pulled = flat.new_zeros(*tilted.shape[:2], self.shape.numel())
        for chosen, part in ((self.below, above), (self.above, tilted)):
            index = take(chosen).expand(tilted.shape)
            pulled = pulled.scatter_add(2, index, part.expand(tilted.shape))
        reach = None if self.reach is None else dot(flat.detach().abs(), take(self.reach))
        return Pulled([pulled.reshape(*pulled.shape[:2], *self.shape)], value, reach)


def _chord(low: Tensor, high: Tensor, rest: Tensor, sound: bool) -> Ends:
    """Slope and shift of a line above ``max(x, rest)`` on ``[low, high]``, ``rest <= high``."""
    start = torch.maximum(low, rest)
    width = high - low
    tiny = torch.finfo(low.dtype).tiny
    open_ = (width > tiny) & torch.isfinite(width)
    slope = torch.where(open_, (high - start) / torch.where(open_, width, 1.0), 0.0)
    safe = torch.where(open_, low, high)
    shift = torch.maximum(start - slope * safe, high - slope * high)
    shift = torch.where(open_, shift, high)
    if sound:
        size = torch.maximum(torch.maximum(safe.abs(), high.abs()), start.abs()).detach()
        # an element that exceeds all others is the maximum: the line is exact
        exact = (slope == 1) & (start == low)
        shift = torch.where(exact, 0.0, shift + 8 * UNIT[low.dtype] * size + 1e-300)
    return slope, shift


# -- tables --------------------------------------------------------------------------------------


def axis_windows(shape: torch.Size, dims: list[int]) -> Tensor:
    """The table of a maximum over axes of an image ``shape``; ``dims`` do not count the batch."""
    index = torch.arange(shape.numel()).reshape(shape)
    kept = [i for i in range(len(shape)) if i not in dims]
    rows = math.prod(shape[i] for i in kept)
    return index.permute(*kept, *dims).reshape(rows, -1)


def pool_windows(
    shape: torch.Size,
    dimensions: int,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """The table of a max pooling of an image ``(..., *spatial)``."""
    kernel, pad, spread = (_each(v, dimensions) for v in (kernel_size, padding, dilation))
    step = _each(stride or kernel_size, dimensions)
    spatial = shape[-dimensions:]
    axes = [
        _starts(spatial[i], kernel[i], step[i], pad[i], spread[i], ceil_mode)
        for i in range(dimensions)
    ]
    return _of_places(shape, axes)


def adaptive_windows(shape: torch.Size, dimensions: int, output_size: Any) -> Tensor:
    """The table of an adaptive max pooling."""
    spatial = shape[-dimensions:]
    sizes = [output_size] * dimensions if isinstance(output_size, int) else list(output_size)
    axes = []
    for size, wanted in zip(spatial, sizes, strict=True):
        count = size if wanted is None else wanted
        ends = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
        longest = max(b - a for a, b in ends)
        rows = [[*range(a, b), *[-1] * (longest - b + a)] for a, b in ends]
        axes.append(torch.tensor(rows))
    return _of_places(shape, axes)


def _each(value: Any, dimensions: int) -> list[int]:
    values = [value] * dimensions if isinstance(value, int) else list(value)
    return values if len(values) == dimensions else values * dimensions


def _starts(size: int, kernel: int, step: int, pad: int, spread: int, ceil_mode: bool) -> Tensor:
    """``(windows, kernel)`` places along one axis, -1 in the padding."""
    line = torch.empty(1, 1, size, device="meta")
    count = F.max_pool1d(line, kernel, step, pad, spread, ceil_mode).shape[-1]
    places = torch.arange(count)[:, None] * step - pad + torch.arange(kernel) * spread
    return torch.where((places >= 0) & (places < size), places, -1)


def _of_places(shape: torch.Size, axes: list[Tensor]) -> Tensor:
    """``(channels * windows, taps)`` from the places along each spatial axis."""
    spatial = shape[-len(axes) :]
    table = torch.zeros(1, 1, dtype=torch.int64)
    outside = torch.zeros(1, 1, dtype=torch.bool)
    for size, places in zip(spatial, axes, strict=True):
        rows, taps = len(table) * len(places), table.shape[1] * places.shape[1]
        step = table[:, None, :, None] * size + places.clamp(min=0)[None, :, None, :]
        away = outside[:, None, :, None] | (places < 0)[None, :, None, :]
        table, outside = step.reshape(rows, taps), away.reshape(rows, taps)
    channels = torch.arange(math.prod(shape[: -len(axes)]))[:, None, None]
    whole = channels * spatial.numel() + table
    return torch.where(outside, -1, whole).flatten(0, 1)
