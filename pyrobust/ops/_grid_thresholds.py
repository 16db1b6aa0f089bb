"""The probabilities at which the rounded Gaussian steps, to 128 binary places, proven.

A threshold is ``Q_j * 2**128`` rounded down, ``Q_j = P(Z > x_j)``, ``x_j = (j - 1/2) / s`` for a
standard normal ``Z``; ``s`` is the rational number that its float stands for. All of it is integer
arithmetic in units of ``2**-F``, F = 320, each operation rounding down. A threshold is accepted
only if all numbers within ``2**-180`` of the result have the same 128 places; else F grows (Ziv's
method once more).

One threshold alone: ``Q = 1/2 - phi S`` with the density ``phi`` and ``S = x + x^3/3 + x^5/(3*5) +
...``, all terms positive. For ``2**-13 <= x <= 13.1`` there are fewer than 700. While they grow,
the rounding of one is at most 2 units of at least ``2**-13``, and that of ``x^2`` one of at least
``2**-26``, so a step loses less than ``2**27`` units per unit, all of them ``2**37``; where they
fall, roundings only shrink. ``S < 2**125`` and ``phi S < 1/2``, so ``S`` puts less than ``2**38``
units into the product. ``exp(y)`` loses less than ``2**16`` of itself in its series and eight
squarings, and the division that makes ``phi`` of it one unit more: times ``S``, ``2**125`` units.
Together less than ``2**127``, that is ``2**-193``.

A whole table, ``s >= 8``: from ``x`` to ``x + h``, ``h = 1/s``, the density ``phi(x + t) = sum c_k
(t/h)^k`` with ``c_(k+1) = -(x h c_k + h^2 c_(k-1)) / (k + 1)``. The sum of the ``c_k`` is the next
density, ``h`` times that of ``c_k / (k + 1)`` the step of Q. A term is off by at most 4 units of
its own and, through ``x h``, ``2**16`` more; the recursion enlarges that by less than ``exp(2)``,
and there are fewer than 100 terms, so a step puts at most ``2**26`` units into the density. The
true factor of the density is below one, so over at most ``2**15`` steps it is off by ``2**41`` and
Q by ``2**57`` units; the start adds ``2**127``.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

__all__ = ["grid_thresholds"]

PLACES = 128
_LIMIT = 13.1  # P(Z > 13.1) < 2**-128
_BITS, _SURE = 320, 180  # units of 2**-320, results right to 2**-180
_STEPPED_FROM = 8  # of s


@functools.lru_cache(maxsize=64)
def grid_thresholds(sigma: float, grid: int) -> Tensor:
    """``(4, K)`` int32: the 32-bit words, highest first, of the thresholds ``j = 1 .. K``.

    Args:
        sigma: standard deviation, ``> 0``.
        grid: grid steps per unit; ``s = sigma * grid`` without rounding. ``K`` is about ``13 s``.

    Returns:
        The words as the bits of int32; all thresholds of at least ``2**-128``.
    """
    scale = Fraction(sigma) * grid
    values = _stepped(scale) if scale >= _STEPPED_FROM else _one_by_one(scale)
    words = [[v >> shift & 0xFFFFFFFF for v in values] for shift in (96, 64, 32, 0)]
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32))


def threshold(j: int, scale: Fraction) -> int:
    """``floor(2**128 * P(Z > (j - 1/2) / scale))``."""
    x = Fraction(2 * j - 1, 2) / scale
    if x > _LIMIT:
        return 0
    bits = _BITS
    while True:
        value = _places(_tail(x, bits)[0], bits)
        if value is not None:
            return value
        bits += 64  # pragma: no cover - one threshold in 2**50


def _one_by_one(scale: Fraction) -> list[int]:
    """All positive thresholds; a lone 0, never below anything, where there are none."""
    values: list[int] = []
    j = 1
    while (value := threshold(j, scale)) > 0:
        values.append(value)
        j += 1
    return values or [0]


def _stepped(scale: Fraction) -> list[int]:
    """All positive thresholds, each from the one before."""
    inverse = (scale.denominator << _BITS) // scale.numerator
    square = (scale.denominator**2 << _BITS) // scale.numerator**2
    tail, density = _tail(1 / (2 * scale), _BITS)
    values: list[int] = []
    j = 1
    while True:
        value = _places(tail, _BITS)
        value = threshold(j, scale) if value is None else value
        if value == 0:
            return values
        values.append(value)
        slope = (2 * j - 1) * square >> 1
        last, term, total, area, k = 0, density, 0, 0, 0
        while term or last:
            k += 1
            total += term
            area += term // k
            last, term = term, -((slope * term + square * last) >> _BITS) // k
        tail -= area * inverse >> _BITS
        density, j = total, j + 1


def _places(value: int, bits: int) -> int | None:
    """The 128 places common to all numbers around ``value``; None where they differ."""
    margin = 1 << (bits - _SURE)
    low, high = (value - margin) >> (bits - PLACES), (value + margin) >> (bits - PLACES)
    if high <= 0:
        return 0
    return low if low == high else None


def _tail(x: Fraction, bits: int) -> tuple[int, int]:
    """``P(Z > x)`` and the density at ``x``, in units of ``2**-bits``."""
    point = (x.numerator << bits) // x.denominator
    square = (x.numerator**2 << bits) // x.denominator**2
    term, total, odd = point, point, 1
    while term:
        odd += 2
        term = (term * square >> bits) // odd
        total += term
    density = (_exp_minus(square >> 1, bits) << bits) // _sqrt_two_pi(bits)
    return (1 << (bits - 1)) - (density * total >> bits), density


def _exp_minus(y: int, bits: int) -> int:
    """``exp(-y)``, as the inverse of the series of ``exp(y / 2**8)`` squared eight times."""
    reduced, one = y >> 8, 1 << bits
    term, total, k = one, one, 0
    while term:
        k += 1
        term = (term * reduced >> bits) // k
        total += term
    for _ in range(8):
        total = total * total >> bits
    return (one << bits) // total


@functools.lru_cache(maxsize=4)
def _sqrt_two_pi(bits: int) -> int:
    """The square root of 2 pi, pi by Machin's formula."""
    guard = bits + 32
    pi = 4 * (4 * _arctan_inverse(5, guard) - _arctan_inverse(239, guard))
    return math.isqrt(2 * pi << guard) >> 32


def _arctan_inverse(n: int, bits: int) -> int:
    power = (1 << bits) // n
    total, k, sign = power, 1, 1
    while power:
        power //= n * n
        k, sign = k + 2, -sign
        total += sign * (power // k)
    return total
