"""Batch norm and sums of two boxes in one native pass over memory, where plain eager mode allows.

Where a box is that of a convolution which waits (:mod:`pyrobust.interval.deferred`), they become
part of its epilogue instead. Asked before the rules, which go their general way on None:
gradients, other dtypes and layouts, ends that are not finite (which the general way reports).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust.interval import arithmetic, normalization
from pyrobust.interval.finite import check_result
from pyrobust.interval.type import Interval, adopt, rectify, unclipped, weakest

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
    if x.shape != y.shape:
        return None
    for host, other in ((x, y), (y, x)):
        joined = _joined_sum(host, other)
        if joined is not None:
            return joined
    return _sum(x, y)


def _sum(x: Interval, y: Interval) -> Interval | None:
    (low_x, high_x, clip_x), (low_y, high_y, clip_y) = unclipped(x), unclipped(y)
    if not _served(low_x, high_x, low_y, high_y):
        return None
    rounding = weakest(x, y)
    lower, upper = torch.empty_like(low_x), torch.empty_like(low_x)
    finite = _native.interval_add(
        low_x, high_x, clip_x, low_y, high_y, clip_y, rounding, lower, upper,
        torch.get_num_threads(),
    )  # fmt: skip
    return adopt(lower, upper, rounding) if finite else None


def _waits(box: Interval) -> bool:
    """Whether ends of ``box`` wait, and a ReLU of them may be carried out with what follows."""
    return box._deferred is not None and not (
        box._rectified and box._graded != torch.is_grad_enabled()
    )


def _joined_sum(host: Interval, other: Interval) -> Interval | None:
    """The sum as part of the convolution that ``host`` waits for, or None."""
    if not _waits(host) or host.rounding != weakest(host, other):
        return None
    low, high, clip = unclipped(other)  # which may be ends of the host
    waiting = host._deferred
    if waiting is None or not waiting.takes_sum or not _served(low, high):
        return None
    term = adopt(low, high, other.rounding)
    term._rectified, term._graded = clip, torch.is_grad_enabled()
    rectified = host._rectified

    def step(box: Interval) -> Interval:
        box = rectify(box) if rectified else box
        total = _sum(box, term)
        if total is None:
            total = arithmetic.add(box, term)
            check_result("torch.add", total.lower, total.upper, (box, term), takes_infinity=True)
        return total

    return waiting.followed(step, total=(low, high, rectified, clip))  # type: ignore[no-any-return]


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
    # never the layer's own memory, which may change before they are used
    mean, variance, weight, bias = (
        None if value is None else value.detach().to(torch.float64, copy=True)
        for value in (mean, variance, weight, bias)
    )
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = torch.zeros_like(scale) if bias is None else bias
    return mean.contiguous(), scale.contiguous(), shift.contiguous()


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


def _joined_norm(host: Interval, parameters: tuple[Tensor, Tensor, Tensor]) -> Interval | None:
    """The norm as part of the convolution that ``host`` waits for, or None."""
    waiting = host._deferred
    if not _waits(host) or not waiting.takes_norm:
        return None
    rectified = host._rectified

    def step(box: Interval) -> Interval:
        box = rectify(box) if rectified else box
        normed = _normalized(box, unclipped(box), parameters)
        if normed is None:
            shape = [1, -1] + [1] * (box.ndim - 2)
            mean, scale, shift = (value.reshape(shape) for value in parameters)
            normed = normalization.shifted_and_scaled(box, mean, scale, shift)
            name = "torch.nn.functional.batch_norm"
            check_result(name, normed.lower, normed.upper, (box,), takes_infinity=False)
        return normed

    return waiting.followed(step, norm=(*parameters, rectified))  # type: ignore[no-any-return]


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
    shape = input.shape
    if running_mean.shape != shape[1:2] or shape[2:].numel() < _LEAST_PIXELS:
        return None
    parameters = _parameters(running_mean, running_var, weight, bias, eps)
    if parameters is None:
        return None
    joined = _joined_norm(input, parameters)
    if joined is not None:
        return joined
    ends = unclipped(input)
    return _normalized(input, ends, parameters) if _served(*ends[:2]) else None
