"""Batch norm and sums of two boxes in one native pass over memory, where plain eager mode allows.

Where a box is that of a convolution which waits (:mod:`pyrobust.interval.deferred`), they become
part of its epilogue instead. Asked before the rules, which go their general way on None:
transforms, other dtypes and layouts, ends that are not finite (which the general way reports).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust.interval import arithmetic, normalization
from pyrobust.interval.finite import check_result
from pyrobust.interval.pass_gradients import affine_pass, sum_pass
from pyrobust.interval.type import Interval, adopt, rectify, unclipped, weakest
from pyrobust.ops._interval_checks import dense

__all__ = ["add", "batch_norm"]

_MOST_DIMENSIONS = 8  # of the binding


def _served(*tensors: Any) -> bool:
    """Whether the passes take these: dense float32 on the CPU."""
    return all(
        type(tensor) is Tensor
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and tensor.ndim <= _MOST_DIMENSIONS
        for tensor in tensors
    )


def _graded(*tensors: Tensor | None) -> bool:
    """Whether gradients of one of these are recorded."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
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
    ends_x, ends_y = unclipped(x), unclipped(y)
    if not _served(*ends_x[:2], *ends_y[:2]):
        return None
    rounding = weakest(x, y)
    lower, upper, finite = sum_pass(ends_x, ends_y, rounding)
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
    if waiting is None or not waiting.takes_sum or not _served(low, high) or _graded(low, high):
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


def _channel_map(mean: Tensor, variance: Any, weight: Any, bias: Any, eps: float) -> Tensor | None:
    """``(4, C)`` mean, scale, shift and gain in float64, or None.

    The scale errs by 4 units at most. Never the layer's own memory, which may change before they
    are used.
    """
    given = (mean, variance, weight, bias)
    for value in given:
        if value is None:
            continue
        if not isinstance(value, Tensor) or not value.is_cpu or value.shape != mean.shape:
            return None
    if _graded(*given):
        kinds = torch.float64, torch.float32
        return normalization.recorded_map(mean, variance, weight, bias, eps, kinds)
    types = {value.dtype for value in given if value is not None}
    alike = types in ({torch.float32}, {torch.float64})

    def plain(value: Tensor) -> Tensor:
        return dense(value.detach() if alike else value.detach().double())

    numbers = torch.empty((4, mean.shape[0]), dtype=torch.float64)
    slope = None if weight is None else plain(weight)
    shift = None if bias is None else plain(bias)
    _native.interval_batch_norm_map(plain(mean), plain(variance), slope, shift, eps, numbers)
    return numbers


def _normalized(
    box: Interval, ends: tuple[Tensor, Tensor, bool], channel_map: Tensor
) -> Interval | None:
    lower, upper, finite = affine_pass(*ends, channel_map, box.rounding)
    return adopt(lower, upper, box.rounding) if finite else None


def _joined_norm(host: Interval, channel_map: Tensor) -> Interval | None:
    """The norm as part of the convolution that ``host`` waits for, or None."""
    waiting = host._deferred
    if not _waits(host) or not waiting.takes_norm or _graded(channel_map):
        return None
    rectified = host._rectified

    def step(box: Interval) -> Interval:
        box = rectify(box) if rectified else box
        normed = _normalized(box, unclipped(box), channel_map)
        if normed is None:
            normed = normalization.shifted_and_scaled(box, channel_map)
            name = "torch.nn.functional.batch_norm"
            check_result(name, normed.lower, normed.upper, (box,), takes_infinity=False)
        return normed

    return waiting.followed(step, norm=(channel_map, rectified))  # type: ignore[no-any-return]


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
    if not isinstance(running_var, Tensor) or input.ndim < 2:
        return None
    if running_mean.shape != input.shape[1:2]:
        return None
    channel_map = _channel_map(running_mean, running_var, weight, bias, eps)
    if channel_map is None:
        return None
    joined = _joined_norm(input, channel_map)
    if joined is not None:
        return joined
    ends = unclipped(input)
    return _normalized(input, ends, channel_map) if _served(*ends[:2]) else None
