"""The two affine pieces that composite operations are rewritten with: centring, and a meeting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrobust.interval.operands import working
from pyrobust.interval.outward import bound_of_roundings, enclose
from pyrobust.interval.type import Interval, wrap

__all__ = ["centred", "magnitude_of_centred", "meet"]


def centred(x: Any, dims: Sequence[int]) -> Any:
    """``x - mean(x)`` over ``dims``, for tensors and Intervals.

    In a box the element itself counts once, with ``1 - 1/n``.
    """
    axes = list(dims)
    if not isinstance(x, Interval):
        return x - x.mean(axes, keepdim=True)
    count = math.prod(x.shape[d] for d in axes)
    low, high = working(x)
    own = (high - low) / count
    lower = low - high.mean(axes, keepdim=True) + own
    upper = high - low.mean(axes, keepdim=True) - own
    if x.rounding == "nearest":
        return wrap(lower, torch.maximum(lower, upper), x.rounding)
    with torch.no_grad():
        size = torch.maximum(low.abs(), high.abs())
        reach = 4 * (size + size.mean(axes, keepdim=True))
        error = bound_of_roundings(count + 16, torch.float64) * reach
    return wrap(*enclose(lower, upper, error, x.dtype), x.rounding)


def meet(value: Any, other: Any) -> Any:
    """``value``, whose box is cut by another box of the same thing."""
    if not isinstance(value, Interval):
        return value
    lower = torch.maximum(value.lower, other.lower)
    upper = torch.minimum(value.upper, other.upper)
    return wrap(lower, torch.maximum(lower, upper), value.rounding)


def magnitude_of_centred(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Bound of the sum of magnitudes behind :func:`centred`."""
    return x + x.mean(list(dims), keepdim=True)
