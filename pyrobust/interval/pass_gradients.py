"""The native passes of :mod:`pyrobust.interval.single_pass` as functions that autograd records.

A pass keeps the ends that it was given, in float32, and its backward is one pass too; the rules in
torch operations keep several float64 tensors of their size, and run through each. Derivatives are
those of the ends, the lower one's for a scale of zero; rounding counts as constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust.ops._interval_checks import Ends, clipped_at_zero, dense
from pyrobust.ops._interval_gradients import native_serves

__all__ = ["affine_pass", "sum_pass"]

Pass = tuple[Tensor, Tensor, bool]  # the ends, and whether all are finite


def affine_pass(
    lower: Tensor, upper: Tensor, rectified: bool, channel_map: Tensor, rounding: str
) -> Pass:
    """``(x - mean) scale + shift`` of each channel.

    Args:
        lower: ``(B, C, ...)`` lower ends, dense float32 on the CPU.
        upper: upper ends.
        rectified: whether the box is that of ``max(0, x)``.
        channel_map: ``(3, C)`` mean, scale and shift, float64; the scale errs by 4 units at most.
        rounding: the promise.

    Returns:
        Both ends, differentiable in all three tensors, and whether all are finite.
    """
    operands = lower, upper, channel_map
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
        done: Pass = _Affine.apply(*operands, rectified, rounding)  # type: ignore[no-untyped-call]
        return done
    return _affine(lower, upper, rectified, channel_map, rounding)


def sum_pass(x: tuple[Tensor, Tensor, bool], y: tuple[Tensor, Tensor, bool], rounding: str) -> Pass:
    """The least box of ``x + y``.

    Args:
        x: lower and upper ends, dense float32 on the CPU, and whether a ReLU of them is to come.
        y: likewise, of the same shape.
        rounding: the promise.

    Returns:
        Both ends, differentiable in all four, and whether all are finite.
    """
    ends = *x[:2], *y[:2]
    if torch.is_grad_enabled() and any(end.requires_grad for end in ends):
        done: Pass = _Sum.apply(*ends, x[2], y[2], rounding)  # type: ignore[no-untyped-call]
        return done
    return _sum(*ends, x[2], y[2], rounding)


def _affine(
    lower: Tensor, upper: Tensor, rectified: bool, channel_map: Tensor, rounding: str
) -> Pass:
    out = torch.empty_like(lower), torch.empty_like(lower)
    finite = _native.interval_channel_affine(
        lower, upper, rectified, channel_map, rounding, *out, torch.get_num_threads()
    )
    return *out, finite


def _sum(
    low_x: Tensor,
    high_x: Tensor,
    low_y: Tensor,
    high_y: Tensor,
    clip_x: bool,
    clip_y: bool,
    rounding: str,
) -> Pass:
    out = torch.empty_like(low_x), torch.empty_like(low_x)
    threads = torch.get_num_threads()
    finite = _native.interval_add(
        low_x, high_x, clip_x, low_y, high_y, clip_y, rounding, *out, threads
    )
    return *out, finite


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, lower: Tensor, upper: Tensor, channel_map: Tensor, rectified: bool, rounding: str
    ) -> Pass:
        ctx.save_for_backward(lower, upper, channel_map)
        ctx.rectified = rectified
        return _affine(lower, upper, rectified, channel_map, rounding)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        of_lower, of_upper, _ = grads
        lower, upper, channel_map = ctx.saved_tensors
        operands = of_lower, of_upper, lower, upper, ctx.rectified, channel_map
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        backward = _native_backward if native_serves(*operands[:4]) else _backward_in_torch
        return *backward(operands, wanted), None, None


Operands = tuple[Tensor, Tensor, Tensor, Tensor, bool, Tensor]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of the ends and the map


def _native_backward(operands: Operands, wanted: tuple[bool, bool]) -> Gradients:
    of_lower, of_upper, lower, upper, rectified, channel_map = operands
    to_lower = torch.empty_like(lower) if wanted[0] else None
    to_upper = torch.empty_like(lower) if wanted[0] else None
    sums = channel_map.new_empty((2, channel_map.shape[1])) if wanted[1] else None
    _native.interval_channel_affine_backward(
        dense(of_lower), dense(of_upper), lower, upper, rectified, channel_map.detach(),
        to_lower, to_upper, sums, torch.get_num_threads(),
    )  # fmt: skip
    if sums is None:
        return to_lower, to_upper, None
    return to_lower, to_upper, _gradient_of_map(sums, channel_map)


def _gradient_of_map(sums: Tensor, channel_map: Tensor) -> Tensor:
    """From the gradients of scale and shift."""
    return torch.stack([-channel_map[1] * sums[1], sums[0], sums[1]])


def _backward_in_torch(operands: Operands, wanted: tuple[bool, bool]) -> Gradients:
    """The same in operations that can be differentiated again."""
    of_lower, of_upper, lower, upper, rectified, channel_map = operands
    axes = [0, *range(2, lower.ndim)]
    mean, scale = (row.reshape([1, -1] + [1] * (lower.ndim - 2)) for row in channel_map[:2])
    falls = scale < 0
    of_low = torch.where(falls, of_upper, of_lower).double()
    of_high = torch.where(falls, of_lower, of_upper).double()
    low, high = clipped_at_zero(lower, upper) if rectified else (lower, upper)
    to_lower, to_upper = (of_low * scale).to(lower.dtype), (of_high * scale).to(lower.dtype)
    if rectified:
        to_lower, to_upper = to_lower * (lower > 0), to_upper * (upper > 0)
    of_scale = of_low * (low.double() - mean) + of_high * (high.double() - mean)
    sums = torch.stack([of_scale.sum(axes), (of_low + of_high).sum(axes)])
    to_map = _gradient_of_map(sums, channel_map) if wanted[1] else None
    return (to_lower, to_upper, to_map) if wanted[0] else (None, None, to_map)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        low_x: Tensor,
        high_x: Tensor,
        low_y: Tensor,
        high_y: Tensor,
        clip_x: bool,
        clip_y: bool,
        rounding: str,
    ) -> Pass:
        ctx.clips = clip_x, clip_y
        ctx.save_for_backward(*((low_x, high_x) if clip_x else (None, None)),
                              *((low_y, high_y) if clip_y else (None, None)))  # fmt: skip
        return _sum(low_x, high_x, low_y, high_y, clip_x, clip_y, rounding)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        ends: Ends = grads[:2]
        gradients = [
            None if not needed else grad if end is None else _through_relu(grad, end)
            for needed, grad, end in zip(
                ctx.needs_input_grad[:4], (*ends, *ends), ctx.saved_tensors, strict=True
            )
        ]
        return *gradients, None, None, None


def _through_relu(grad: Tensor, before: Tensor) -> Tensor:
    passed: Tensor = torch.ops.aten.threshold_backward(grad, before, 0)
    return passed
