"""Rules of products of two boxes, and of softmax, in torch operations.

The product of two boxes is enclosed by five ordinary products of centres and radii (H. D. Nguyen,
"Efficient algorithms for verified scientific computing", thesis, ENS Lyon 2011), exactly where no
entry of one side crosses zero. A softmax is exact up to rounding:
``softmax_i = sigmoid(x_i - log sum_{j != i} exp x_j)`` rises in ``x_i`` and falls in the others.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyrobust.interval.curves import sigmoid
from pyrobust.interval.operands import common_dtype, ends_of, refuse, require_box, working
from pyrobust.interval.outward import (
    UNIT,
    bound_of_roundings,
    enclose,
    error_of_products,
    infinite_where_beyond,
)
from pyrobust.interval.shape import to_dtype
from pyrobust.interval.type import Interval, weakest, wrap
from pyrobust.ops._interval_checks import is_deployed

__all__ = ["matmul", "softmax"]


def matmul(input: Any, other: Any, *, out: None = None) -> Interval:
    """``A B`` where either or both are boxes."""
    if out is not None:
        raise refuse("out=")
    rounding = weakest(input, other)
    like = input if isinstance(input, Interval) else other
    dtype = common_dtype(input, other)
    wide = dtype if rounding == "nearest" else torch.float64
    low_a, high_a = (end.to(wide) for end in ends_of(input, like, rounding))
    low_b, high_b = (end.to(wide) for end in ends_of(other, like, rounding))
    mid_a, mid_b = (low_a + high_a) * 0.5, (low_b + high_b) * 0.5
    rad_a, rad_b = (high_a - low_a) * 0.5, (high_b - low_b) * 0.5
    if rounding != "nearest":  # cover the rounding of the midpoints
        rad_a = rad_a + torch.maximum(low_a.abs(), high_a.abs()) * 2.0**-52 * (low_a != high_a)
        rad_b = rad_b + torch.maximum(low_b.abs(), high_b.abs()) * 2.0**-52 * (low_b != high_b)
    size_a, size_b = mid_a.abs(), mid_b.abs()
    core_a = torch.minimum(size_a, rad_a) * mid_a.sign()
    core_b = torch.minimum(size_b, rad_b) * mid_b.sign()
    middle = mid_a @ mid_b + core_a @ core_b
    most = (size_a + rad_a) @ (size_b + rad_b)
    reach = most - size_a @ size_b - core_a.abs() @ core_b.abs()
    lower, upper = middle - reach, middle + reach
    if rounding == "nearest":
        return wrap(lower, upper, rounding)
    with torch.no_grad():
        terms = int(low_a.shape[-1])
        error = 8 * bound_of_roundings(terms + 8, torch.float64) * most
        if is_deployed(rounding):
            error = error + error_of_products(terms + 4, dtype, rounding) * most
            error = error + torch.finfo(dtype).tiny * (terms + 4) * (
                1 + size_a.amax() + rad_a.amax()
            )
            error = error + infinite_where_beyond(most, dtype)
    return wrap(*enclose(lower, upper, error, dtype), rounding)


def _others(x: Tensor, dim: int) -> Tensor:
    """``log sum_{j != i} exp x_j`` along ``dim``: sums from both sides, without cancellation."""
    top = x.amax(dim, keepdim=True).detach()
    top = torch.where(torch.isfinite(top), top, 0.0)
    terms = torch.exp(x - top)
    zero = torch.zeros_like(terms.narrow(dim, 0, 1))
    count = x.shape[dim]
    before = torch.cat([zero, terms.narrow(dim, 0, count - 1).cumsum(dim)], dim)
    behind = terms.flip(dim).narrow(dim, 0, count - 1).cumsum(dim)
    behind = torch.cat([zero, behind], dim).flip(dim)
    # above zero in the dtype at hand, whose logarithm has an infinite derivative
    least = max(2.0**-1000, torch.finfo(x.dtype).tiny)
    return top + torch.log((before + behind).clamp(min=least))


def softmax(
    input: Any,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: Any = None,
    *,
    log: bool = False,
) -> Interval:
    """Softmax, or its logarithm, along ``dim``."""
    box = require_box(input, "softmax")
    if dim is None:
        raise refuse("softmax without dim")
    if dtype is not None:
        box = to_dtype(box, dtype)
    low, high = working(box)
    rest_low, rest_high = _others(low, dim), _others(high, dim)
    # lower ends that overflowed all together: the others may be as small as they like
    unbounded = low.amax(dim, keepdim=True).isneginf() & ~high.amax(dim, keepdim=True).isneginf()
    rest_low = torch.where(unbounded, -math.inf, rest_low)
    drop_low, drop_high = low - rest_high, high - rest_low
    curve = torch.nn.functional.logsigmoid if log else sigmoid
    lower, upper = curve(drop_low), curve(drop_high)
    if box.rounding == "nearest":
        return wrap(lower, upper, box.rounding)
    with torch.no_grad():
        relative = _softmax_error(low, high, dim, torch.float64)
        if is_deployed(box.rounding):
            relative = relative + _softmax_error(low, high, dim, box.dtype)
        errors = [relative * (1 + end.abs() if log else end) for end in (lower, upper)]
        if is_deployed(box.rounding):
            largest = torch.maximum(*errors) + torch.finfo(box.dtype).tiny
            errors = [largest, largest]
    floor, ceiling = (None, 0.0) if log else (0.0, 1.0)
    ends = enclose(lower, upper, (errors[0], errors[1]), box.dtype, floor=floor, ceiling=ceiling)
    return wrap(*ends, box.rounding)


def _softmax_error(low: Tensor, high: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Relative error of a softmax in ``dtype`` arithmetic; absolute error of its logarithm.

    A rounded difference ``x_j - max`` errs by a unit of its size; where that is beyond the range of
    the exponential the term is zero, so sizes count up to there.
    """
    range_of_exp = 800.0 if dtype == torch.float64 else 128.0
    spread = torch.zeros((), dtype=low.dtype, device=low.device)
    for end in (low, high):
        top = end.amax(dim, keepdim=True)
        top = torch.where(torch.isfinite(top), top, 0.0)
        depth = (top - torch.minimum(low, high)).amax(dim, keepdim=True).clamp(max=range_of_exp)
        spread = torch.maximum(spread, top.abs() + depth)
    return bound_of_roundings(low.shape[dim] + 16, dtype) + 4 * UNIT[dtype] * (1 + 4 * spread)
