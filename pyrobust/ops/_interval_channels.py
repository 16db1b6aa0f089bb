"""The image of a box under an affine map of each channel: operator ``interval_channel_affine``.

What batch norm with running statistics is. One native pass forwards and one backwards, where torch
operations in float64 keep several tensors of the box's size and run through each. Derivatives are
those of the ends, the lower one's for a scale of zero; rounding counts as constant.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust.ops._interval_checks import Ends, clipped_at_zero, dense, finite_ends
from pyrobust.ops._interval_conv import map_images
from pyrobust.ops._interval_gradients import native_serves
from pyrobust.ops._kept_memory import new_ends
from pyrobust.ops._library import define
from pyrobust.ops._visible_numbers import all_finite

__all__ = ["channel_affine"]


def channel_affine(
    lower: Tensor, upper: Tensor, channel_map: Tensor, rounding: str, rectified: bool
) -> Ends:
    """``(x - mean) scale + shift`` of each channel; ``finite_ends`` is told of its ends.

    Args:
        lower: ``(B, C, ...)`` lower ends, float32 on the CPU.
        upper: upper ends.
        channel_map: ``(4, C)`` mean, scale, shift and gain (``csrc/interval/elementwise.h``),
            float64; the scale errs by 4 units at most.
        rounding: the promise.
        rectified: whether the box is that of ``max(0, x)``.

    Returns:
        Both ends, differentiable in the three tensors. Where ``"deployed"`` evaluations might
        overflow on their way all are infinite.
    """
    lower, upper = dense(lower), dense(upper)
    out = new_ends(lower)
    finite = _native.interval_channel_affine(
        lower, upper, rectified, dense(channel_map), rounding, *out, torch.get_num_threads()
    )
    finite_ends.note(finite)
    if not finite and all_finite(*out):
        out[0].fill_(-math.inf)
        out[1].fill_(math.inf)
    return out


def _fake(
    lower: Tensor, upper: Tensor, channel_map: Tensor, rounding: str, rectified: bool
) -> Ends:
    out = lower.new_empty(lower.shape)
    return out, torch.empty_like(out)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Ends) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.rectified = inputs[4]


Operands = tuple[Tensor, Tensor, Tensor, Tensor, bool, Tensor]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of the ends and the map


def _backward(ctx: Any, of_lower: Tensor, of_upper: Tensor) -> tuple[Tensor | None, ...]:
    lower, upper, channel_map = ctx.saved_tensors
    operands = of_lower, of_upper, lower, upper, ctx.rectified, channel_map
    wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1], ctx.needs_input_grad[2]
    by = _native_gradients if native_serves(*operands[:4]) else _gradients_in_torch
    return *by(operands, wanted), None, None


def _native_gradients(operands: Operands, wanted: tuple[bool, bool]) -> Gradients:
    of_lower, of_upper, lower, upper, rectified, channel_map = operands
    to_lower = torch.empty_like(lower) if wanted[0] else None
    to_upper = torch.empty_like(lower) if wanted[0] else None
    sums = channel_map.new_empty((2, channel_map.shape[1])) if wanted[1] else None
    _native.interval_channel_affine_backward(
        dense(of_lower), dense(of_upper), dense(lower), dense(upper), rectified,
        dense(channel_map.detach()),
        to_lower, to_upper, sums, torch.get_num_threads(),
    )  # fmt: skip
    if sums is None:
        return to_lower, to_upper, None
    return to_lower, to_upper, _gradient_of_map(sums, channel_map)


def _gradient_of_map(sums: Tensor, channel_map: Tensor) -> Tensor:
    """From the gradients of scale and shift."""
    return torch.stack([-channel_map[1] * sums[1], *sums, torch.zeros_like(sums[0])])


def _gradients_in_torch(operands: Operands, wanted: tuple[bool, bool]) -> Gradients:
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


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    return map_images(torch.ops.pyrobust.interval_channel_affine, info, in_dims, args)


define(
    "interval_channel_affine(Tensor lower, Tensor upper, Tensor channel_map, str rounding,"
    " bool rectified) -> (Tensor, Tensor)",
    channel_affine,
    _fake,
    backward=_backward,
    setup_context=_context,
    vmap=_vmap,
)
