"""The native passes of :mod:`pyrobust.interval.single_pass` as functions that autograd records.

Where it records nothing, they are called straight. Rounding counts as constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust.ops._interval_channels import channel_affine
from pyrobust.ops._interval_checks import Ends, finite_ends

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
        channel_map: ``(4, C)`` mean, scale, shift and gain (``csrc/interval/elementwise.h``),
            float64; the scale errs by 4 units at most.
        rounding: the promise.

    Returns:
        Both ends, differentiable in all three tensors, and whether all are finite.
    """
    finite_ends.start()
    operands = lower, upper, channel_map, rounding, rectified
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands[:3]):
        low, high = torch.ops.pyrobust.interval_channel_affine(*operands)
    else:
        low, high = channel_affine(*operands)
    return low, high, finite_ends.all is True


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
