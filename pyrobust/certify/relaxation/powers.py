"""How powers of one number bend: whole and broken exponents, of either sign, and roots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrobust.certify.relaxation.lines import Bend

__all__ = ["inverse_root_bend", "power_bend", "reciprocal_bend", "root_bend"]


def power_bend(exponent: Any) -> Bend | None:
    """``x^p``; None for exponents that are tensors, 0 or 1.

    Whole exponents from 2 on bend everywhere; other positive ones for ``x >= 0``, negative ones
    where ``x`` does not reach 0. There the derivative is monotone on either side of 0.
    """
    if isinstance(exponent, Tensor) or exponent in (0, 1):
        return None
    p = exponent

    def curvature(low: Tensor, high: Tensor) -> Tensor:
        least, most = _magnitudes(low, high)
        steepest: Any = (most if p >= 2 else least) ** (p - 2)
        result: Tensor = abs(p * (p - 1)) * steepest
        return result

    borders = (0.0,) if p >= 2 and p == int(p) and p % 2 else ()
    return Bend(lambda x: x**p, lambda x: p * x ** (p - 1), borders, curvature=curvature)


def _magnitudes(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The least and greatest magnitude in a box."""
    least = torch.clamp(torch.maximum(low, -high), min=0.0)
    return least, torch.maximum(low.abs(), high.abs())


def reciprocal_bend() -> Bend:
    """``1 / x`` on one side of 0."""
    return Bend(
        torch.reciprocal,
        lambda x: -1 / (x * x),
        curvature=lambda low, high: 2 / _magnitudes(low, high)[0] ** 3,
    )


def root_bend() -> Bend:
    """The square root, for ``x >= 0``."""
    return Bend(
        torch.sqrt,
        lambda x: 0.5 / x.sqrt(),
        curvature=lambda low, high: 0.25 / (low * low.sqrt()),
    )


def inverse_root_bend() -> Bend:
    """``1 / sqrt(x)``, for ``x > 0``."""
    return Bend(
        torch.rsqrt,
        lambda x: -0.5 * x.rsqrt() / x,
        curvature=lambda low, high: 0.75 * low.rsqrt() / (low * low),
    )
