"""Which images, and which windows of them, rows of coefficients belong to.

Coefficients are ``(S, b, *part)``: ``S`` functions for each of ``b`` places of a frame. A frame
holds the images of a batch, a slice of them, or one image for each of ``b`` rows, repeated at will.
In the last case the coefficients may be those of a window of the value, at a place of its own for
each row: the neurons of a convolution depend on a few places only. A window may hang over the
border of the value; there the values that it meets are 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["WHOLE", "Frame", "Part", "Window", "cleaned", "joined", "spread"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """Windows whose first row and column are ``place * stride + shift``.

    Attributes:
        places: ``(2, R)`` int64, row and column of each neuron in the value where it started.
        limits: lowest and highest row, lowest and highest column among the places.
        stride: of the value against the first one.
        shift: likewise.
    """

    places: Tensor
    limits: tuple[Pair, Pair]
    stride: Pair = (1, 1)
    shift: Pair = (0, 0)

    @staticmethod
    def at(places: Tensor) -> Window:
        """Windows that start at the places themselves."""
        low, high = places.amin(1).tolist(), places.amax(1).tolist()
        return Window(places, ((low[0], high[0]), (low[1], high[1])))

    def before(self, stride: Pair, padding: Pair) -> Window:
        """The windows of a convolution's input."""
        steps = (self.stride[0] * stride[0], self.stride[1] * stride[1])
        rows, columns = (self.shift[i] * stride[i] - padding[i] for i in (0, 1))
        return Window(self.places, self.limits, steps, (rows, columns))

    def over(self, window: torch.Size, value: torch.Size) -> tuple[Pair, Pair]:
        """Rows above and below, columns left and right of the value that some window covers."""
        sides = []
        for i in (0, 1):
            low, high = (p * self.stride[i] + self.shift[i] for p in self.limits[i])
            sides.append((max(-low, 0), max(high + window[i] - value[i], 0)))
        return sides[0], sides[1]

    def corner(self, axis: int, border: int) -> Tensor:
        """``(R,)`` first row or column, in a value with a border before it."""
        return self.places[axis] * self.stride[axis] + (self.shift[axis] + border)


@dataclass(frozen=True)
class Frame:
    """The images of the rows: a slice of the batch, or ``(R,)`` int64 in rising order."""

    images: slice | Tensor
    window: Window | None = None

    def count(self, batch: int) -> int:
        """How many places it has in a batch."""
        images = self.images
        return len(images) if isinstance(images, Tensor) else len(range(batch)[images])

    def take(self, values: Tensor, size: torch.Size, beyond: str = "constant") -> Tensor:
        """``(b, *part)`` of ``(B or 1, *value)``: what coefficients with ``size`` last axes meet.

        What all images share comes back with one image, and what all places share as it is.
        Beyond borders there is 0, or the nearest value with ``beyond="replicate"``.
        """
        rows = isinstance(self.images, Tensor)
        if self.window is None or values.shape[2:].numel() == 1:
            return values if len(values) == 1 else values[self.images]
        assert rows
        return self._windows(values, self.window, size, beyond)

    def _windows(self, values: Tensor, window: Window, size: torch.Size, beyond: str) -> Tensor:
        images = self.images
        assert isinstance(images, Tensor)
        first, last = (0, 1) if len(values) == 1 else (int(images[0]), int(images[-1]) + 1)
        (top, bottom), (left, right) = window.over(size, values.shape[2:])
        padded = F.pad(values[first:last], (left, right, top, bottom), mode=beyond)
        each = padded.unfold(2, size[0], 1).unfold(3, size[1], 1)
        image = torch.zeros_like(images) if len(values) == 1 else images - first
        return each[image, :, window.corner(0, top), window.corner(1, left)]


WHOLE = Frame(slice(None))


@dataclass
class Part:
    """Coefficients with their frame.

    Attributes:
        a: ``(S, b, *part)``.
        frame: where they lie.
        clean: whether they are 0 where a window hangs over the border.
    """

    a: Tensor
    frame: Frame = WHOLE
    clean: bool = True


def cleaned(part: Part, value: torch.Size) -> Part:
    """The part with zeros beyond the border of a value."""
    window = part.frame.window
    if part.clean or window is None:
        return part
    size = part.a.shape[-2:]
    if window.over(size, value[-2:]) == ((0, 0), (0, 0)):
        return Part(part.a, part.frame)
    masks = []
    for axis in (0, 1):
        at = window.corner(axis, 0)[:, None] + torch.arange(size[axis], device=part.a.device)
        masks.append((at >= 0) & (at < value[axis - 2]))
    mask = (masks[0][:, None, :, None] & masks[1][:, None, None, :]).to(part.a.dtype)
    return Part(part.a * mask, part.frame)


def spread(part: Part, value: torch.Size) -> Part:
    """The part as coefficients of whole values ``(C, H, W)``."""
    frame = part.frame
    if frame.window is None:
        return part
    a, size = part.a, part.a.shape[-2:]
    (top, bottom), (left, right) = frame.window.over(size, value[1:])
    height, width = top + value[1] + bottom, left + value[2] + right
    padded = a.new_zeros(*a.shape[:3], height, width)
    each = padded.unfold(3, size[0], 1).unfold(4, size[1], 1)
    rows = torch.arange(a.shape[1], device=a.device)
    at = (rows, frame.window.corner(0, top), frame.window.corner(1, left))
    # indexed axes come first: (R, S, C, h, w)
    each[:, at[0], :, at[1], at[2]] = a.transpose(0, 1)
    whole = padded[..., top : top + value[1], left : left + value[2]]
    return Part(whole, Frame(frame.images))


def joined(first: Part, second: Part, value: torch.Size) -> Part:
    """The sum of two parts of the same rows."""
    one, two = first.frame.window, second.frame.window
    if one is not None and two is not None and one.stride == two.stride:
        return _aligned(first, second)
    first, second = spread(first, value), spread(second, value)
    return Part(first.a + second.a, first.frame)


def _aligned(first: Part, second: Part) -> Part:
    """The sum on the smallest windows that hold both."""
    one, two = first.frame.window, second.frame.window
    assert one is not None
    assert two is not None
    starts, borders = [], []
    for i in (0, 1):
        start = min(one.shift[i], two.shift[i])
        ends = [w.shift[i] + p.a.shape[3 + i] for w, p in ((one, first), (two, second))]
        starts.append(start)
        sides = [
            (w.shift[i] - start, max(ends) - end) for w, end in zip((one, two), ends, strict=True)
        ]
        borders.append(sides)
    wide = [
        F.pad(part.a, (*borders[1][j], *borders[0][j])) for j, part in enumerate((first, second))
    ]
    window = Window(one.places, one.limits, one.stride, (starts[0], starts[1]))
    frame = Frame(first.frame.images, window)
    return Part(wide[0] + wide[1], frame, first.clean and second.clean)
