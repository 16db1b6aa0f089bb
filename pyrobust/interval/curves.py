"""Functions of one number: each is a curve that rises, falls, or has one valley.

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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyrobust.interval.outward import UNIT, Ends
from pyrobust.interval.type import Interval
from pyrobust.ops._interval_checks import is_deployed

__all__ = [
    "CURVES",
    "GELU_TANH_TURN",
    "GELU_TURN",
    "HARDSWISH_TURN",
    "MISH_TURN",
    "SELU",
    "SILU_TURN",
    "Curve",
    "celu_curve",
    "elu_curve",
    "error_of",
    "image",
    "native_curve",
    "sigmoid",
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


def image(curve: Curve, low: Tensor, high: Tensor) -> Ends:
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


def error_of(curve: Curve, x: Interval, low: Tensor, high: Tensor, values: Ends) -> Ends:
    """How far the computed ends ``values`` of the image of ``x`` may be inside."""
    at = _places(curve, low, high)
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
    "erf": Curve(torch.erf, floor=-1.0, ceiling=1.0, native=("erf", ())),
    "atan": Curve(torch.atan, native=("atan", ())),
    "log": Curve(torch.log, native=("log", (1.0,))),
    "log2": Curve(torch.log2, native=("log", (1.0 / math.log(2.0),))),
    "log10": Curve(torch.log10, native=("log", (1.0 / math.log(10.0),))),
    "log1p": Curve(torch.log1p, native=("log1p", ())),
    # of these three the rules in torch operations are those of arithmetic.py, which are tighter
    "sqrt": Curve(torch.sqrt, relative=2.0, deployed=2.0, native=("sqrt", ())),
    "rsqrt": Curve(torch.rsqrt, falling=True, native=("rsqrt", ())),
    "square": Curve(torch.square, turn=0.0, relative=2.0, deployed=2.0, native=("square", ())),
}


def _bent(rise: float, depth: float, stretch: float, absolute: float = 0.0) -> Curve:
    """``rise x``, below zero ``depth (e^(x / stretch) - 1)``; ``absolute`` is its deployed one."""

    def function(x: Tensor) -> Tensor:
        below = depth * torch.expm1((x / stretch).clamp(max=0.0))
        return torch.where(x > 0, rise * x, below)

    return Curve(function, deployed_absolute=absolute, native=("elu", (rise, depth, stretch)))


def elu_curve(alpha: float) -> Curve:
    """``x``, below zero ``alpha (e^x - 1)``."""
    return _bent(1.0, float(alpha), 1.0, 4.0 * max(alpha, 1.0))


def celu_curve(alpha: float) -> Curve:
    """``x``, below zero ``alpha (e^(x / alpha) - 1)``."""
    return _bent(1.0, float(alpha), float(alpha), 4.0 * max(alpha, 1.0))


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
SELU = replace(
    _bent(_SELU_SCALE, _SELU_SCALE * _SELU_ALPHA, 1.0, 8.0),
    function=lambda x: _SELU_SCALE * elu_curve(_SELU_ALPHA).function(x),
)


def native_curve(name: str, numbers: tuple[float, ...]) -> Curve:
    """The curve whose native pass is called ``name`` and takes ``numbers``."""
    if name == "elu":
        return _bent(*numbers)
    if name == "log":
        return Curve(lambda x: torch.log(x) * numbers[0])
    return CURVES[name]
