"""Boxes times constants in one native pass, where it serves: ``csrc/transformer/transformer.h``.

All of a box, or what is below zero of it (LeakyReLU, PReLU).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust.interval import arithmetic
from pyrobust.interval.operands import ends_of
from pyrobust.interval.pass_operator import PassOperator, pass_serves
from pyrobust.interval.type import Interval, wrap
from pyrobust.ops._interval_checks import Ends, dense
from pyrobust.ops._kept_memory import new_ends

__all__ = ["bent", "scaled"]


def _native_scale(
    lower: Tensor, upper: Tensor, first: Tensor, last: Tensor, bend: bool, rounding: str
) -> Ends | None:
    lower, upper = dense(lower), dense(upper)
    out = new_ends(lower)
    constants = dense(first), dense(last)
    threads = torch.get_num_threads()
    finite = _native.box_scale(lower, upper, *constants, bend, rounding, *out, threads)
    return out if finite else None


def _rule(
    lower: Tensor, upper: Tensor, first: Tensor, last: Tensor, bend: bool, rounding: str
) -> Ends:
    if bend:
        result = arithmetic.bent(wrap(lower, upper, rounding), (first, last))
    else:
        ends = lower.double(), upper.double()
        scaled = arithmetic.scaled_ends(ends, (first, last), rounding, lower.dtype)
        result = wrap(*scaled, rounding)
    return result.lower, result.upper


_scale = PassOperator(
    "interval_scale(Tensor lower, Tensor upper, Tensor first, Tensor last, bool bend,"
    " str rounding) -> (Tensor, Tensor)",
    _native_scale,
    _rule,
)


def _ending_of(value: Any, box: Interval) -> bool:
    """Whether ``value`` is one number, or as many as the last dimensions of ``box`` have."""
    if not isinstance(value, Tensor):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if value.ndim > box.ndim or value.dtype != torch.float32:
        return False
    shape = tuple(value.shape)
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape == tuple(box.shape[box.ndim - len(shape) :])


def _by_constant(box: Interval, constant: Any, bend: bool) -> Interval | None:
    tensor = constant if isinstance(constant, Tensor) else None
    if not math.prod(box.shape) or not pass_serves(box, tensor):
        return None
    ends = ends_of(constant, box, box.rounding)
    return _scale(box.rounding, box.lower, box.upper, *ends, bend, box.rounding)


def scaled(x: Any, y: Any) -> Interval | None:
    """``x y`` where one is a box and the other constants that its rows share, or None."""
    box, other = (x, y) if isinstance(x, Interval) else (y, x)
    if isinstance(other, Interval) or not _ending_of(other, box):
        return None
    return _by_constant(box, other, False)


def bent(box: Interval, slope: Any) -> Interval | None:
    """``x``, below zero ``slope x``, of constants that rows share, or None."""
    return _by_constant(box, slope, True) if _ending_of(slope, box) else None
