"""Interval products in torch operations: float64 tensors, and devices without a kernel of ours.

The same centre-radius method as ``csrc/interval/interval.h``, computed in float64 and rounded
outward to the input's dtype. The matrix product may sum in any order, so the centre's error is
bounded by ``gamma_{K+2}`` of float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyrobust.ops._interval_checks import is_deployed, operand_error

__all__ = ["half_step_of_int8", "largest_magnitude", "outward_image", "round_outward"]

_UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
_INFINITY = float("inf")

Product = Callable[[Tensor, Tensor], Tensor]


def _gamma(terms: int, unit: float) -> float:
    return terms * unit / (1.0 - terms * unit) * (1.0 + 2.0**-48)


def _any_order(terms: int, unit: float, rounding: str) -> tuple[float, float]:
    """``A`` and ``H`` of ``csrc/interval/interval.h``: what evaluations in any order may err by."""
    if not is_deployed(rounding):
        return 0.0, 0.0
    half = 0.5 * _gamma(terms + 1, unit)
    moved = (2.0 + operand_error(rounding)) * operand_error(rounding)
    of_terms = moved + unit * (1.0 + moved) + half * (1.0 + 2.0 * moved)
    return of_terms * (1.0 + 2.0**-48), half


def round_outward(lower: Tensor, upper: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Float64 ends converted to ``dtype``: the nearest numbers of ``dtype`` that are not inside.

    So the ends rise with what they are made of, and a number of ``dtype`` stays, denormals too. A
    processor that flushes denormals (``torch.set_flush_denormal``) takes an end and its neighbour
    for zero, whether they are inside or not: such an end moves to the smallest normal number of its
    side or, where zero is on its outer side, becomes zero. That is sound, and rises, as well.
    """
    low, high = lower.to(dtype), upper.to(dtype)
    infinity = torch.full((), _INFINITY, dtype=dtype, device=low.device)
    tiny = torch.finfo(dtype).tiny
    low = torch.where(low.to(lower.dtype) > lower, torch.nextafter(low, -infinity), low)
    high = torch.where(high.to(upper.dtype) < upper, torch.nextafter(high, infinity), high)
    # a neighbour is not inside, unless it is read as zero
    low = torch.where(low.to(lower.dtype) > lower, -tiny, low)
    high = torch.where(high.to(upper.dtype) < upper, tiny, high)
    return low, high


def outward_image(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    product: Product,
    *,
    terms: int,
    rounding: str,
    half_step: Tensor | None = None,
    packed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Bounds of ``product(x, weight) + bias`` over the box, for a product linear in both.

    Args:
        lower: the box's lower ends, float32 or float64.
        upper: the upper ends, same shape and dtype.
        weight: weights, same dtype.
        bias: broadcastable to the product's shape, or None.
        product: linear in each argument, with float64 operands.
        terms: how many products one output sums, at most ``2**21``.
        rounding: the promise, as for the operators.
        half_step: how far the layer may move an input before it multiplies; broadcastable to it.
        packed: whether the weight is a scale times integers up to 511, so that more may be flushed.
    """
    dtype = lower.dtype
    low, high, matrix = lower.double(), upper.double(), weight.double()
    shift = torch.zeros((), dtype=low.dtype, device=low.device) if bias is None else bias.double()
    centre = torch.where(low == high, low, low * 0.5 + high * 0.5)
    radius = torch.maximum(high - centre, centre - low)
    if half_step is not None:
        radius = radius + half_step
    if rounding == "nearest":
        middle, reach = product(centre, matrix) + shift, product(radius, matrix.abs())
        return _finite_or_everything(middle - reach, middle + reach, middle, reach, dtype)
    own = _gamma(terms + 2, _UNIT[torch.float64])
    of_terms, half = _any_order(terms, _UNIT[dtype], rounding)
    tiny = torch.finfo(dtype).tiny
    slack = 1.0 + 2.0**-49
    of_centre = own * (1.0 + half) + of_terms
    radius = radius * (slack * (1.0 + of_terms + half)) + centre.abs() * (slack * of_centre) + tiny
    middle = product(centre, matrix) + shift
    # Flushed denormals and underflow, as in interval.h; the largest |x| serves every output.
    flush = 4.0 * tiny * (terms + 8) * (512.0 if packed and is_deployed(rounding) else 1.0)
    largest = largest_magnitude(low, high, None)
    reach = product(radius, matrix.abs()) / (1.0 - own)
    reach = reach + (shift.abs() + middle.abs() * slack) * half
    reach = (reach + flush * (1.0 + 2.0 * largest)) * (slack * slack)
    if operand_error(rounding):  # an operand next to the largest number rounds to infinity
        reach = torch.where(largest < torch.finfo(dtype).max / 4, reach, _INFINITY)
    if half:
        reach = torch.where(reach < half * torch.finfo(dtype).max / 4, reach, _INFINITY)
    infinity = torch.full((), _INFINITY, dtype=torch.float64, device=low.device)
    below = torch.nextafter(torch.nextafter(middle, -infinity) - reach, -infinity)
    above = torch.nextafter(torch.nextafter(middle, infinity) + reach, infinity)
    return _finite_or_everything(below, above, middle, reach, dtype)


def largest_magnitude(lower: Tensor, upper: Tensor, axes: tuple[int, ...] | None) -> Tensor:
    """The largest ``|x|`` of the box over ``axes`` (None: over all), kept as axes of size 1."""
    magnitude = torch.maximum(lower.abs(), upper.abs())
    if magnitude.numel() == 0:
        return magnitude.new_zeros(())
    return magnitude.amax() if axes is None else magnitude.amax(axes, keepdim=True)


def half_step_of_int8(lower: Tensor, upper: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Half a step of the dynamic 8-bit rounding over ``axes``, with room for its own rounding."""
    return largest_magnitude(lower.double(), upper.double(), axes) * (0.5 / 127 * (1 + 2.0**-20))


def _finite_or_everything(
    lower: Tensor, upper: Tensor, middle: Tensor, reach: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    bounded = torch.isfinite(middle) & torch.isfinite(reach)
    low, high = round_outward(lower, upper, dtype)
    return torch.where(bounded, low, -_INFINITY), torch.where(bounded, high, _INFINITY)
