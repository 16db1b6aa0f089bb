r"""Rules of normalisation: batch norm with running statistics; layer, group, instance and RMS norm.

With running statistics the layer is affine. A norm over the elements of its own input computes
``y_i = d_i / sqrt((d_i^2 + R_i) / n + eps)``, where ``d = x - mean(x)`` (RMS norm: ``d = x``) and
``R_i`` sums the squares of the other elements. ``y_i`` rises in ``d_i``, and its magnitude falls in
``R_i``; so the ends follow from the ends of ``d_i`` and ``R_i``. As the ``d_j`` sum to zero,
``R_i >= d_i^2 / (n - 1)`` (Cauchy-Schwarz), which bounds ``|y_i|`` by ``sqrt(n - 1)`` for any box.

In deployed mode ``d`` has the error of a rounded mean, so the ``d_j`` sum to zero but for that, and
the variance has the error of any way to sum it, but is taken for no less than zero (a sum of
squares, or cut there).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrobust.interval.arithmetic import add, mul
from pyrobust.interval.errors import check_shape, where
from pyrobust.interval.operands import Rule, refuse, require_box, working
from pyrobust.interval.outward import (
    UNIT,
    Ends,
    bound_of_roundings,
    enclose,
    infinite_where_beyond,
)
from pyrobust.interval.type import Interval, wrap
from pyrobust.ops._interval_checks import is_deployed

__all__ = ["RULES", "normalized", "recorded_map", "shifted_and_scaled", "with_weight"]


def _plain(what: str, *values: Any) -> None:
    if any(isinstance(value, Interval) for value in values):
        raise refuse(f"{what} with intervals as statistics, weight or bias")


def _check_channels(name: str, box: Interval, *values: Tensor | None) -> None:
    """Raise ValueError unless ``values`` hold one number for each channel of ``box``."""
    check_shape(name, box.ndim >= 2, "an input of two or more dimensions", box.shape)
    channels = box.shape[1]
    for value in values:
        if value is not None:
            requirement = f"{channels} numbers, one a channel, in each weight, bias and statistic"
            check_shape(name, value.numel() == channels, requirement, value.shape)


def _check_ending(name: str, box: Interval, ending: Sequence[int]) -> None:
    accepted = tuple(box.shape[box.ndim - len(ending) :]) == tuple(ending)
    check_shape(name, accepted, f"an input whose shape ends in {tuple(ending)}", box.shape)


def _batch_norm(
    input: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Interval:
    box = require_box(input, "batch_norm")
    _plain("batch_norm", running_mean, running_var, weight, bias)
    if training or running_mean is None or running_var is None:
        raise ValueError(
            "Interval: batch norm must run in evaluation mode with running statistics; it would "
            f"use those of the batch{where()}. Call model.eval() first."
        )
    _check_channels("batch_norm", box, running_mean, running_var, weight, bias)
    if torch.compiler.is_compiling() and box.dtype == torch.float32 and box.device.type == "cpu":
        return _batch_norm_by_operator(box, running_mean, running_var, weight, bias, eps)
    wide = box.dtype if box.rounding == "nearest" else torch.float64
    numbers = recorded_map(running_mean, running_var, weight, bias, eps, (wide, box.dtype))
    return shifted_and_scaled(box, numbers)


def _batch_norm_by_operator(
    box: Interval,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Interval:
    """In compiled code, what plain eager mode runs: one pass instead of a dozen in float64."""
    numbers = recorded_map(mean, variance, weight, bias, eps, (torch.float64, box.dtype))
    ends = box.lower, box.upper
    lower, upper = torch.ops.pyrobust.interval_channel_affine(*ends, numbers, box.rounding, False)
    return wrap(lower, upper, box.rounding)


def recorded_map(
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> Tensor:
    """``(4, C)`` mean, scale, shift and gain of batch norm, as autograd records them.

    Args:
        mean: ``C`` numbers, as are the others.
        variance: running variance.
        weight: None for ones.
        bias: None for zeros.
        eps: added to the variance.
        dtypes: of the result, and of evaluations that the gain is for.
    """
    wide, narrow = dtypes
    root = (variance.to(wide) + eps).rsqrt()
    scale = root if weight is None else root * weight.to(wide)
    shift = torch.zeros_like(scale) if bias is None else bias.to(wide)
    gain = _gain(variance, weight, eps, narrow).to(wide)
    return torch.stack([row.reshape(-1) for row in (mean.to(wide), scale, shift, gain)])


def _gain(variance: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """``gain_of`` of ``csrc/interval/elementwise.h``, which has the proof."""
    with torch.no_grad():
        tiny, wide = torch.finfo(dtype).tiny, variance.detach().double()
        size = torch.ones_like(wide) if weight is None else weight.detach().double().abs()
        left = torch.where(wide < tiny, 0.0, wide) + (eps if eps >= tiny else 0.0)
        root = left.rsqrt()
        of_sum = torch.where(left == wide + eps, 0.0, size * root**3)
        gain = torch.maximum(torch.maximum(size, root), of_sum)
        return torch.where(left >= tiny, gain, math.inf)


def shifted_and_scaled(box: Interval, channel_map: Tensor) -> Interval:
    """``(x - mean) scale + shift`` of ``(4, C)`` numbers, in float64 but in nearest mode.

    The scale has a relative error of 4 units of float64. The errors are those of ``set_errors`` in
    ``csrc/interval/elementwise.cpp``.
    """
    shape = [1, -1] + [1] * (box.ndim - 2)
    mean, scale, shift, gain = (row.reshape(shape) for row in channel_map)
    low, high = working(box)
    a, b = (low - mean) * scale, (high - mean) * scale
    lower, upper = torch.minimum(a, b), torch.maximum(a, b)
    if box.rounding == "nearest":
        return wrap(lower + shift, upper + shift, box.rounding)
    with torch.no_grad():
        size = torch.maximum(a.abs(), b.abs())
        error = 2.0**-49 * size + 2.0**-52 * shift.abs()
        if is_deployed(box.rounding):
            # also for x alpha + (shift - mean alpha), which cancels where x is close to mean
            reach, slope = torch.maximum(low.abs(), high.abs()) + mean.abs(), scale.abs()
            error = error + 12 * UNIT[box.dtype] * (reach * slope + shift.abs())
            tiny = torch.finfo(box.dtype).tiny
            error = error + tiny * (reach * (1 + gain) + 8 + 2 * slope + gain)
            largest = torch.maximum(reach, reach * torch.maximum(slope, gain) + shift.abs())
            error = error + infinite_where_beyond(largest, box.dtype)
    return wrap(*enclose(lower + shift, upper + shift, error, box.dtype), box.rounding)


def normalized(box: Interval, dims: Sequence[int], eps: float, *, centred: bool) -> Interval:
    """``d / sqrt(mean(d^2) + eps)`` over ``dims``, with ``d = x - mean(x)`` or ``d = x``.

    Args:
        box: the input.
        dims: dimensions that are normalised together.
        eps: added to the variance, ``>= 0``.
        centred: whether the mean is subtracted.
    """
    low, high = working(box)
    count = math.prod([box.shape[d] for d in dims])  # dynamo traces no generator
    noisy = torch.float64 if not is_deployed(box.rounding) else box.dtype
    unit = 0.0 if box.rounding == "nearest" else bound_of_roundings(count + 16, noisy)
    # what each of the sums loses, and each product, where denormals are flushed
    flushed = torch.finfo(box.dtype).tiny * (count + 8) if is_deployed(box.rounding) else 0.0
    size = torch.maximum(low.abs(), high.abs()).detach()
    drift = torch.zeros((), dtype=low.dtype, device=low.device)
    if centred:
        low, high = _centred(low, high, dims, count)
        slack = unit * (size + size.mean(list(dims), keepdim=True)) + flushed
        low, high = low - slack, high + slack
        if is_deployed(box.rounding):
            drift = slack.sum(list(dims), keepdim=True)
    squares, lost = _squares_of_others(low, high, size, dims, unit, 2 * flushed)
    balance = (drift, lost if is_deployed(box.rounding) else drift) if centred else None
    lower = _quotient(low, squares, count, eps, balance)
    upper = _quotient(high, (squares[1], squares[0]), count, eps, balance)
    if box.rounding == "nearest":
        return wrap(lower, upper, box.rounding)
    with torch.no_grad():
        relative = 2 * bound_of_roundings(16, torch.float64) + 8 * unit
        tiny = torch.finfo(box.dtype).tiny
        errors = lower.abs() * relative + tiny, upper.abs() * relative + tiny
        if is_deployed(box.rounding):
            # squares of deviations, up to twice as far as x, may be summed before the division
            total = 4 * size.square().sum(list(dims), keepdim=True)
            error = torch.maximum(*errors) + 4 * tiny + infinite_where_beyond(total, box.dtype)
            fewest = squares[0]
            beyond = [
                _beyond_end(end, inner.clamp(min=0.0), fewest, count, eps, balance)
                for end, inner in ((low, -high), (high, low))
            ]
            errors = error + beyond[0], error + beyond[1]
    return wrap(*enclose(lower, upper, errors, box.dtype), box.rounding)


def _centred(low: Tensor, high: Tensor, dims: Sequence[int], count: int) -> Ends:
    """Ends of ``x_i - mean(x)``: the element itself counts with ``1 - 1/n``."""
    axes = list(dims)
    mean_low, mean_high = low.mean(axes, keepdim=True), high.mean(axes, keepdim=True)
    own = (high - low) / count
    return low - mean_high + own, high - mean_low - own


def _squares_of_others(
    low: Tensor, high: Tensor, size: Tensor, dims: Sequence[int], unit: float, flushed: float
) -> tuple[Ends, Tensor]:
    """Ends of ``R_i``, the sum of the squares of the other elements, and their slack.

    ``flushed`` is what flushing of denormals may take from the sum.
    """
    axes = list(dims)
    least = torch.clamp(torch.maximum(low, -high), min=0.0).square()
    most = torch.maximum(high, -low).square()
    total_low, total_high = least.sum(axes, keepdim=True), most.sum(axes, keepdim=True)
    # taking the own term out of the sum leaves the rounding error of the sum; implementations
    # that subtract the squared mean from the mean square (deployed mode) err by that of sum x^2
    slack = 4 * unit * (total_high.detach() + size.square().sum(axes, keepdim=True)) + flushed
    fewest = (total_low - least).clamp(min=0.0) - slack
    if not flushed:  # real mode; an evaluation may also lose part of the element's own square
        fewest = fewest.clamp(min=0.0)
    return (fewest, (total_high - most).clamp(min=0.0) + slack), slack


def _quotient(
    end: Tensor, squares: Ends, count: int, eps: float, balance: tuple[Tensor, Tensor] | None
) -> Tensor:
    """``d / sqrt((d^2 + R) / n + eps)`` for the ``R`` that makes it most extreme.

    ``squares[1]`` is used where ``d`` is of the sign that a larger ``R`` pulls outward to zero.
    ``balance`` of centred elements is how far the sum of the ``d_j`` may be from zero, and what
    ``R`` may have lost, in an evaluation: ``R >= (|d| - drift)^2 / (n - 1) - lost``.
    """
    others = torch.where(end > 0, squares[1], squares[0])
    if balance is not None and count > 1:
        drift, lost = balance
        opposite = (end.abs() - drift).clamp(min=0.0)
        others = torch.maximum(others, opposite.square() / (count - 1) - lost)
    mean_square = (end.square() + others).clamp(min=0.0) / count + eps
    return torch.where(end == 0, end, end * mean_square.clamp(min=2.0**-1000).rsqrt())


def _beyond_end(
    end: Tensor,
    inner: Tensor,
    fewest: Tensor,
    count: int,
    eps: float,
    balance: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """How far a deviation between ``inner`` and ``|end|`` gets beyond ``end`` in an evaluation.

    Exactly, ``y`` rises in ``d``. An evaluation whose variance lost ``l`` may have
    ``y = d / sqrt(max(0, d^2 + R - l) / n + eps)``, which falls again where ``R - l`` is below
    ``-n eps``. It turns where its square is about to be positive, where ``(d - drift)^2 / (n - 1)``
    takes over from ``fewest``, or where the derivative of that branch is zero: it is largest at one
    of these or at the end.
    """
    size = end.abs()
    drift, lost = balance or (torch.zeros_like(fewest), torch.zeros_like(fewest))
    centred = balance is not None and count > 1

    def reached(deviation: Tensor) -> Tensor:
        others, parts = fewest, deviation.square() + fewest.abs()
        if centred:
            opposite = (deviation - drift).clamp(min=0.0).square() / (count - 1)
            others, parts = torch.maximum(others, opposite - lost), parts + opposite + lost
        # the sum may cancel, and eps be far below what float64 then leaves of it
        square = (deviation.square() + others - parts * 2.0**-46).clamp(min=0.0)
        return deviation * (square / count + eps).clamp(min=2.0**-1000).rsqrt()

    turns = [(-fewest).clamp(min=0.0).sqrt()]
    if centred:
        rest = count - 1
        turns += [
            drift + (rest * (fewest + lost).clamp(min=0.0)).sqrt(),
            (drift + (rest * (count * lost - drift.square()).clamp(min=0.0)).sqrt()) / count,
            torch.nan_to_num((drift.square() + rest * (count * eps - lost)) / drift, nan=0.0),
        ]
    within = [torch.minimum(torch.maximum(turn, inner), size) for turn in turns]
    most = torch.stack([reached(deviation) for deviation in (*within, size)]).amax(0)
    end_of = _quotient(size, (fewest, fewest), count, eps, balance)
    return torch.nan_to_num(most - end_of, nan=math.inf).clamp(min=0.0)


def with_weight(
    box: Interval, source: Interval, weight: Any, bias: Any, shape: Sequence[int]
) -> Interval:
    """``box`` times weight plus bias, ``box`` normalised from ``source``."""
    _plain("a norm", weight, bias)
    if weight is not None:
        box = mul(box, weight.reshape(shape))
    if bias is not None and not is_deployed(box.rounding):
        return add(box, bias.reshape(shape))
    if not is_deployed(box.rounding):
        return box
    return _as_one_line(box, source, weight, 0.0 if bias is None else bias.reshape(shape))


def _as_one_line(box: Interval, source: Interval, weight: Any, shift: Any) -> Interval:
    """``box + shift``, also for ``x s + (shift - mean s)`` with ``s = weight / deviation``.

    Its two roundings of size ``shift`` are more than the one of a sum; those of size ``mean s`` are
    in the box. Flushing may take ``s`` itself, times twice the largest ``|x|``.
    """
    low, high = working(box)
    with torch.no_grad():
        wide = torch.as_tensor(shift, dtype=low.dtype, device=low.device).detach()
        reach = torch.maximum(source.lower.abs().amax(), source.upper.abs().amax()).to(low.dtype)
        error = 4 * UNIT[box.dtype] * wide.abs()
        if weight is not None:
            error = error + torch.finfo(box.dtype).tiny * (4 + 2 * reach)
    moved = low + shift, high + shift
    return wrap(*enclose(*moved, error, box.dtype), box.rounding)


def _layer_norm(
    input: Any,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Interval:
    box = require_box(input, "layer_norm")
    _check_ending("layer_norm", box, normalized_shape)
    dims = range(-len(normalized_shape), 0)
    result = normalized(box, dims, eps, centred=True)
    return with_weight(result, box, weight, bias, tuple(normalized_shape))


def _rms_norm(
    input: Any,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Interval:
    box = require_box(input, "rms_norm")
    _check_ending("rms_norm", box, normalized_shape)
    eps = torch.finfo(box.dtype).eps if eps is None else eps
    result = normalized(box, range(-len(normalized_shape), 0), eps, centred=False)
    return with_weight(result, box, weight, None, tuple(normalized_shape))


def _group_norm(
    input: Any,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Interval:
    box = require_box(input, "group_norm")
    _check_channels("group_norm", box, weight, bias)
    divisible = box.shape[1] % num_groups == 0
    check_shape("group_norm", divisible, f"channels in {num_groups} equal groups", box.shape)
    grouped = box.reshape(box.shape[0], num_groups, -1)
    result = normalized(grouped, (-1,), eps, centred=True).reshape(box.shape)
    return with_weight(result, box, weight, bias, (1, -1, *[1] * (box.ndim - 2)))


def _instance_norm(
    input: Any,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Interval:
    if not use_input_stats:  # called as such, so that it takes the pass that batch norm has
        values = cast(Tensor, require_box(input, "instance_norm"))
        of_statistics = (running_mean, running_var, weight, bias, False, momentum, eps)
        return cast(Interval, F.batch_norm(values, *of_statistics))
    if running_mean is not None:
        raise ValueError(
            "Interval: instance norm that tracks statistics must run in evaluation mode"
            f"{where()}. Call model.eval() first."
        )
    box = require_box(input, "instance_norm")
    _check_channels("instance_norm", box, weight, bias)
    result = normalized(box, range(2 - box.ndim, 0), eps, centred=True)
    return with_weight(result, box, weight, bias, (1, -1, *[1] * (box.ndim - 2)))


def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Interval:
    box = require_box(input, "dropout")
    if training and p > 0:
        raise ValueError(
            f"Interval: dropout must be in evaluation mode; it is training with p = {p}{where()}. "
            "Call model.eval() first."
        )
    return box


def _dropout1d(
    input: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Interval:
    box = _dropout(input, p, training, inplace)
    check_shape("dropout1d", box.ndim in (2, 3), "an input of two or three dimensions", box.shape)
    return box


RULES: dict[str, Rule] = {
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    **dict.fromkeys(
        (
            "dropout",
            "dropout2d",
            "dropout3d",
            "alpha_dropout",
            "feature_dropout",
            "feature_alpha_dropout",
        ),
        _dropout,
    ),
    "dropout1d": _dropout1d,
}
