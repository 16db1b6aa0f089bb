"""Rules of arithmetic: sums, products, quotients, powers, roots, extrema.

A sum or product of two floats has one rounding, which is undone outward only where it happened
(two-sum; a product of float32 is exact in float64). So results are the tightest that the dtype can
hold. In deployed mode nothing is added: rounding to nearest is monotone, so every float result of
a correctly rounded operation lies between the ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrobust.interval.curve_pass import passed
from pyrobust.interval.curves import CURVES
from pyrobust.interval.errors import reject
from pyrobust.interval.operands import (
    common_dtype,
    concrete,
    ends_of,
    is_held,
    readings_of,
    refuse,
    require_box,
    working,
)
from pyrobust.interval.outward import UNIT, Ends, enclose, step_where, sum_ends
from pyrobust.interval.type import Interval, weakest, wrap
from pyrobust.ops._interval_checks import is_deployed

__all__ = [
    "RULES",
    "add",
    "bent",
    "div",
    "evaluated_quotient",
    "maximum",
    "minimum",
    "mul",
    "neg",
    "power",
    "scaled_ends",
    "square",
    "sub",
    "times_number_between",
]


def _operands(a: Any, b: Any) -> tuple[Ends, Ends, torch.dtype, str]:
    rounding = weakest(a, b)
    like = a if isinstance(a, Interval) else b
    first, second = ends_of(a, like, rounding), ends_of(b, like, rounding)
    return first, second, common_dtype(a, b), rounding


def add(x: Any, y: Any, *, alpha: float = 1, out: None = None) -> Interval:
    """``x + alpha y``."""
    if out is not None:
        raise refuse("out=")
    if alpha != 1:
        y = mul(wrap(y, y, x.rounding) if isinstance(y, Tensor) else y, alpha)
    (low_x, high_x), (low_y, high_y), dtype, rounding = _operands(x, y)
    if rounding == "nearest":
        return wrap(low_x + low_y, high_x + high_y, rounding)
    return wrap(*sum_ends((low_x, low_y), (high_x, high_y), dtype), rounding)


def neg(x: Interval) -> Interval:
    """``-x``, exact."""
    return wrap(-x.upper, -x.lower, x.rounding)


def sub(x: Any, y: Any, *, alpha: float = 1, out: None = None) -> Interval:
    """``x - alpha y``; 0 for an interval less itself."""
    if x is y and alpha == 1:
        return wrap(torch.zeros_like(x.lower), torch.zeros_like(x.lower), x.rounding)
    return add(x, neg(y) if isinstance(y, Interval) else -y, alpha=alpha, out=out)


def rsub(x: Any, y: Any, *, alpha: float = 1) -> Interval:
    """``y - alpha x``."""
    return sub(y, x, alpha=alpha)


def mul(x: Any, y: Any, *, out: None = None) -> Interval:
    """``x y``; the square where both are the same box."""
    if out is not None:
        raise refuse("out=")
    if x is y:
        return square(x)
    (low_x, high_x), (low_y, high_y), dtype, rounding = _operands(x, y)
    if isinstance(x, Interval) and isinstance(y, Interval):
        product = _product_in(rounding)
        corners = [product(a, b) for a in (low_x, high_x) for b in (low_y, high_y)]
        return wrap(*_outward_corners(corners, rounding, dtype), rounding)
    if isinstance(x, Interval):
        ends = scaled_ends((low_x, high_x), (low_y, high_y), rounding, dtype)
    else:
        ends = scaled_ends((low_y, high_y), (low_x, high_x), rounding, dtype)
    return wrap(*ends, rounding)


def scaled_ends(ends: Ends, constant: Ends, rounding: str, dtype: torch.dtype) -> Ends:
    """``ends`` times a constant that lies between two numbers; ends of ``dtype``."""
    corners = _scaled(_product_in(rounding), *ends, *constant)
    inexact = None
    if dtype == torch.float32 and rounding != "nearest":
        inexact = ~(_is_short(constant[0]) & _is_short(constant[1]))
    return _outward_corners(corners, rounding, dtype, inexact)


def bent(x: Interval, slope: Ends) -> Interval:
    """``x``, below zero ``slope x``; a slope below 0 makes a valley at 0."""
    ends = [end.clamp(max=0.0) for end in working(x)]
    below = wrap(*scaled_ends((ends[0], ends[1]), slope, x.rounding, x.dtype), x.rounding)
    lower = torch.where(x.lower >= 0, x.lower, below.lower)
    upper = torch.where(x.lower >= 0, x.upper, torch.maximum(below.upper, x.upper))
    return wrap(lower, torch.where(x.upper <= 0, below.upper, upper), x.rounding)


def _product_in(rounding: str) -> Callable[[Tensor, Tensor], Tensor]:
    return torch.mul if is_deployed(rounding) else _product


def _is_short(value: Tensor) -> Tensor:
    """Where float32 holds a float64, so that its product with another float32 is exact."""
    return value.detach().float().double() == value


def _outward_corners(
    corners: list[Tensor], rounding: str, dtype: torch.dtype, inexact: Tensor | None = None
) -> Ends:
    lower, upper = _extremes(corners)
    if rounding == "nearest":
        return lower, upper
    if inexact is not None:
        return step_where(lower, upper, inexact, inexact, dtype)
    return _outward_product(lower, upper, dtype)


def _scaled(
    product: Callable[[Tensor, Tensor], Tensor],
    low: Tensor,
    high: Tensor,
    first: Tensor,
    last: Tensor,
) -> list[Tensor]:
    """Products with a constant; it has two ends only where its dtype cannot hold it."""
    if first is last:
        return [product(low, first), product(high, first)]
    return [product(a, b) for a in (low, high) for b in (first, last)]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` with ``0 inf = 0``: zero times every finite number of an unbounded box.

    Not in deployed mode, where an unbounded box says that an evaluation may overflow: zero times
    what it then returns may be NaN, and so the ends are unbounded again.
    """
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


def _extremes(corners: list[Tensor]) -> Ends:
    lower = upper = corners[0]
    for corner in corners[1:]:
        lower, upper = torch.minimum(lower, corner), torch.maximum(upper, corner)
    return lower, upper


def _outward_product(lower: Tensor, upper: Tensor, dtype: torch.dtype) -> Ends:
    """Products of float32 are exact in float64; those of float64 always step."""
    moved = torch.full((), dtype == torch.float64, device=lower.device)
    return step_where(lower, upper, moved, moved, dtype)


def square(x: Interval) -> Interval:
    """``x^2``."""
    done = passed(CURVES["square"], x)
    if done is not None:
        return done
    low, high = working(x)
    dtype, rounding = x.dtype, x.rounding
    least = torch.clamp(torch.maximum(low, -high), min=0.0)
    lower, upper = least * least, torch.maximum(low * low, high * high)
    if rounding == "nearest":
        return wrap(lower, upper, rounding)
    lower, upper = _outward_product(lower, upper, dtype)
    return wrap(lower.clamp(min=0.0), upper, rounding)


def div(x: Any, y: Any, *, rounding_mode: Any = None, out: Any = None) -> Interval:
    """``x / y`` for a divisor whose box does not hold zero.

    Raises:
        ValueError: an interval of the divisor contains zero.
    """
    if rounding_mode is not None or out is not None:
        raise refuse("division with rounding_mode= or out=")
    done = evaluated_quotient(x, y, div, mul, times_number_between)
    return _quotient(x, y) if done is None else done


def evaluated_quotient(
    x: Any,
    y: Any,
    quotient: Callable[[Any, Any], Interval],
    product: Callable[[Any, Any], Interval],
    between: Callable[[Interval, float, float], Interval],
) -> Interval | None:
    """In deployed mode, a quotient with a number as torch evaluates it, exact and direct ones too.

    Torch takes ``3 / x`` for ``x.reciprocal() * 3`` everywhere, and ``x / 3`` for ``x * (1 / 3)``
    on GPUs: with one rounding more. None where torch divides.

    Args:
        x: the dividend.
        y: the divisor.
        quotient: ``x / y``.
        product: ``x y``.
        between: a box times a number that lies between two.
    """
    if not is_deployed(weakest(x, y)):
        return None
    if isinstance(x, (int, float)) and x != 1:
        return product(quotient(1.0, y), x)
    if not isinstance(y, (int, float)):
        return None
    ends = _reciprocals(y, x.dtype)
    return None if ends is None else between(x, *ends)


def _reciprocals(value: float, dtype: torch.dtype) -> tuple[float, float] | None:
    """What ``1 / value`` may be taken for; None where float32 has no normal number for either."""
    readings = readings_of(value)
    if readings is None or value == 0:
        return None
    near = [1.0 / reading for reading in (readings if dtype == torch.float32 else (float(value),))]
    if near[0] == near[-1] and near[0] * value == 1.0 and is_held(near[0], torch.float32):
        return near[0], near[0]  # of a power of two
    room = 2.0**-51  # for the roundings of these quotients
    rounded = [end for number in near for end in readings_of(number) or ()]
    found = [*near, *rounded] if dtype == torch.float32 else near
    ends = [number * (1.0 + sign * room) for number in found for sign in (-1.0, 1.0)]
    return min(ends), max(ends)


def times_number_between(box: Interval, first: float, last: float) -> Interval:
    """``box`` times a number between ``first`` and ``last``."""
    ends = (torch.full((), end, dtype=torch.float64, device=box.device) for end in (first, last))
    constant = next(ends), next(ends)
    return wrap(*scaled_ends(working(box), constant, box.rounding, box.dtype), box.rounding)


def _quotient(x: Any, y: Any) -> Interval:
    (low_x, high_x), (low_y, high_y), dtype, rounding = _operands(x, y)
    has_zero = (low_y <= 0) & (high_y >= 0)
    reject("div: the divisor must not contain zero", has_zero)
    pairs = [(a, b) for a in (low_x, high_x) for b in (low_y, high_y)]
    lower, upper = _extremes([torch.where(a == 0, 0.0, a / b) for a, b in pairs])
    if rounding != "nearest":
        inexact = _quotient_inexact(x, y, lower, upper, dtype)
        lower, upper = step_where(lower, upper, inexact, inexact, dtype)
    infinity = float("inf")
    return wrap(
        torch.where(has_zero, -infinity, lower), torch.where(has_zero, infinity, upper), rounding
    )


def _quotient_inexact(x: Any, y: Any, lower: Tensor, upper: Tensor, dtype: torch.dtype) -> Tensor:
    """False where a float32 box without width was divided by a float32 number exactly."""
    everywhere = torch.ones((), dtype=torch.bool, device=lower.device)
    if dtype == torch.float64 or isinstance(y, Interval):
        return everywhere
    with torch.no_grad():
        divisor = y.double() if isinstance(y, Tensor) else float(y)
        # float32 times a divisor of 29 bits is exact in float64, which settles it
        short = lower.float().double() == lower
        short_divisor = torch.as_tensor(divisor, device=lower.device)
        short &= (short_divisor.float().double() == short_divisor) & (lower == upper)
        low = x.lower.double() if isinstance(x, Interval) else ends_of(x, y, "real")[0]
        return ~(short & (lower * divisor == low))


def reciprocal(x: Interval) -> Interval:
    """``1 / x``."""
    return div(1.0, x)


def power(
    x: Any, exponent: Any, *, invert: Callable[[Interval], Interval] = reciprocal
) -> Interval:
    """``x^p`` for a number ``p``; a box below zero only for integers ``p``.

    An exponent that the dtype cannot hold is read both ways, exactly and rounded.

    Args:
        x: the box.
        exponent: the number.
        invert: what gives ``1 / x``.

    Raises:
        ValueError: the box holds negative numbers and ``p`` is no integer, or zero and ``p < 0``.
    """
    box = require_box(x, "pow")
    if isinstance(exponent, (Interval, Tensor)):
        raise refuse("pow with a tensor as exponent")
    exponent = concrete(exponent)
    if exponent == 1:
        return wrap(box.lower, box.upper, box.rounding)
    if exponent == 2:
        return square(box)
    if exponent == 0:
        return wrap(torch.ones_like(box.lower), torch.ones_like(box.upper), box.rounding)
    if exponent == -0.5:
        return inverse_root(box)
    if exponent < 0:
        return invert(power(box, -exponent))
    if exponent == 0.5:
        return root(box)
    return _rising_power(box, exponent)


def _rising_power(box: Interval, exponent: float) -> Interval:
    low, high = working(box)
    if exponent != int(exponent):
        reject(f"pow: the base must be at least 0 for the exponent {exponent}", low < 0)
    if int(exponent) % 2 == 0 or exponent != int(exponent):
        least = torch.clamp(torch.maximum(low, -high), min=0.0)
        low, high = least, torch.maximum(high, -low)
    lower, upper = low**exponent, high**exponent
    if box.rounding == "nearest":
        return wrap(lower, upper, box.rounding)
    if not is_held(exponent, box.dtype):
        narrow = torch.full((), exponent, dtype=torch.float32, device=low.device).double()
        lower, upper = torch.minimum(lower, low**narrow), torch.maximum(upper, high**narrow)
    units, smallest = 2.0**-50, 0.0
    if is_deployed(box.rounding):  # an evaluation errs by units of denormals as well
        units, smallest = 16 * UNIT[box.dtype], torch.finfo(box.dtype).tiny
    floor = 0.0 if int(exponent) % 2 == 0 or exponent != int(exponent) else None
    error = lower.abs().clamp(min=smallest) * units, upper.abs().clamp(min=smallest) * units
    return wrap(*enclose(lower, upper, error, box.dtype, floor=floor), box.rounding)


def root(x: Interval) -> Interval:
    """Square root.

    Not all are correctly rounded (MKL's are not), but off by less than a unit in the last place:
    where a root is no float, evaluations give one of its two neighbours, which the ends hold.

    Raises:
        ValueError: the box holds negative numbers.
    """
    reject("sqrt: the box must be at least 0", x.lower < 0)
    done = passed(CURVES["sqrt"], x)
    if done is not None:
        return done
    low, high = working(x)
    lower, upper = low.sqrt(), high.sqrt()
    if x.rounding == "nearest":
        return wrap(lower, upper, x.rounding)
    with torch.no_grad():
        short_low, short_high = lower.float().double(), upper.float().double()
        # the square of a float32 is exact in float64
        inexact_low = (short_low != lower) | (lower * lower != low)
        inexact_high = (short_high != upper) | (upper * upper != high)
    lower, upper = step_where(lower, upper, inexact_low, inexact_high, x.dtype)
    return wrap(torch.where(lower < 0, 0.0, lower), upper, x.rounding)


def inverse_root(x: Interval) -> Interval:
    """``1 / sqrt(x)``, widened in deployed mode since implementations approximate it."""
    reject("rsqrt: the box must be greater than 0", x.lower <= 0)
    done = passed(CURVES["rsqrt"], x)
    if done is not None:
        return done
    low, high = working(x)
    lower, upper = high.rsqrt(), low.rsqrt()
    if x.rounding == "nearest":
        return wrap(lower, upper, x.rounding)
    units = 2.0**-50 if x.rounding == "real" else 8 * UNIT[x.dtype]
    return wrap(*enclose(lower, upper, (lower * units, upper * units), x.dtype), x.rounding)


def _end(value: Interval | Tensor, side: str) -> Tensor:
    end: Tensor = getattr(value, side) if isinstance(value, Interval) else value
    return end


def _extreme(name: str, choose: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def rule(x: Any, y: Any, *, out: None = None) -> Interval:
        if out is not None:
            raise refuse("out=")
        dtype, rounding = common_dtype(x, y), weakest(x, y)
        if all(isinstance(v, (Interval, Tensor)) and v.dtype == dtype for v in (x, y)):
            lows, highs = ([_end(v, side) for v in (x, y)] for side in ("lower", "upper"))
            return wrap(choose(*lows), choose(*highs), rounding)
        (low_x, high_x), (low_y, high_y), dtype, rounding = _operands(x, y)
        lower, upper = choose(low_x, low_y), choose(high_x, high_y)
        if rounding == "nearest":
            return wrap(lower, upper, rounding)
        return wrap(*step_where(lower, upper, *_never(lower), dtype), rounding)

    rule.__name__ = name
    return rule


def _never(like: Tensor) -> tuple[Tensor, Tensor]:
    no = torch.zeros((), dtype=torch.bool, device=like.device)
    return no, no


maximum = _extreme("maximum", torch.maximum)
minimum = _extreme("minimum", torch.minimum)


def absolute(x: Interval) -> Interval:
    """``|x|``, exact."""
    least = torch.clamp(torch.maximum(x.lower, -x.upper), min=0.0)
    return wrap(least, torch.maximum(x.upper, -x.lower), x.rounding)


RULES: dict[str, Callable[..., Any]] = {
    "add": add,
    "sub": sub,
    "subtract": sub,
    "rsub": rsub,
    "__rsub__": rsub,
    "mul": mul,
    "multiply": mul,
    "div": div,
    "divide": div,
    "true_divide": div,
    "__rdiv__": lambda x, y: div(y, x),
    "__rtruediv__": lambda x, y: div(y, x),
    "neg": neg,
    "negative": neg,
    "positive": lambda x: x,
    "abs": absolute,
    "absolute": absolute,
    "square": square,
    "sqrt": root,
    "rsqrt": inverse_root,
    "reciprocal": reciprocal,
    "pow": power,
    "__pow__": power,
    "maximum": maximum,
    "minimum": minimum,
}
