"""The polynomial of csrc/interval/exponential.h against e^r, in rational numbers."""

from __future__ import annotations

import re
from fractions import Fraction
from math import factorial
from pathlib import Path

HEADER = Path(__file__).parents[2] / "csrc" / "interval" / "exponential.h"
REACH = Fraction("0.34658")
TERMS = 24  # of the series of (e^r - 1 - r) / r^2


def literals(after, count):
    """The first hexadecimal numbers behind a text of the header, exactly."""
    numbers = re.findall(r"0x[0-9a-f.]+p[-+]\d+", HEADER.read_text().split(after)[1])
    return [Fraction(float.fromhex(number)) for number in numbers[:count]]


def chebyshev(coefficients):
    """Coefficients in Chebyshev polynomials of ``sum c_j t^j``."""
    result = [Fraction(0)]
    for c in reversed(coefficients):  # Horner: t T_0 = T_1, t T_j = (T_(j-1) + T_(j+1)) / 2
        shifted = [Fraction(0)] * (len(result) + 1)
        for j, value in enumerate(result):
            if j == 0:
                shifted[1] += value
            else:
                shifted[j - 1] += value / 2
                shifted[j + 1] += value / 2
        shifted[0] += c
        result = shifted
    return result


def test_the_polynomial_errs_by_what_is_claimed():
    even, odd = literals("Doubles even", 5), literals("Doubles odd", 4)
    approximation = [c for pair in zip(even, [*odd, Fraction(0)], strict=True) for c in pair][:9]
    series = [Fraction(1, factorial(j + 2)) for j in range(TERMS)]
    error = [
        (exact - (approximation[j] if j < 9 else 0)) * REACH**j for j, exact in enumerate(series)
    ]
    rest = REACH**TERMS * Fraction(2, factorial(TERMS + 2))  # a geometric series bounds it
    most = sum(abs(c) for c in chebyshev(error)) + rest
    assert most * REACH < Fraction(2) ** -48 * Fraction("0.757")  # 2^-48.4


def test_the_parts_of_the_logarithm_of_two():
    high, low = literals("const Doubles r", 2)
    assert (high * 2**43).denominator == 1  # 43 bits: high is below 1
    series = sum(Fraction(2, (2 * j + 1) * 3 ** (2 * j + 1)) for j in range(70))  # 2 artanh(1/3)
    assert abs(series - high - low) < Fraction(1, 2**96)
    assert series / 2 + Fraction(1, 2**42) < REACH  # k x / ln 2 errs by less than 2^-42
