"""Rounding outward in torch operations: what every rule outside the kernels rests on.

A rule evaluates the ends of its result in float64, with a bound on the error of that evaluation,
and :func:`enclose` steps outward by the bound and rounds outward to the dtype of the interval.
Sums, products, quotients and roots step only where they are inexact. Gradients pass straight
through: rounding counts as constant.

Assumption: the processor keeps denormals (torch's default; ``torch.set_flush_denormal(False)``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrobust.ops._interval_checks import operand_error
from pyrobust.ops._interval_fallback import round_outward
from pyrobust.ops._library import differentiation_transforms

__all__ = [
    "UNIT",
    "Ends",
    "bound_of_roundings",
    "enclose",
    "error_of_products",
    "infinite_where_beyond",
    "step_where",
    "straight_through",
    "sum_ends",
]

Ends = tuple[Tensor, Tensor]
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
_LEAST = 2.0**-1021  # slack for results that underflow in float64; a normal number, never flushed


def bound_of_roundings(count: int, dtype: torch.dtype) -> float:
    """``gamma_n``: relative error of a product of ``count`` factors ``1 + d``, ``|d| <= u``."""
    total = count * UNIT[dtype]
    return total / (1.0 - total) * (1.0 + 2.0**-48)


def error_of_products(count: int, dtype: torch.dtype, rounding: str) -> float:
    """Relative error of sums of products after ``count`` roundings, operands rounded first.

    ``(1 + v)^2 (1 + gamma_n) - 1``, where ``v`` is the operands' error in the arithmetic that
    ``rounding`` promises to cover.
    """
    operands = (1.0 + operand_error(rounding)) ** 2
    return (operands * (1.0 + bound_of_roundings(count, dtype)) - 1.0) * (1.0 + 2.0**-40)


def infinite_where_beyond(size: Tensor, dtype: torch.dtype) -> Tensor:
    """A slack for deployed mode: infinite where intermediate results of ``size`` may overflow.

    An evaluation in ``dtype`` may overflow on the way to a result that is far from it, and then
    returns anything; 0 elsewhere.
    """
    return torch.where(size < torch.finfo(dtype).max / 4, 0.0, float("inf"))


def straight_through(value: Tensor, exact: Tensor) -> Tensor:
    """The numbers of ``exact`` with the gradient of ``value``."""
    if not value.requires_grad and not differentiation_transforms():
        return exact
    # value - value is exactly 0 where finite, so the sum is `exact` to the bit
    return exact.detach() + torch.nan_to_num(value - value.detach(), nan=0.0)


def _everything_for_nan(low: Tensor, high: Tensor) -> Ends:
    infinity = float("inf")
    return torch.where(low.isnan(), -infinity, low), torch.where(high.isnan(), infinity, high)


def _step(low: Tensor, high: Tensor) -> Ends:
    infinity = torch.full((), float("inf"), dtype=low.dtype, device=low.device)
    return torch.nextafter(low, -infinity), torch.nextafter(high, infinity)


def enclose(
    lower: Tensor,
    upper: Tensor,
    error: Tensor | float | tuple[Tensor | float, Tensor | float],
    dtype: torch.dtype,
    *,
    floor: float | None = None,
    ceiling: float | None = None,
) -> Ends:
    """Ends in ``dtype`` that contain ``[lower - error, upper + error]``.

    Args:
        lower: computed lower ends, float64.
        upper: computed upper ends, float64.
        error: bound on ``|computed - exact|`` of both, or one for each.
        dtype: of the result, float32 or float64.
        floor: the exact result is never below it.
        ceiling: the exact result is never above it.
    """
    errors = error if isinstance(error, tuple) else (error, error)
    with torch.no_grad():
        slack = [
            e.detach() * (1 + 2.0**-50) + _LEAST if isinstance(e, Tensor) else e + _LEAST
            for e in errors
        ]
        ends = _everything_for_nan(*_step(lower.detach() - slack[0], upper.detach() + slack[1]))
        low, high = round_outward(*ends, dtype)
        if floor is not None:
            low = torch.where(low < floor, floor, low)
        if ceiling is not None:
            high = torch.where(high > ceiling, ceiling, high)
    return straight_through(lower.to(dtype), low), straight_through(upper.to(dtype), high)


def step_where(
    lower: Tensor, upper: Tensor, moved_low: Tensor, moved_high: Tensor, dtype: torch.dtype
) -> Ends:
    """Ends of a correctly rounded operation, one step further out where the masks say so.

    Args:
        lower: correctly rounded lower ends, float64.
        upper: correctly rounded upper ends, float64.
        moved_low: where rounding may have raised a lower end.
        moved_high: where rounding may have lowered an upper end.
        dtype: of the result.
    """
    with torch.no_grad():
        down, up = _step(lower.detach(), upper.detach())
        ends = torch.where(moved_low, down, lower), torch.where(moved_high, up, upper)
        low, high = round_outward(*_everything_for_nan(*ends), dtype)
    return straight_through(lower.to(dtype), low), straight_through(upper.to(dtype), high)


def sum_ends(low: Ends, high: Ends, dtype: torch.dtype) -> Ends:
    """``low[0] + low[1]`` rounded down and ``high[0] + high[1]`` rounded up, from float64."""
    lower, upper = low[0] + low[1], high[0] + high[1]
    with torch.no_grad():
        # an overflow to the wrong side moves back too; an infinite operand stays
        overflow_low = (lower == float("inf")) & torch.isfinite(low[0]) & torch.isfinite(low[1])
        overflow_high = (upper == -float("inf")) & torch.isfinite(high[0]) & torch.isfinite(high[1])
        moved_low = (_error_of_sum(*low, lower) < 0) | overflow_low
        moved_high = (_error_of_sum(*high, upper) > 0) | overflow_high
    return step_where(lower, upper, moved_low, moved_high, dtype)


def _error_of_sum(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    """``(a + b) - total`` exactly, for ``total = fl(a + b)`` (Knuth's two-sum)."""
    part = total - a
    return (a - (total - part)) + (b - part)
