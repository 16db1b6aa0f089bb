"""Rules of sums, means and extrema over dimensions, and of log-sum-exp."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrobust.interval.arithmetic import maximum, minimum
from pyrobust.interval.operands import Rule, require_box, working
from pyrobust.interval.outward import bound_of_roundings, enclose
from pyrobust.interval.pooling import averaged
from pyrobust.interval.shape import to_dtype
from pyrobust.interval.type import Interval, wrap
from pyrobust.ops._interval_checks import is_deployed

__all__ = ["RULES", "Extremum"]


class Extremum(NamedTuple):
    """What ``max`` and ``min`` along a dimension return: a box has no index of its maximum."""

    values: Interval
    indices: None


def _dimensions(box: Interval, dim: Any) -> list[int]:
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return list(range(box.ndim))
    return [dim] if isinstance(dim, int) else list(dim)


def _terms(box: Interval, dims: list[int]) -> int:
    total = 1
    for dim in dims:
        total *= box.shape[dim] if box.ndim else 1
    return total


def _sum(input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Interval:
    box = _typed(require_box(input, "sum"), dtype)
    dims = _dimensions(box, dim)
    return averaged(box, lambda x: x.sum(dims, keepdim=keepdim), _terms(box, dims))


def _mean(input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Interval:
    box = _typed(require_box(input, "mean"), dtype)
    dims = _dimensions(box, dim)
    return averaged(box, lambda x: x.mean(dims, keepdim=keepdim), _terms(box, dims))


def _typed(box: Interval, dtype: Any) -> Interval:
    return box if dtype is None else to_dtype(box, dtype)


def _cumsum(input: Any, dim: int, *, dtype: Any = None) -> Interval:
    box = _typed(require_box(input, "cumsum"), dtype)
    return averaged(box, lambda x: x.cumsum(dim), box.shape[dim])


def _amax(input: Any, dim: Any = (), keepdim: bool = False) -> Interval:
    box = require_box(input, "amax")
    low, high = (end.amax(_dimensions(box, dim), keepdim) for end in (box.lower, box.upper))
    return wrap(low, high, box.rounding)


def _amin(input: Any, dim: Any = (), keepdim: bool = False) -> Interval:
    box = require_box(input, "amin")
    low, high = (end.amin(_dimensions(box, dim), keepdim) for end in (box.lower, box.upper))
    return wrap(low, high, box.rounding)


def _extremum(pair: Rule, along: Rule) -> Rule:
    def rule(input: Any, dim: Any = None, keepdim: bool = False, **options: Any) -> Any:
        if options:
            dim = options.pop("other", dim)
        if isinstance(dim, (Tensor, Interval)):
            return pair(input, dim)
        if dim is None:
            return along(input)
        return Extremum(along(input, dim, keepdim), None)

    return rule


def log_sum_exp(input: Any, dim: Any, keepdim: bool = False) -> Interval:
    """``log sum exp x``, rising in every element."""
    box = require_box(input, "logsumexp")
    dims = _dimensions(box, dim)
    low, high = working(box)
    lower, upper = low.logsumexp(dims, keepdim), high.logsumexp(dims, keepdim)
    if box.rounding == "nearest":
        return wrap(lower, upper, box.rounding)
    with torch.no_grad():
        terms = _terms(box, dims)
        scale = torch.maximum(low.abs(), high.abs()).amax(dims, keepdim)
        scale = torch.nan_to_num(scale, posinf=0.0)
        error = bound_of_roundings(terms + 16, torch.float64) * (1 + scale)
        if is_deployed(box.rounding):
            error = error + bound_of_roundings(terms + 16, box.dtype) * (1 + scale) * 4
    return wrap(*enclose(lower, upper, error, box.dtype), box.rounding)


RULES: dict[str, Rule] = {
    "sum": _sum,
    "mean": _mean,
    "cumsum": _cumsum,
    "amax": _amax,
    "amin": _amin,
    "max": _extremum(maximum, _amax),
    "min": _extremum(minimum, _amin),
    "logsumexp": log_sum_exp,
}
