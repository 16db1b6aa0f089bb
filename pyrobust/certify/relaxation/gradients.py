"""The steps of a backward pass that training spends its time in, with gradients written out.

Recorded operation by operation, a bend keeps four copies of the coefficients and takes twenty
passes over memory to differentiate. Here a bend and the layer before it are one step that keeps the
coefficients behind the bend alone: those between are made again when the gradient is taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyrobust.certify.relaxation.bent import Lines, bent, unbent
from pyrobust.certify.relaxation.layers import Layer

__all__ = ["bend", "bend_and_pull", "pull", "relu_chord"]


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


# -- a layer -------------------------------------------------------------------------------------


def pull(a: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer) -> tuple[Tensor, Tensor]:
    """Coefficients before a layer, and ``(S, b)`` what its biases add.

    Args:
        a: ``(S, b, *value)`` coefficients of its result.
        weight: of the layer.
        bias: of the layer, ``(K,)``, or None.
        layer: which it is.
    """
    rows = a.flatten(0, 1)
    pulled, value = _Pull.apply(rows, weight, bias, layer)  # type: ignore[no-untyped-call]
    return pulled.unflatten(0, a.shape[:2]), value.view(a.shape[:2])


class _Pull(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows, weight, bias)
        ctx.layer = layer
        value = rows.new_zeros(len(rows)) if bias is None else layer.sums(rows) @ bias
        return layer.pull(rows, weight), value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_pulled: Tensor, by_value: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias = ctx.saved_tensors
        layer, wants = ctx.layer, ctx.needs_input_grad
        by_rows = by_weight = by_bias = None
        if wants[0]:
            by_rows = layer.by_rows(by_pulled, weight)
            if bias is not None:
                by_rows = layer.add_biases(by_rows, by_value, bias)
        if wants[1]:
            by_weight = layer.by_weight(by_pulled, rows, weight)
        if wants[2]:
            by_bias = by_value @ layer.sums(rows)
        return by_rows, by_weight, by_bias, None


# -- a bend --------------------------------------------------------------------------------------


def bend(a: Tensor, *lines: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients before a bend, and ``(S, b)`` what the shifts add.

    Args:
        a: ``(S, b, *value)`` coefficients behind it; positive ones meet the lower line.
        lines: ``(b, *value)`` slope and shift of the lower line, then of the upper one.
    """
    flat, bent = _in_memory_order(a, lines)
    pulled, value = _Bend.apply(*flat)  # type: ignore[no-untyped-call]
    return bent(pulled), value


def bend_and_pull(
    a: Tensor, lines: Lines, weight: Tensor, bias: Tensor | None, layer: Layer
) -> tuple[Tensor, Tensor]:
    """:func:`bend` and then :func:`pull` through the layer before it."""
    flat, _ = _in_memory_order(a, lines)
    pulled, value = _BendAndPull.apply(*flat, weight, bias, layer, a.shape[2:])  # type: ignore[no-untyped-call]
    return pulled.unflatten(0, a.shape[:2]), value


def _in_memory_order(a: Tensor, lines: tuple[Tensor, ...]) -> tuple[list[Tensor], Any]:
    """``(S, b, N)`` coefficients and ``(b, N)`` lines, and what restores the axes.

    Coefficients of two-dimensional values come channels last.
    """
    if a.ndim != 5:
        shape = a.shape
        return [a.flatten(2), *(k.flatten(1) for k in lines)], lambda flat: flat.view(shape)
    a = a.movedim(2, 4)
    shape = a.shape
    flat = [a.flatten(2), *(k.movedim(1, 3).flatten(1) for k in lines)]
    return flat, lambda flat: flat.view(shape).movedim(4, 2)


class _Bend(torch.autograd.Function):
    """``(S, b, N)`` coefficients and ``(b, N)`` lines."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, *lines: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, *lines)
        return bent(a, _four(lines), None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_pulled: Tensor, by_value: Tensor) -> tuple[Tensor | None, ...]:
        a, *lines = ctx.saved_tensors
        wants = (*ctx.needs_input_grad, False)
        by_a = torch.empty_like(a) if wants[0] else None
        return unbent(a, _four(lines), None, by_pulled, by_value, by_a, wants)[:5]


class _BendAndPull(torch.autograd.Function):
    """The same, and the layer of which the bend's input is the result."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *lines, weight, bias, layer, shape = rest
        ctx.save_for_backward(a, *lines, weight, bias)
        ctx.layer, ctx.shape = layer, shape
        bends, value = bent(a, _four(lines), layer.everywhere(bias))
        return layer.pull(layer.rows(bends, shape), weight), value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_pulled: Tensor, by_value: Tensor) -> tuple[Tensor | None, ...]:
        a, *rest, weight, bias = ctx.saved_tensors
        lines, layer, wants = _four(rest), ctx.layer, ctx.needs_input_grad
        by_weight = by_bias = None
        shift = layer.everywhere(bias)
        if wants[5]:
            rows = layer.rows(bent(a, lines, None)[0], ctx.shape)
            by_weight = layer.by_weight(by_pulled, rows, weight)
            del rows
        by_bent = layer.flat(layer.by_rows(by_pulled, weight)).reshape(a.shape)
        by_a = by_bent if wants[0] else None  # in the memory of the other
        found = unbent(a, lines, shift, by_bent, by_value, by_a, (*wants[:5], wants[6]))
        if found[5] is not None:
            by_bias = layer.of_biases(found[5].sum(0), len(bias))
        return *found[:5], by_weight, by_bias, None, None


def _four(lines: Any) -> Lines:
    first, second, third, fourth = lines
    return first, second, third, fourth
