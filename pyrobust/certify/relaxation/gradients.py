"""The steps of a backward pass that training spends its time in, with gradients written out.

Recorded operation by operation, a bend keeps four copies of the coefficients and takes twenty
passes over memory to differentiate; these keep the coefficients alone and take about half.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["bend", "relu_chord"]


def relu_chord(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """``(slope, shift)`` of a ReLU's chord over ``[low, high]``: 0 or 1, and 0, where stable.

    Not rounded outward: the shift may be below the valid one by a few units of its last place.
    """
    slope, shift = _ReluChord.apply(low, high)  # type: ignore[no-untyped-call]
    return slope, shift


class _ReluChord(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Any slope is valid with a shift above the value at 0 and at the upper end."""
        over, under = high.clamp(min=0), low.clamp(max=0)
        width = (over - under).clamp_(min=torch.finfo(low.dtype).tiny)
        slope = over / width
        shift = torch.maximum(-slope * under, over - slope * over)
        ctx.save_for_backward(slope, width, (low < 0) & (high > 0))
        return slope, shift

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_slope: Tensor, by_shift: Tensor) -> tuple[Tensor, Tensor]:
        slope, width, crossing = ctx.saved_tensors
        rest = 1 - slope
        rate = by_slope / width
        by_low = slope * (rate - by_shift * slope)
        by_high = rest * (rate + by_shift * rest)
        return by_low.masked_fill_(~crossing, 0.0), by_high.masked_fill_(~crossing, 0.0)


def bend(
    a: Tensor, lower_slope: Tensor, lower_shift: Tensor, upper_slope: Tensor, upper_shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Coefficients before a bend, and ``(S, b)`` what the shifts add.

    Args:
        a: ``(S, b, *value)`` coefficients behind it; positive ones meet the lower line.
        lower_slope: ``(b, *value)``, as the other lines.
        lower_shift: of the lower line.
        upper_slope: of the upper line.
        upper_shift: of the upper line.
    """
    pulled, value = _Bend.apply(
        a.flatten(2), *(k.flatten(1) for k in (lower_slope, lower_shift, upper_slope, upper_shift))
    )  # type: ignore[no-untyped-call]
    return pulled.view_as(a), value


class _Bend(torch.autograd.Function):
    """``(S, b, N)`` coefficients and ``(b, N)`` lines."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, lower: Tensor, low_shift: Tensor, upper: Tensor, up_shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, lower, low_shift, upper, up_shift)
        ctx.lowered = bool(low_shift.any())
        above, below = a.clamp(min=0), a.clamp(max=0)
        value = _times(below, up_shift)
        if ctx.lowered:
            value += _times(above, low_shift)
        return above.mul_(lower).addcmul_(below, upper), value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_pulled: Tensor, by_value: Tensor) -> tuple[Tensor | None, ...]:
        a, lower, low_shift, upper, up_shift = ctx.saved_tensors
        wants = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * 5
        if wants[0]:
            negative = (a < 0).to(a.dtype)
            slopes = torch.addcmul(lower, negative, upper - lower)
            if ctx.lowered:
                shifts = torch.addcmul(low_shift, negative, up_shift - low_shift)
            else:
                shifts = negative.mul_(up_shift)
            found[0] = slopes.mul_(by_pulled).addcmul_(shifts, by_value.unsqueeze(2))
        for index, signed, slope in ((1, "min", 1), (3, "max", 3)):
            if not (wants[slope] or wants[index + 1]):
                continue
            part = a.clamp(**{signed: 0})
            if wants[index + 1]:
                found[index + 1] = torch.einsum("sb,sbn->bn", by_value, part)
            if wants[slope]:
                found[slope] = part.mul_(by_pulled).sum(0)
        return tuple(found)


def _times(a: Tensor, shift: Tensor) -> Tensor:
    return torch.einsum("sbn,bn->sb", a, shift)
