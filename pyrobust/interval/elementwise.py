"""Rules of functions of one number: activations, exponentials, logarithms (:mod:`.curves`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrobust import _native
from pyrobust.interval import arithmetic
from pyrobust.interval.curve_pass import trace
from pyrobust.interval.curves import CURVES, SELU, Curve, celu_curve, elu_curve
from pyrobust.interval.errors import check_shape, reject
from pyrobust.interval.operands import (
    Rule,
    ends_of,
    is_held,
    readings_of,
    refuse,
    require_box,
    spellings,
)
from pyrobust.interval.outward import Ends, straight_through
from pyrobust.interval.pair_pass import div, mul
from pyrobust.interval.scale_pass import bent
from pyrobust.interval.type import Interval, assign, rectify, wrap
from pyrobust.ops._interval_fallback import round_outward

__all__ = ["QUICK", "RULES"]


def _curve(curve: Curve) -> Rule:
    def rule(input: Any, inplace: bool = False, *, out: None = None) -> Interval:
        if out is not None:
            raise refuse("out=")
        box = require_box(input, "this function")
        return _finish(box, trace(curve, box), inplace)

    return rule


def _finish(box: Interval, result: Interval, inplace: bool) -> Interval:
    return assign(box, result) if inplace else result


def _relu(input: Any, inplace: bool = False) -> Interval:
    box = require_box(input, "relu")
    return _finish(box, rectify(box), inplace)


def _quick_relu(input: Any, inplace: bool = False) -> Interval | None:
    done: Interval | None = None if inplace else _native.box_relu(input, torch.is_grad_enabled())
    return done


def _clamp(input: Any, min: Any = None, max: Any = None, inplace: bool = False) -> Interval:
    box = require_box(input, "clamp")
    if isinstance(min, Interval) or isinstance(max, Interval):
        raise refuse("clamp with an interval as bound")
    if box.rounding != "nearest" and not isinstance(min, Tensor) and not isinstance(max, Tensor):
        least, most = _floats_around(min, box), _floats_around(max, box)
        if least is not None and most is not None:
            ends = box.lower.clamp(least[0], most[0]), box.upper.clamp(least[1], most[1])
            return _finish(box, wrap(*ends, box.rounding), inplace)
    low, high = box.lower.clamp(min, max), box.upper.clamp(min, max)
    if box.rounding != "nearest" and not (_is_held(min, box) and _is_held(max, box)):
        low, high = _both_readings(low, high, box, min, max)
    return _finish(box, wrap(low, high, box.rounding), inplace)


def _floats_around(bound: Any, box: Interval) -> tuple[Any, Any] | None:
    """The numbers of the box's dtype next to a bound, itself where it is one; None: not known."""
    if bound is None or is_held(bound, box.dtype):
        return bound, bound
    readings = readings_of(bound) if box.dtype == torch.float32 else None
    if readings is None:
        return None
    first, last = readings
    near = first if is_held(first, torch.float32) else last
    step = abs(near) * (1.5 * 2.0**-24)  # of which rounding makes one unit
    return (near, _rounded(near + step)) if near == first else (_rounded(near - step), near)


def _rounded(number: float) -> float:
    """``number`` to 24 bits."""
    split = number * (2.0**29 + 1)
    return split - (split - number)


def _is_held(bound: Any, box: Interval) -> bool:
    """Whether the dtype of the box holds a bound."""
    if isinstance(bound, Tensor):
        return bound.dtype == box.dtype
    return bound is None or is_held(bound, box.dtype)


def _both_readings(low: Tensor, high: Tensor, box: Interval, least: Any, most: Any) -> Ends:
    """Clamping by numbers that the dtype cannot hold: contain the exact bound as well."""
    with torch.no_grad():
        exact = box.lower.double().clamp(least, most), box.upper.double().clamp(least, most)
        ends = round_outward(*exact, low.dtype)
        outer = torch.minimum(low, ends[0]), torch.maximum(high, ends[1])
    return straight_through(low, outer[0]), straight_through(high, outer[1])


def _hardtanh(
    input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Interval:
    return _clamp(input, min_val, max_val, inplace)


def prelu(input: Any, weight: Any, inplace: bool = False) -> Interval:
    """``max(0, x) + a min(0, x)``; a slope below 0 makes a valley at 0."""
    box = require_box(input, "prelu")
    if isinstance(weight, Interval):
        raise refuse("prelu with an interval as slope")
    if isinstance(weight, Tensor) and weight.numel() > 1:
        slopes = weight.numel()
        accepted = box.ndim > 1 and box.shape[1] == slopes
        check_shape("prelu", accepted, f"{slopes} channels, one a slope", box.shape)
        weight = weight.reshape(-1, *[1] * (box.ndim - 2)).expand(box.shape[1:])
    done = bent(box, weight)
    if done is None:
        done = arithmetic.bent(box, ends_of(weight, box, box.rounding))
    return _finish(box, done, inplace)


def _elu(input: Any, alpha: float = 1.0, inplace: bool = False) -> Interval:
    if alpha < 0:
        raise refuse("elu with a negative alpha")
    box = require_box(input, "elu")
    return _finish(box, trace(elu_curve(alpha), box), inplace)


def _selu(input: Any, inplace: bool = False) -> Interval:
    box = require_box(input, "selu")
    return _finish(box, trace(SELU, box), inplace)


def _celu(input: Any, alpha: float = 1.0, inplace: bool = False) -> Interval:
    if alpha <= 0:
        raise refuse("celu with alpha <= 0")
    box = require_box(input, "celu")
    return _finish(box, trace(celu_curve(alpha), box), inplace)


def _gelu_rule(input: Any, *, approximate: str = "none") -> Interval:
    box = require_box(input, "gelu")
    return trace(CURVES["gelu" if approximate == "none" else "gelu_tanh"], box)


def _softplus_rule(input: Any, beta: float = 1.0, threshold: float = 20.0) -> Interval:
    """Contains both the exact function and torch's, which is ``x`` beyond the threshold."""
    box = require_box(input, "softplus")
    if beta <= 0:
        raise refuse("softplus with beta <= 0")
    if box.rounding == "nearest":
        low, high = (F.softplus(end, beta, threshold) for end in (box.lower, box.upper))
        return wrap(low, high, box.rounding)
    scaled = box if beta == 1 else mul(box, beta)
    smooth = trace(CURVES["softplus"], scaled)
    smooth = smooth if beta == 1 else div(smooth, beta)
    # beyond the border the function drops to x itself, but never below the border
    border = threshold / beta * (1 - 2.0**-20)
    dropped = torch.minimum(smooth.lower, box.lower.clamp(min=border))
    lower = torch.where(box.upper >= border, dropped, smooth.lower)
    return wrap(lower, smooth.upper, box.rounding)


def _log(name: str, least: float) -> Rule:
    curve = CURVES[name]

    def rule(input: Any, *, out: None = None) -> Interval:
        if out is not None:
            raise refuse("out=")
        box = require_box(input, "log")
        reject(f"the logarithm's box must be at least {least}", box.lower < least)
        return trace(curve, box)

    return rule


RULES: dict[str, Rule] = {
    "relu": _relu,
    "relu6": lambda input, inplace=False: _clamp(input, 0.0, 6.0, inplace),
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": lambda input, min: _clamp(input, min, None),
    "clamp_max": lambda input, max: _clamp(input, None, max),
    "hardtanh": _hardtanh,
    "leaky_relu": lambda input, negative_slope=0.01, inplace=False: prelu(
        input, negative_slope, inplace
    ),
    "prelu": prelu,
    "elu": _elu,
    "selu": _selu,
    "celu": _celu,
    "gelu": _gelu_rule,
    "softplus": _softplus_rule,
    **{
        name: _curve(CURVES[name])
        for name in (
            *("silu", "mish", "hardswish", "hardsigmoid", "logsigmoid", "sigmoid", "tanh"),
            *("softsign", "exp", "expm1", "erf", "atan"),
        )
    },
    "expit": _curve(CURVES["sigmoid"]),
    "log": _log("log", 0.0),
    "log2": _log("log2", 0.0),
    "log10": _log("log10", 0.0),
    "log1p": _log("log1p", -1.0),
}

QUICK: dict[Any, Rule] = dict.fromkeys(spellings("relu"), _quick_relu)
"""Asked before the rule in plain eager mode; None where the rule is needed."""
