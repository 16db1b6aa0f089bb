"""Norms of rows in one native pass, where it serves: ``csrc/transformer/transformer.h``.

Layer, RMS, group and instance norm are all norms of rows of neighbours in memory, times rows of
weights that recur. The formulas and errors are those of :mod:`pyrobust.interval.normalization`, in
float64; in real mode the ends are rounded outward once instead of after each step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust.interval import normalization
from pyrobust.interval.operands import Rule
from pyrobust.interval.pass_operator import PassOperator, pass_serves
from pyrobust.interval.type import Interval, wrap
from pyrobust.ops._interval_checks import Ends, dense
from pyrobust.ops._kept_memory import new_ends

__all__ = ["RULES"]


def _native_rows(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rounding: str,
    centred: bool,
) -> Ends | None:
    lower, upper = dense(lower), dense(upper)
    out = new_ends(lower)
    weight, bias = (None if value is None else dense(value) for value in (weight, bias))
    count, threads = lower.shape[-1], torch.get_num_threads()
    finite = _native.box_row_norm(
        lower, upper, weight, bias, count, eps, centred, rounding, *out, threads
    )
    return out if finite else None


def _rule(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rounding: str,
    centred: bool,
) -> Ends:
    box = wrap(lower, upper, rounding)
    result = normalization.normalized(box, (-1,), eps, centred=centred)
    result = normalization.with_weight(result, box, weight, bias, (1, *lower.shape[1:]))
    return result.lower, result.upper


_row_norm = PassOperator(
    "interval_row_norm(Tensor lower, Tensor upper, Tensor? weight, Tensor? bias, float eps,"
    " str rounding, bool centred) -> (Tensor, Tensor)",
    _native_rows,
    _rule,
)


def _rows(
    box: Interval,
    form: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    centred: bool,
) -> Interval:
    """The norm of rows of a box of shape ``form``: (boxes, rows of weights, elements of a row)."""
    lower, upper = box.lower.reshape(form), box.upper.reshape(form)
    lines = [None if numbers is None else numbers.reshape(form[1:]) for numbers in (weight, bias)]
    result = _row_norm(box.rounding, lower, upper, *lines, float(eps), box.rounding, centred)
    return result.reshape(box.shape)  # type: ignore[no-any-return]


def _served(input: Any, weight: Any, bias: Any, numbers: int) -> bool:
    """Whether the pass takes these, ``numbers`` of them in weight and bias."""
    if not isinstance(input, Interval) or not pass_serves(input, weight, bias):
        return False
    alike = all(value is None or value.numel() == numbers for value in (weight, bias))
    return alike and numbers > 0 and math.prod(input.shape) > 0


def _over_last(
    input: Any, shape: Sequence[int], weight: Any, bias: Any, eps: float, *, centred: bool
) -> Interval | None:
    count = math.prod(shape)
    ending = isinstance(input, Interval) and tuple(input.shape[input.ndim - len(shape) :])
    if ending != tuple(shape) or not _served(input, weight, bias, count):
        return None
    return _rows(input, (-1, 1, count), weight, bias, eps, centred=centred)


def _layer_norm(
    input: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *options: Any,
) -> Interval:
    done = _over_last(input, normalized_shape, weight, bias, eps, centred=True)
    if done is not None:
        return done
    rule: Rule = normalization.RULES["layer_norm"]
    return rule(input, normalized_shape, weight, bias, eps, *options)  # type: ignore[no-any-return]


def _rms_norm(
    input: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Interval:
    least = torch.finfo(torch.float32).eps if eps is None else eps
    done = _over_last(input, normalized_shape, weight, None, least, centred=False)
    if done is not None:
        return done
    rule: Rule = normalization.RULES["rms_norm"]
    return rule(input, normalized_shape, weight, eps)  # type: ignore[no-any-return]


def _group_norm(
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *options: Any,
) -> Interval:
    grouped = isinstance(input, Interval) and input.ndim >= 2 and num_groups > 0
    channels = input.shape[1] if grouped else 0
    if channels == 0 or channels % num_groups or not _served(input, weight, bias, channels):
        rule: Rule = normalization.RULES["group_norm"]
        return rule(input, num_groups, weight, bias, eps, *options)  # type: ignore[no-any-return]
    pixels = math.prod(input.shape[2:])
    weight, bias = (
        None if value is None else value.reshape(-1).repeat_interleave(pixels)
        for value in (weight, bias)
    )
    form = (-1, num_groups, channels // num_groups * pixels)
    return _rows(input, form, weight, bias, eps, centred=True)


def _instance_norm(
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *options: Any,
) -> Interval:
    by_itself = use_input_stats and running_mean is None
    channels = input.shape[1] if isinstance(input, Interval) and input.ndim >= 3 else 0
    if by_itself and channels and _served(input, weight, bias, channels):
        return _group_norm(input, channels, weight, bias, eps)
    rule: Rule = normalization.RULES["instance_norm"]
    given = input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    return rule(*given, *options)  # type: ignore[no-any-return]


RULES: dict[str, Rule] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
}
