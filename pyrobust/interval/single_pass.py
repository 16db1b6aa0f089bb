"""Batch norm and sums of two boxes in one native pass over memory, where plain eager mode allows.

Asked before the rules, which go their general way on None: gradients, other dtypes and layouts,
ends that are not finite (which the general way reports).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust.interval.type import Interval, adopt, unclipped, weakest

__all__ = ["add", "batch_norm"]

_LEAST_PIXELS = 8  # of a channel: shorter loops are not worth their calls
_MOST_DIMENSIONS = 8  # of the binding


def _served(*tensors: Any) -> bool:
    """Whether the passes take these: dense float32 on the CPU, and nothing to differentiate."""
    graded = torch.is_grad_enabled()
    return all(
        type(tensor) is Tensor
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and tensor.ndim <= _MOST_DIMENSIONS
        and not (graded and tensor.requires_grad)
        for tensor in tensors
    )


def add(x: Any, y: Any, *, alpha: float = 1, out: None = None) -> Interval | None:
    """The least box of ``x + y``, or None."""
    if type(x) is not Interval or type(y) is not Interval or alpha != 1 or out is not None:
        return None
    (low_x, high_x, clip_x), (low_y, high_y, clip_y) = unclipped(x), unclipped(y)
    if low_x.shape != low_y.shape or not _served(low_x, high_x, low_y, high_y):
        return None
    rounding = weakest(x, y)
    lower, upper = torch.empty_like(low_x), torch.empty_like(low_x)
    finite = _native.interval_add(
        low_x, high_x, clip_x, low_y, high_y, clip_y, rounding, lower, upper,
        torch.get_num_threads(),
    )  # fmt: skip
    return adopt(lower, upper, rounding) if finite else None


def _parameters(
    mean: Any, variance: Any, weight: Any, bias: Any, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Mean, scale and shift of each channel in float64; the scale errs by 4 units at most."""
    graded = torch.is_grad_enabled()
    for value in (mean, variance, weight, bias):
        if value is None:
            continue
        if not isinstance(value, Tensor) or not value.is_cpu or value.shape != mean.shape:
            return None
        if graded and value.requires_grad:
            return None
    scale = (variance.double() + eps).rsqrt()
    scale = scale if weight is None else scale * weight.double()
    shift = torch.zeros_like(scale) if bias is None else bias.double()
    return mean.double().contiguous(), scale.contiguous(), shift.contiguous()


@torch.no_grad()
def _normalized(
    box: Interval, ends: tuple[Tensor, Tensor, bool], parameters: tuple[Tensor, Tensor, Tensor]
) -> Interval | None:
    low, high, clip = ends
    lower, upper = torch.empty_like(low), torch.empty_like(low)
    finite = _native.interval_channel_affine(
        low, high, clip, *parameters, box.rounding, lower, upper, torch.get_num_threads()
    )
    return adopt(lower, upper, box.rounding) if finite else None


def batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Interval | None:
    """Batch norm with running statistics, or None."""
    if type(input) is not Interval or training or not isinstance(running_mean, Tensor):
        return None
    if not isinstance(running_var, Tensor) or input.ndim < 3:
        return None
    ends = unclipped(input)
    low, high = ends[:2]
    channels = (low.shape[1],)
    if running_mean.shape != channels or low[0:1, 0:1].numel() < _LEAST_PIXELS:
        return None
    if not _served(low, high):
        return None
    parameters = _parameters(running_mean, running_var, weight, bias, eps)
    return None if parameters is None else _normalized(input, ends, parameters)
