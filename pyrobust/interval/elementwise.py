"""Rules of functions of one number: each is a curve that rises, falls, or has one valley.

The ends of the image are values at the ends of the box, and at the lowest point of a valley inside
it. They are computed in float64 and rounded outward by a bound on the error of that evaluation:
``relative`` units of 2^-53 of the value (torch's float64 functions stay within 2 units;
``tests/interval/test_elementwise.py`` measures them against mpmath) plus ``steep`` units of
``x^2 |value|`` where the argument is rounded before an exponential.

In deployed mode the float32 function of torch may differ from the exact one by its own error,
bounded by ``deployed`` units of 2^-24 of the value and ``deployed_input`` units of ``min(|x|, 8)``
(functions such as ``x (1 + erf(x / sqrt 2)) / 2`` cancel near their flat side, which they reach
before 8). ``tests/interval/test_all_float32.py`` measures both errors over all float32 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrobust import _native
from pyrobust.interval.arithmetic import div, mul
from pyrobust.interval.curve_pass import curve_pass, has_pass
from pyrobust.interval.errors import check_shape, reject
from pyrobust.interval.operands import Rule, refuse, require_box, spellings, working
from pyrobust.interval.outward import UNIT, Ends, enclose, straight_through
from pyrobust.interval.type import Interval, adopt, assign, rectify, wrap
from pyrobust.ops._interval_checks import is_deployed
from pyrobust.ops._interval_fallback import round_outward

__all__ = [
    "CURVES",
    "GELU_TANH_TURN",
    "GELU_TURN",
    "MISH_TURN",
    "RULES",
    "SELU",
    "SILU_TURN",
    "TRACED",
    "Curve",
    "celu_curve",
    "elu_curve",
    "sigmoid",
    "trace",
]

# Lowest points, the float64 next to the exact root of the derivative.
GELU_TURN = -0.7517915246935645
GELU_TANH_TURN = -0.7524614220710163
SILU_TURN = -1.2784645427610737
MISH_TURN = -1.1924312145154952
HARDSWISH_TURN = -1.5


@dataclass(frozen=True)
class Curve:
    """How a function of one number bends, and how well it is computed.

    Attributes:
        function: evaluates it on float64 (or, in nearest mode, on the dtype of the box).
        turn: the lowest point of a valley; None for a monotone curve.
        falling: whether a monotone curve falls.
        floor: no value lies below.
        ceiling: no value lies above.
        relative: error of ``function`` in units of 2^-53 of the value.
        steep: further error in units of 2^-53 of ``x^2 |value|``.
        deployed: error of a float32 evaluation in units of 2^-24 of the value.
        deployed_input: further error in units of 2^-24 of ``min(|x|, 8)``.
        deployed_absolute: further error in units of 2^-24.
        native: the function's native pass (:mod:`pyrobust.interval.curve_pass`), if it has one: the
            name and what it takes besides.
    """

    function: Callable[[Tensor], Tensor]
    turn: float | None = None
    falling: bool = False
    floor: float | None = None
    ceiling: float | None = None
    relative: float = 8.0
    steep: float = 0.0
    deployed: float = 8.0
    deployed_input: float = 0.0
    deployed_absolute: float = 0.0
    native: tuple[str, tuple[float, ...]] | None = None


def trace(curve: Curve, x: Interval) -> Interval:
    """The image of ``x`` under ``curve``."""
    if curve.native is not None and has_pass(x.lower, x.upper):
        deployed = curve.deployed, curve.deployed_input, curve.deployed_absolute
        image = partial(_image, curve)
        given = curve_pass(x.lower, x.upper, curve.native, deployed, x.rounding, image)
        return (wrap if torch.compiler.is_compiling() else adopt)(*given, x.rounding)
    low, high = working(x)
    lower, upper = _image(curve, low, high)
    if x.rounding == "nearest":
        return wrap(lower, upper, x.rounding)
    with torch.no_grad():
        error = _error(curve, x, (lower, upper), _places(curve, low, high))
    ends = enclose(lower, upper, error, x.dtype, floor=curve.floor, ceiling=curve.ceiling)
    return wrap(*ends, x.rounding)


def _image(curve: Curve, low: Tensor, high: Tensor) -> Ends:
    """Values of ``curve`` at the places of its ends, as computed."""
    first, last = curve.function(low), curve.function(high)
    if curve.turn is not None:
        return curve.function(_bottom(curve.turn, low, high)), torch.maximum(first, last)
    return (last, first) if curve.falling else (first, last)


def _bottom(turn: float, low: Tensor, high: Tensor) -> Tensor:
    """Where a valley is lowest between ``low`` and ``high``."""
    bottom = torch.clamp(torch.clamp(low, min=turn), max=high)
    return torch.where(high < turn, high, bottom)


def _places(curve: Curve, low: Tensor, high: Tensor) -> Ends:
    """Numbers whose size bounds the error of each end of the image."""
    if curve.turn is not None:
        return _bottom(curve.turn, low, high), torch.maximum(low.abs(), high.abs())
    return (high, low) if curve.falling else (low, high)


def _error(curve: Curve, x: Interval, values: Ends, at: Ends) -> Ends:
    lower, upper = (
        (curve.relative + curve.steep * where.square().clamp(max=2000.0)) * 2.0**-53 * value.abs()
        for where, value in zip(at, values, strict=True)
    )
    if not is_deployed(x.rounding):
        return lower, upper
    # an evaluation at any point of the box may err, so the largest magnitudes count
    size = torch.maximum(values[0].abs(), values[1].abs()) * curve.deployed
    reach = torch.maximum(x.lower.abs(), x.upper.abs()).double()
    slack = size + curve.deployed_input * reach.clamp(max=8.0) + curve.deployed_absolute
    kind = torch.finfo(x.dtype)
    # an exponential that underflows, or overflows below a fraction line, is multiplied by x yet
    slack = UNIT[x.dtype] * slack + kind.tiny * (2 + reach.clamp(max=-2 * math.log(kind.tiny)))
    if curve.turn is not None:  # such as x (1 + erf) / 2, multiplied in any order
        slack = torch.where(reach < kind.max / 8, slack, math.inf)
    return lower + slack, upper + slack


# -- float64 evaluations that keep their relative accuracy -----------------------------------


def sigmoid(x: Tensor) -> Tensor:
    """The logistic function, also where it is denormal."""
    # torch's own is 0 in float64 below -709.8, where the function is not; e^x differs from it by
    # less than 2^-57 of it below -40
    # (clamped, as its gradient must stay finite where it is not taken)
    return torch.where(x < -40.0, torch.exp(x.clamp(max=-40.0)), torch.sigmoid(x))


def _gelu(x: Tensor) -> Tensor:
    tail: Tensor = torch.special.erfc(x * -math.sqrt(0.5))
    return 0.5 * x * tail


def _gelu_tanh(x: Tensor) -> Tensor:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return x * sigmoid(2 * inner)  # (1 + tanh z) / 2 without cancellation


def _mish(x: Tensor) -> Tensor:
    # tanh(log(1 + e)) = n / (n + 2) with n = e (e + 2); e is capped where the quotient is 1
    e = torch.exp(x.clamp(max=40.0))
    n = e * (e + 2)
    return x * (n / (n + 2))


def _hardswish(x: Tensor) -> Tensor:
    return x * torch.clamp(x + 3, 0, 6) / 6


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros((), dtype=x.dtype, device=x.device))


CURVES = {
    "gelu": Curve(
        _gelu, turn=GELU_TURN, steep=4.0, deployed=16.0, deployed_input=8.0, native=("gelu", ())
    ),
    "gelu_tanh": Curve(
        _gelu_tanh,
        turn=GELU_TANH_TURN,
        steep=8.0,
        deployed=16.0,
        deployed_input=4.0,
        native=("gelu_tanh", ()),
    ),
    "silu": Curve(lambda x: x * sigmoid(x), turn=SILU_TURN, native=("silu", ())),
    "mish": Curve(_mish, turn=MISH_TURN, relative=16.0, native=("mish", ())),
    "hardswish": Curve(
        _hardswish, turn=HARDSWISH_TURN, deployed_input=2.0, native=("hardswish", ())
    ),
    "hardsigmoid": Curve(
        lambda x: torch.clamp(x + 3, 0, 6) / 6,
        floor=0.0,
        ceiling=1.0,
        deployed_absolute=4.0,
        native=("hardsigmoid", ()),
    ),
    "softplus": Curve(_softplus, floor=0.0, native=("softplus", ())),
    "logsigmoid": Curve(lambda x: -_softplus(-x), ceiling=0.0, native=("logsigmoid", ())),
    "sigmoid": Curve(sigmoid, floor=0.0, ceiling=1.0, native=("sigmoid", ())),
    "tanh": Curve(torch.tanh, floor=-1.0, ceiling=1.0, native=("tanh", ())),
    "softsign": Curve(
        lambda x: x / (1 + x.abs()), floor=-1.0, ceiling=1.0, native=("softsign", ())
    ),
    "exp": Curve(torch.exp, floor=0.0, native=("exp", ())),
    "expm1": Curve(torch.expm1, floor=-1.0, native=("expm1", ())),
    "erf": Curve(torch.erf, floor=-1.0, ceiling=1.0),
    "atan": Curve(torch.atan),
    "log": Curve(torch.log, native=("log", (1.0,))),
    "log2": Curve(torch.log2, native=("log", (1.0 / math.log(2.0),))),
    "log10": Curve(torch.log10, native=("log", (1.0 / math.log(10.0),))),
    "log1p": Curve(torch.log1p),
}


# -- rules -----------------------------------------------------------------------------------


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
    low, high = box.lower.clamp(min, max), box.upper.clamp(min, max)
    if box.rounding != "nearest":
        low, high = _both_readings(low, high, box, min, max)
    return _finish(box, wrap(low, high, box.rounding), inplace)


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
        weight = weight.reshape(-1, *[1] * (box.ndim - 2))
    low, high = box.lower, box.upper
    below = mul(wrap(low.clamp(max=0.0), high.clamp(max=0.0), box.rounding), weight)
    lower = torch.where(low >= 0, low, below.lower)
    upper = torch.where(low >= 0, high, torch.maximum(below.upper, high))
    upper = torch.where(high <= 0, below.upper, upper)
    return _finish(box, wrap(lower, upper, box.rounding), inplace)


def _scaled_exponential(alpha: float, scale: float) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        return scale * torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0.0)))

    return function


def elu_curve(alpha: float) -> Curve:
    """``x``, below zero ``alpha (e^x - 1)``."""
    return Curve(
        _scaled_exponential(alpha, 1.0),
        deployed_absolute=4.0 * max(alpha, 1.0),
        native=("elu", (1.0, float(alpha), 1.0)),
    )


def celu_curve(alpha: float) -> Curve:
    """``x``, below zero ``alpha (e^(x / alpha) - 1)``."""

    def function(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, alpha * torch.expm1((x / alpha).clamp(max=0.0)))

    numbers = 1.0, float(alpha), float(alpha)
    return Curve(function, deployed_absolute=4.0 * max(alpha, 1.0), native=("elu", numbers))


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
SELU = Curve(
    _scaled_exponential(_SELU_ALPHA, _SELU_SCALE),
    deployed_absolute=8.0,
    native=("elu", (_SELU_SCALE, _SELU_SCALE * _SELU_ALPHA, 1.0)),
)


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

TRACED = (
    *("elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "logsigmoid"),
    *("exp", "expm1", "log", "log2", "log10"),
)
"""Rules that return what :func:`trace` does, and whose ends may be infinite."""

QUICK: dict[Any, Rule] = dict.fromkeys(spellings("relu"), _quick_relu)
"""Asked before the rule in plain eager mode; None where the rule is needed."""
