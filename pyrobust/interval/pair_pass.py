"""Sums, differences, products and quotients in one native pass each, where it serves.

``csrc/interval/pairs.h``: the least float32 boxes around the exact ones, as the rules of
:mod:`pyrobust.interval.arithmetic` give them. Operands are brought to one shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust.interval import arithmetic
from pyrobust.interval.constant_pass import times_number_between, with_constant
from pyrobust.interval.operands import Rule, refuse
from pyrobust.interval.pass_operator import NativeGradients, PassOperator, pass_serves
from pyrobust.interval.scale_pass import scaled
from pyrobust.interval.type import Interval, weakest, with_flushed, wrap
from pyrobust.ops._interval_checks import Ends, dense, finite_ends, is_deployed
from pyrobust.ops._kept_memory import new_ends
from pyrobust.ops._library import plain_eager

__all__ = ["RULES", "div", "mul"]


_SMALL = (torch.bool, torch.uint8, torch.int8, torch.int16)  # whose numbers float32 holds
_LARGE = (torch.int32, torch.int64)
_MOST = 1 << 24  # up to which it holds all whole numbers


def _whole(value: Any) -> Any:
    """A tensor of whole numbers that float32 holds in float32, others as they are."""
    if not isinstance(value, Tensor) or value.dtype not in (*_SMALL, *_LARGE):
        return value
    if value.dtype in _LARGE:
        within = plain_eager(value) and bool(((value >= -_MOST) & (value <= _MOST)).all())
        return value.float() if within else value
    return value.float()


def _line(tensor: Tensor) -> Tensor:
    return dense(tensor).view(-1)


def _lines(low: Tensor, high: Tensor) -> Ends:
    """Both in the order of their elements; a tensor's, which are one, copied once."""
    first = _line(low)
    one = low.data_ptr() == high.data_ptr() and low.stride() == high.stride()
    return first, first if one else _line(high)


def _native_ends(
    low_x: Tensor, high_x: Tensor, low_y: Tensor, high_y: Tensor, operation: str, rounding: str
) -> Ends | None:
    x, y = _lines(low_x, high_x), _lines(low_y, high_y)
    low, high = new_ends(low_x)
    out, threads = (low.view(-1), high.view(-1)), torch.get_num_threads()
    finite = _native.interval_pair(*x, *y, operation, rounding, *out, threads)
    if not finite:
        if operation in ("mul", "div") or bool(low.isnan().any() | high.isnan().any()):
            return None
        finite_ends.note(False)  # a mask, or beyond the range
    return low, high


def _native_gradients(
    of_lower: Tensor,
    of_upper: Tensor,
    low_x: Tensor,
    high_x: Tensor,
    low_y: Tensor,
    high_y: Tensor,
    operation: str,
) -> tuple[Tensor, ...]:
    of = _line(of_lower), _line(of_upper)
    x, y = _lines(low_x, high_x), _lines(low_y, high_y)
    out = [torch.empty_like(of[0]) for _ in range(4)]
    _native.interval_pair_backward(*of, *x, *y, operation, out, torch.get_num_threads())
    return tuple(gradient.view(low_x.shape) for gradient in out)


def _rule(
    low_x: Tensor, high_x: Tensor, low_y: Tensor, high_y: Tensor, operation: str, rounding: str
) -> Ends:
    rule = arithmetic.RULES[operation]
    result = rule(wrap(low_x, high_x, rounding), wrap(low_y, high_y, rounding))
    return result.lower, result.upper


def _fake_gradients(of_lower: Tensor, of_upper: Tensor, low_x: Tensor, *_: Any) -> Any:
    return tuple(low_x.new_empty(low_x.shape) for _ in range(4))


_pair = PassOperator(
    "interval_pair(Tensor low_x, Tensor high_x, Tensor low_y, Tensor high_y, str operation,"
    " str rounding) -> (Tensor, Tensor)",
    _native_ends,
    _rule,
    gradients=NativeGradients(
        "interval_pair_gradients(Tensor of_lower, Tensor of_upper, Tensor low_x, Tensor high_x,"
        " Tensor low_y, Tensor high_y, str operation) -> (Tensor, Tensor, Tensor, Tensor)",
        _native_gradients,
        _fake_gradients,
    ),
    by_elements=True,
)


def _ends(value: Any, box: Interval, rounding: str) -> Ends | None:
    """The ends of an operand beside ``box``, or None where they are no float32 numbers."""
    if isinstance(value, Interval):
        return (value.lower, value.upper) if pass_serves(value, nearest=True) else None
    value = _whole(value)
    if not isinstance(value, Tensor) or not pass_serves(box, value, nearest=True):
        return None
    if not is_deployed(rounding):
        return value, value
    return with_flushed(value, value, torch.float32)


def _passed(operation: str, x: Any, y: Any) -> Interval | None:
    """``x operation y`` by a pass, or None where none serves."""
    box, other = (x, y) if isinstance(x, Interval) else (y, x)
    if isinstance(other, (int, float)):
        return with_constant(operation, x, y)
    if not pass_serves(box, nearest=True):
        return None
    rounding = weakest(x, y)
    ends_x, ends_y = _ends(x, box, rounding), _ends(y, box, rounding)
    if ends_x is None or ends_y is None:
        return None
    ends = torch.broadcast_tensors(*ends_x, *ends_y)
    return _pair(rounding, *ends, operation, rounding) if ends[0].numel() else None


def _add(x: Any, y: Any, *, alpha: float = 1, out: None = None) -> Interval:
    """``x + alpha y``."""
    if alpha != 1 and out is None:
        return _add(x, _times(alpha, y, x))
    done = _passed("add", x, y) if out is None else None
    return arithmetic.add(x, y, alpha=alpha, out=out) if done is None else done


def _times(alpha: float, y: Any, x: Any) -> Interval:
    """``alpha y`` beside ``x``, which is a box where ``y`` is none."""
    if isinstance(y, Tensor):
        y = wrap(y, y, x.rounding)
    if not isinstance(y, Interval):
        raise refuse("alpha= with a number")
    return mul(y, alpha)


def _sub(x: Any, y: Any, *, alpha: float = 1, out: None = None) -> Interval:
    """``x - alpha y``; 0 for an interval less itself."""
    if alpha != 1 and out is None:
        return _sub(x, _times(alpha, y, x))
    done = _passed("sub", x, y) if out is None and x is not y else None
    return arithmetic.sub(x, y, alpha=alpha, out=out) if done is None else done


def _rsub(x: Any, y: Any, *, alpha: float = 1) -> Interval:
    """``y - alpha x``."""
    return _sub(y, x, alpha=alpha)


def mul(x: Any, y: Any, *, out: None = None) -> Interval:
    """``x y``; the square where both are the same box."""
    if out is None and x is not y:
        by_number = isinstance(x, (int, float)) or isinstance(y, (int, float))
        done = _passed("mul", x, y) if by_number else scaled(x, y)
        if done is None:  # the other way
            done = scaled(x, y) if by_number else _passed("mul", x, y)
        if done is not None:
            return done
    return arithmetic.mul(x, y, out=out)


def _times_number_between(box: Interval, first: float, last: float) -> Interval:
    done = times_number_between(box, first, last)
    return arithmetic.times_number_between(box, first, last) if done is None else done


def div(x: Any, y: Any, *, rounding_mode: Any = None, out: Any = None) -> Interval:
    """``x / y`` for a divisor whose box does not hold zero."""
    if rounding_mode is not None or out is not None:
        return arithmetic.div(x, y, rounding_mode=rounding_mode, out=out)
    done = arithmetic.evaluated_quotient(x, y, div, mul, _times_number_between)
    if done is None:
        done = _passed("div", x, y)
    return arithmetic.div(x, y) if done is None else done


def _reciprocal(x: Interval) -> Interval:
    """``1 / x``."""
    return div(1.0, x)


RULES: dict[str, Rule] = {
    "add": _add,
    **dict.fromkeys(("sub", "subtract"), _sub),
    **dict.fromkeys(("rsub", "__rsub__"), _rsub),
    **dict.fromkeys(("mul", "multiply"), mul),
    **dict.fromkeys(("div", "divide", "true_divide"), div),
    **dict.fromkeys(("__rdiv__", "__rtruediv__"), lambda x, y: div(y, x)),
    "reciprocal": _reciprocal,
    **dict.fromkeys(
        ("pow", "__pow__"), lambda x, exponent: arithmetic.power(x, exponent, invert=_reciprocal)
    ),
}
