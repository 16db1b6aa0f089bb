"""The functions of one number that have lines: how each bends, by the name of its function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrobust.certify.relaxation.gradients import relu_chord
from pyrobust.certify.relaxation.lines import Bend, Lines
from pyrobust.certify.relaxation.powers import (
    inverse_root_bend,
    power_bend,
    reciprocal_bend,
    root_bend,
)
from pyrobust.interval.outward import UNIT

__all__ = ["BENDS"]

# Where the second derivative vanishes, the float64 next to the exact root.
_SILU_INFLECTION = 2.399357280515468
_GELU_TANH_INFLECTION = 1.4185040087908283
_MISH_INFLECTIONS = (-2.2563763963607932, 1.4905711794854284)


def _sigmoid_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * torch.sigmoid(-x)


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * torch.sigmoid(-x))


def _gelu_slope(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    half: Tensor = 0.5 * torch.special.erfc(-x * math.sqrt(0.5))
    return half + x * density


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    root = math.sqrt(2 / math.pi)
    inner = root * (x + 0.044715 * x * x * x)
    s = torch.sigmoid(2 * inner)
    return s + x * 2 * s * torch.sigmoid(-2 * inner) * root * (1 + 3 * 0.044715 * x * x)


def _mish_slope(x: Tensor) -> Tensor:
    tanh = torch.tanh(F.softplus(x))
    return tanh + x * (1 - tanh * tanh) * torch.sigmoid(x)


def _step(at: float, below: float, above: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.where(x > at, above, below).to(x.dtype)


def _clamped(least: float | None, most: float | None) -> Bend:
    borders = tuple(value for value in (least, most) if value is not None)

    def slope(x: Tensor) -> Tensor:
        inside = torch.ones_like(x, dtype=torch.bool)
        inside = inside if least is None else inside & (x > least)
        inside = inside if most is None else inside & (x < most)
        return inside.to(x.dtype)

    return Bend(lambda x: torch.clamp(x, least, most), slope, borders)


def _relu_lines(low: Tensor, high: Tensor, sound: bool) -> Lines:
    """Chord above; below, the identity or zero, whichever is higher in the middle of the box."""
    slope, shift = relu_chord(low, high)
    if sound:
        slack = 4 * UNIT[low.dtype] * (high - low)
        shift = torch.where((low < 0) & (high > 0), shift + slack, 0.0)
    below = (high + low > 0).to(low.dtype)
    return Lines(below, torch.zeros_like(below), slope, shift)


def _leaky(negative_slope: float = 0.01) -> Bend:
    return Bend(lambda x: F.leaky_relu(x, negative_slope), _step(0.0, negative_slope, 1.0), (0.0,))


def _prelu(weight: Tensor) -> Bend:
    def slope(x: Tensor) -> Tensor:
        shaped = weight.to(x.dtype)
        if weight.numel() > 1:
            shaped = shaped.reshape(-1, *[1] * (x.ndim - 2))
        return torch.where(x > 0, torch.ones_like(x), shaped.expand_as(x))

    return Bend(lambda x: F.prelu(x, weight.to(x.dtype)), slope, (0.0,))


def _exponential(alpha: float, scale: float, rate: float, function: Callable[..., Any]) -> Bend:
    """``scale * alpha * (exp(rate x) - 1)`` below 0, ``scale x`` above."""

    def slope(x: Tensor) -> Tensor:
        below = scale * alpha * rate * torch.exp(rate * x.clamp(max=0.0))
        return torch.where(x > 0, scale, below)

    return Bend(function, slope, (0.0,), curvature=scale * alpha * rate * rate)


def _hardswish_slope(x: Tensor) -> Tensor:
    middle = (2 * x + 3) / 6
    return torch.where(x <= -3, 0.0, torch.where(x >= 3, 1.0, middle)).to(x.dtype)


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Bend:
    # beyond the threshold torch returns x itself, which is lower by log(1 + exp(-threshold)) / beta
    dropped = math.log1p(math.exp(-threshold)) / beta
    return Bend(
        lambda x: F.softplus(x, beta, threshold),
        lambda x: torch.sigmoid(beta * x),
        curvature=beta / 4,
        slack=2 * dropped,
    )


def _gelu(approximate: str = "none") -> Bend:
    if approximate == "none":
        turn = math.sqrt(2.0)
        return Bend(F.gelu, _gelu_slope, (-turn, turn), curvature=0.8)
    turn = _GELU_TANH_INFLECTION
    return Bend(
        lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_slope, (-turn, turn), curvature=0.8
    )


def _curve(
    function: Callable[..., Any],
    slope: Callable[[Tensor], Tensor],
    largest: Callable[[Tensor, Tensor], Tensor],
) -> Callable[..., Bend]:
    """A function whose derivative is monotone, with ``|f''|`` that grows with the box."""
    return lambda: Bend(function, slope, curvature=largest)


def _logarithm(
    function: Callable[..., Any], base: float, offset: float = 0.0
) -> Callable[[], Bend]:
    rate = 1 / math.log(base)
    return _curve(
        function,
        lambda x: rate / (x + offset),
        lambda low, high: rate / (low + offset).square(),
    )


BENDS: dict[str, Callable[..., Bend | None]] = {
    "relu": lambda: Bend(torch.relu, _step(0.0, 0.0, 1.0), (0.0,), lines=_relu_lines, rays=True),
    "relu6": lambda: _clamped(0.0, 6.0),
    "hardtanh": lambda min_val=-1.0, max_val=1.0: _clamped(min_val, max_val),
    "clamp": lambda min=None, max=None: _clamped(min, max),
    "clip": lambda min=None, max=None: _clamped(min, max),
    "abs": lambda: Bend(torch.abs, _step(0.0, -1.0, 1.0), (0.0,)),
    "leaky_relu": _leaky,
    "prelu": _prelu,
    "elu": lambda alpha=1.0: _exponential(alpha, 1.0, 1.0, lambda x: F.elu(x, alpha)),
    "selu": lambda: _exponential(1.6732632423543772, 1.0507009873554805, 1.0, F.selu),
    "celu": lambda alpha=1.0: _exponential(alpha, 1.0, 1 / alpha, lambda x: F.celu(x, alpha)),
    "sigmoid": lambda: Bend(torch.sigmoid, _sigmoid_slope, (0.0,), curvature=0.1),
    "tanh": lambda: Bend(torch.tanh, lambda x: 4 * _sigmoid_slope(2 * x), (0.0,), curvature=0.8),
    "softsign": lambda: Bend(
        F.softsign, lambda x: 1 / (1 + x.abs()).square(), (0.0,), curvature=2.0
    ),
    "atan": lambda: Bend(torch.atan, lambda x: 1 / (1 + x * x), (0.0,), curvature=0.65),
    "erf": lambda: Bend(
        torch.erf,
        lambda x: 2 / math.sqrt(math.pi) * torch.exp(-x * x),
        (0.0,),
        curvature=1.0,
    ),
    "softplus": _softplus,
    "logsigmoid": lambda: Bend(F.logsigmoid, lambda x: torch.sigmoid(-x), curvature=0.25),
    "gelu": _gelu,
    "silu": lambda: Bend(F.silu, _silu_slope, (-_SILU_INFLECTION, _SILU_INFLECTION), curvature=0.5),
    "mish": lambda: Bend(F.mish, _mish_slope, _MISH_INFLECTIONS, curvature=0.65),
    "hardswish": lambda: Bend(F.hardswish, _hardswish_slope, (-3.0, 3.0), curvature=1 / 3),
    "hardsigmoid": lambda: Bend(
        F.hardsigmoid,
        lambda x: torch.where(x.abs() < 3, 1 / 6, 0.0).to(x.dtype),
        (-3.0, 3.0),
    ),
    "exp": _curve(torch.exp, torch.exp, lambda low, high: torch.exp(high)),
    "expm1": _curve(torch.expm1, torch.exp, lambda low, high: torch.exp(high)),
    "log": _logarithm(torch.log, math.e),
    "log2": _logarithm(torch.log2, 2.0),
    "log10": _logarithm(torch.log10, 10.0),
    "log1p": _logarithm(torch.log1p, math.e, 1.0),
    "sqrt": root_bend,
    "rsqrt": inverse_root_bend,
    "reciprocal": reciprocal_bend,
    "square": lambda: power_bend(2),
    "pow": power_bend,
}
