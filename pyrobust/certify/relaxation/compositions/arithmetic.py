"""Quotients, squares, extrema of two boxes or along axes, and pieces of a box."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from pyrobust.certify.relaxation.compositions.parts import meet
from pyrobust.certify.relaxation.compositions.site import Site, emit

__all__ = [
    "amin",
    "chunk",
    "largest",
    "maximum",
    "minimum",
    "product",
    "quotient",
    "smallest",
    "split",
    "unbind",
]


def quotient(site: Site, x: Any, y: Any, *_: Any, **options: Any) -> Any:
    """A product with the reciprocal of a box."""
    if _ or options or not site.boxes[1]:
        return None
    return emit(meet, torch.reciprocal(y) * x, x / y)


def product(site: Site, x: Any, y: Any, *_: Any, **options: Any) -> Any:
    """The square where both factors are one value; other products have planes."""
    same = isinstance(x, fx.Proxy) and isinstance(y, fx.Proxy) and x.node is y.node
    return torch.square(x) if same else None


def maximum(site: Site, x: Any, y: Any) -> Any:
    """``y + relu(x - y)``."""
    return emit(meet, y + F.relu(x - y), torch.maximum(x, y))


def minimum(site: Site, x: Any, y: Any) -> Any:
    """``y - relu(y - x)``."""
    return emit(meet, y - F.relu(y - x), torch.minimum(x, y))


def largest(site: Site, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """``torch.max`` of two values or along an axis, without its indices."""
    if isinstance(dim, fx.Proxy):
        return maximum(site, x, dim)
    return None if dim is None else (torch.amax(x, dim, keepdim), None)


def smallest(site: Site, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """``torch.min`` likewise."""
    if isinstance(dim, fx.Proxy):
        return minimum(site, x, dim)
    return None if dim is None else (-torch.amax(-x, dim, keepdim), None)


def amin(site: Site, x: Any, dim: Any = (), keepdim: bool = False) -> Any:
    """The negated maximum of the negation."""
    return -torch.amax(-x, dim, keepdim)


def _pieces(x: Any, dim: int, sizes: list[int]) -> tuple[Any, ...]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(x.narrow(dim, at, size) for at, size in zip(starts, sizes, strict=True))


def chunk(site: Site, x: Any, chunks: int, dim: int = 0) -> Any:
    """Slices along an axis."""
    parts = torch.empty(site.shapes[0], device="meta").chunk(chunks, dim)
    return _pieces(x, dim, [part.shape[dim] for part in parts])


def split(site: Site, x: Any, sizes: Any, dim: int = 0) -> Any:
    """Slices along an axis."""
    parts = torch.empty(site.shapes[0], device="meta").split(sizes, dim)
    return _pieces(x, dim, [part.shape[dim] for part in parts])


def unbind(site: Site, x: Any, dim: int = 0) -> Any:
    """Every element along an axis."""
    return tuple(x.select(dim, i) for i in range(site.shapes[0][dim]))
