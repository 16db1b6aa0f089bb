"""Boxes times constants in one native pass, where it serves: ``csrc/transformer/transformer.h``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust.interval import arithmetic
from pyrobust.interval.operands import Rule, ends_of
from pyrobust.interval.pass_operator import PassOperator, pass_serves
from pyrobust.interval.type import Interval
from pyrobust.ops._interval_checks import Ends, dense

__all__ = ["RULES", "mul"]


def _native_scale(
    lower: Tensor, upper: Tensor, first: Tensor, last: Tensor, rounding: str
) -> Ends | None:
    lower, upper = dense(lower), dense(upper)
    out = torch.empty_like(lower), torch.empty_like(lower)
    constants = dense(first), dense(last)
    threads = torch.get_num_threads()
    finite = _native.box_scale(lower, upper, *constants, rounding, *out, threads)
    return out if finite else None


def _rule(lower: Tensor, upper: Tensor, first: Tensor, last: Tensor, rounding: str) -> Ends:
    ends = lower.double(), upper.double()
    return arithmetic.scaled_ends(ends, (first, last), rounding, lower.dtype)


def _fake(lower: Tensor, *_: Any) -> Ends:
    out = lower.new_empty(lower.shape)
    return out, torch.empty_like(out)


_scale = PassOperator(
    "interval_scale(Tensor lower, Tensor upper, Tensor first, Tensor last, str rounding)"
    " -> (Tensor, Tensor)",
    _native_scale,
    _rule,
    _fake,
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


def mul(x: Any, y: Any, *, out: None = None) -> Interval:
    """``x y``; the square where both are the same box."""
    box, other = (x, y) if isinstance(x, Interval) else (y, x)
    boxes = isinstance(box, Interval) and isinstance(other, Interval)
    if out is None and isinstance(box, Interval) and not boxes and _ending_of(other, box):
        tensor = other if isinstance(other, Tensor) else None
        if math.prod(box.shape) and pass_serves(box, tensor):
            ends = ends_of(other, box, box.rounding)
            return _scale(box.rounding, box.lower, box.upper, *ends, box.rounding)
    return arithmetic.mul(x, y, out=out)


RULES: dict[str, Rule] = {"mul": mul, "multiply": mul}
