"""Sums, differences, products and quotients of a box and a number, in one native pass each.

``csrc/interval/pairs.h``. A number that float32 cannot hold is read both ways, exactly and rounded,
as by the rules of :mod:`pyrobust.interval.arithmetic`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust.interval import arithmetic
from pyrobust.interval.operands import is_held, readings_of
from pyrobust.interval.pass_operator import (
    NativeGradients,
    PassOperator,
    ends_like,
    pass_serves,
)
from pyrobust.interval.type import Interval, wrap
from pyrobust.ops._interval_checks import Ends, dense, finite_ends
from pyrobust.ops._kept_memory import new_ends

__all__ = ["times_number_between", "with_constant"]


def _native_ends(
    lower: Tensor,
    upper: Tensor,
    first: float,
    last: float,
    operation: str,
    reversed: bool,
    rounding: str,
) -> Ends | None:
    ends = dense(lower).view(-1), dense(upper).view(-1)
    low, high = new_ends(ends[0])
    threads = torch.get_num_threads()
    finite = _native.interval_constant(
        *ends, first, last, operation, reversed, rounding, low, high, threads
    )
    if not finite:
        if operation in ("mul", "div") or bool(low.isnan().any() | high.isnan().any()):
            return None
        finite_ends.note(False)  # beyond the range, or of masks
    return low.view(lower.shape), high.view(lower.shape)


def _native_gradients(
    of_lower: Tensor,
    of_upper: Tensor,
    lower: Tensor,
    upper: Tensor,
    first: float,
    last: float,
    operation: str,
    reversed: bool,
) -> Ends:
    grads = dense(of_lower).view(-1), dense(of_upper).view(-1)
    ends = dense(lower).view(-1), dense(upper).view(-1)
    to = torch.empty_like(ends[0]), torch.empty_like(ends[0])
    threads = torch.get_num_threads()
    _native.interval_constant_backward(
        *grads, *ends, first, last, operation, reversed, *to, threads
    )
    return to[0].view(lower.shape), to[1].view(lower.shape)


def _rule(
    lower: Tensor,
    upper: Tensor,
    first: float,
    last: float,
    operation: str,
    reversed: bool,
    rounding: str,
) -> Ends:
    if operation == "mul":
        wide = lower.dtype if rounding == "nearest" else torch.float64
        ends = lower.to(wide), upper.to(wide)
        constants = [lower.new_tensor(end, dtype=wide) for end in (first, last)]
        return arithmetic.scaled_ends(ends, (constants[0], constants[1]), rounding, lower.dtype)
    box, constant = wrap(lower, upper, rounding), first
    if first != last and rounding != "nearest":  # of which the first or the last is the number
        constant = last if is_held(first, torch.float32) else first
    rule = arithmetic.RULES[operation]
    result = rule(constant, box) if reversed else rule(box, constant)
    return result.lower, result.upper


_constant = PassOperator(
    "interval_constant(Tensor lower, Tensor upper, float first, float last, str operation,"
    " bool reversed, str rounding) -> (Tensor, Tensor)",
    _native_ends,
    _rule,
    gradients=NativeGradients(
        "interval_constant_gradients(Tensor of_lower, Tensor of_upper, Tensor lower, Tensor upper,"
        " float first, float last, str operation, bool reversed) -> (Tensor, Tensor)",
        _native_gradients,
        lambda of_lower, of_upper, lower, *_: ends_like(lower),
    ),
    by_elements=True,
)


def with_constant(operation: str, x: Any, y: Any) -> Interval | None:
    """``x operation y`` where one is a box and the other a number, or None.

    Args:
        operation: add, sub, mul or div.
        x: the box or the number.
        y: the other.
    """
    reversed = not isinstance(x, Interval)
    box, value = (y, x) if reversed else (x, y)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    readings = readings_of(value)
    if readings is None or not pass_serves(box, nearest=True) or not box.lower.numel():
        return None
    first, last = readings
    if box.rounding == "nearest" and first != last:
        first = last = last if is_held(last, torch.float32) else first
    return _constant(
        box.rounding, box.lower, box.upper, first, last, operation, reversed, box.rounding
    )


def times_number_between(box: Interval, first: float, last: float) -> Interval | None:
    """``box`` times a number between ``first`` and ``last``, or None."""
    if not pass_serves(box) or not box.lower.numel():
        return None
    return _constant(box.rounding, box.lower, box.upper, first, last, "mul", False, box.rounding)
