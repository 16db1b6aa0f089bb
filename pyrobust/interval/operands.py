"""What the rules share: the ends of an operand in working precision, and in-place forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrobust.interval.errors import MissingRule, where
from pyrobust.interval.outward import Ends
from pyrobust.interval.type import Interval, assign, put_off, unclipped, with_flushed, wrap
from pyrobust.ops._interval_checks import is_deployed

__all__ = [
    "common_dtype",
    "concrete",
    "ends_of",
    "in_place",
    "is_held",
    "on_ends",
    "readings_of",
    "refuse",
    "require_box",
    "reshaped",
    "spellings",
    "working",
]

_NAMESPACES = (torch, torch.nn.functional, torch.Tensor, torch._C._nn, torch.special)
Rule = Callable[..., Any]


def spellings(name: str) -> list[Any]:
    """Every torch function called ``name``, in torch and its functional namespaces."""
    found = [getattr(space, name) for space in _NAMESPACES if hasattr(space, name)]
    return [function for function in found if callable(function)]


def refuse(what: str) -> MissingRule:
    """The error for a variant of an operation that has no rule."""
    return MissingRule(f"Interval: no rule for {what}{where()}.")


def require_box(value: Any, what: str) -> Interval:
    """``value`` if it is an Interval; the operation ``what`` takes one only there."""
    if not isinstance(value, Interval):
        raise refuse(f"{what} with the interval in another argument than the first")
    return value


def common_dtype(*values: Any) -> torch.dtype:
    """The dtype of an operation's result: float64 where a tensor operand has it, else float32."""
    dtypes = [v.dtype for v in values if isinstance(v, (Interval, Tensor))]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def concrete(value: float) -> float:
    """``value`` itself where compiled code has a number that varies, of which it then is one case.

    Splits of such numbers are simplified as if their sums did not round.
    """
    if torch.compiler.is_compiling():  # when the module is there, which takes a second to import
        return torch.fx.experimental.symbolic_shapes.guard_scalar(value)
    return value


def is_held(value: float, dtype: torch.dtype) -> bool:
    """Whether ``value`` is a normal number of ``dtype``, or zero."""
    value = concrete(value)
    if dtype == torch.float64 or value == 0:
        return True
    split = value * (2.0**29 + 1)
    return 2.0**-126 <= abs(value) < 2.0**127 and split - (split - value) == value  # 24 bits


_LEAST, _MOST = 2.0**-126, 2.0**126  # magnitudes whose nearest float32 is a normal number


def readings_of(value: float) -> tuple[float, float] | None:
    """A number and what float32 makes of it, in order; None where that takes more than a split."""
    value = concrete(value)
    number = float(value) if abs(value) <= _MOST else 0.0
    if number != value or (number != 0 and abs(number) < _LEAST):
        return None
    split = number * (2.0**29 + 1)
    rounded = split - (split - number)  # to 24 bits
    if rounded != number and is_held(2 * number - rounded, torch.float32):
        return None  # halfway between two numbers of float32
    return (number, rounded) if number < rounded else (rounded, number)


def working(x: Interval) -> Ends:
    """The ends to compute with: float64, but the box's own dtype where rounding is nearest."""
    if x.rounding == "nearest":
        return x.lower, x.upper
    return x.lower.double(), x.upper.double()


def ends_of(value: Any, like: Interval, rounding: str) -> Ends:
    """The ends of an operand: a box's, or a tensor's or number's as a box without width.

    A number or tensor that the dtype of the operation cannot hold is read both ways, exactly and
    rounded, since implementations differ.
    """
    dtype = like.dtype if not isinstance(value, (Interval, Tensor)) else common_dtype(value, like)
    if isinstance(value, Interval):
        low, high = value.lower, value.upper
    elif isinstance(value, Tensor):
        low = high = value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        low = high = torch.full((), value, dtype=torch.float64, device=like.device)
    else:
        raise refuse(f"an operand of type {type(value).__name__}")
    if rounding == "nearest":
        return low.to(dtype), high.to(dtype)
    if low.is_complex():
        raise refuse("complex numbers")
    if isinstance(value, Interval):
        return low.double(), high.double()
    if isinstance(value, Tensor) and value.is_floating_point():
        if is_deployed(rounding):
            low, high = with_flushed(value, value, dtype)
        wide = low.double()
        return wide, wide if high is low else high.double()
    exact, rounded = low.double(), low.to(dtype).double()
    number = not isinstance(value, Tensor) and is_deployed(rounding)
    if number and 0 < abs(value) < torch.finfo(dtype).tiny:
        rounded = torch.zeros_like(exact)  # as a processor that flushes denormals reads it
    return torch.minimum(exact, rounded), torch.maximum(exact, rounded)


def on_ends(function: Callable[..., Any], *, view: bool = False) -> Rule:
    """The rule of a function that rearranges elements: apply it to both ends."""

    def rule(x: Any, *args: Any, **kwargs: Any) -> Any:
        box = require_box(x, getattr(function, "__name__", "this operation"))
        base = box if view else None
        low = function(box.lower, *args, **kwargs)
        high = function(box.upper, *args, **kwargs)
        if isinstance(low, Tensor):
            return wrap(low, high, box.rounding, base=base)
        return tuple(wrap(a, b, box.rounding, base=base) for a, b in zip(low, high, strict=True))

    return rule


def reshaped(function: Callable[..., Any]) -> Rule:
    """The rule of a view of all elements in another shape: a ReLU that waits goes on waiting."""

    def rule(x: Any, *args: Any, **kwargs: Any) -> Interval:
        box = require_box(x, getattr(function, "__name__", "this operation"))
        lower, upper, _ = unclipped(box)
        low, high = function(lower, *args, **kwargs), function(upper, *args, **kwargs)
        return put_off(wrap(low, high, box.rounding, base=box), box)

    return rule


def in_place(rule: Rule) -> Rule:
    """The rule of an operation's in-place form."""

    def changed(x: Any, *args: Any, **kwargs: Any) -> Interval:
        box = require_box(x, "an operation in place")
        return assign(box, rule(box, *args, **kwargs))

    return changed
