"""The Laplace transform and the fused multiply-add against exact references."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from pyrobust import _native

BOUND, BOUND_REFINED = 3.0e-6, 4.5e-6  # csrc/core/laplace.h
REFINE_BELOW = 2**18


def largest_error(first, count):
    out = torch.empty(count)
    _native.laplace_values(first, out)
    m = np.arange(first, first + count, dtype=np.float64)
    return np.abs(out.numpy() + np.log((m + 0.5) / 2**31)).max()


def test_error_bound_holds_on_every_octave_border_and_in_samples():
    for exponent in range(18, 31):
        for first in (2**exponent - (0 if exponent == 18 else 2000), 3 * 2**exponent // 2):
            assert largest_error(first, 4000) < BOUND
    generator = np.random.default_rng(0)
    for first in generator.integers(REFINE_BELOW, 2**31 - 20000, 200):
        assert largest_error(int(first), 20000) < BOUND
    assert largest_error(2**31 - 20000, 20000) < BOUND


@pytest.mark.slow
def test_error_bound_holds_for_every_input():
    step = 2**24
    worst = max(
        largest_error(max(first, REFINE_BELOW), step - (REFINE_BELOW if first == 0 else 0))
        for first in range(0, 2**31, step)
    )
    assert worst < BOUND


def test_refined_tail_meets_the_quantile_and_the_plain_branch():
    generator = np.random.default_rng(1)
    pairs = [(m, extra) for m in (0, 1, 2, 77, 2**17, REFINE_BELOW - 1) for extra in (0, 1, 2**31)]
    pairs += [tuple(map(int, p)) for p in generator.integers(0, [REFINE_BELOW, 2**32], (5000, 2))]
    for m, extra in pairs:
        quantile = 63 * math.log(2) - math.log((m << 32) | extra | 1)
        assert abs(_native.laplace_value_refined(m, extra) - quantile) < BOUND_REFINED
    assert 43.6 < _native.laplace_value_refined(0, 0) < 43.7
    low, high = torch.empty(1000), torch.empty(1000)
    _native.laplace_values(2**29, low)
    _native.laplace_values(2**31 + 2**29, high)
    assert torch.equal(low, -high)


def fused(a, b, c):
    out = torch.empty(len(a))
    _native.fused_values(*(torch.from_numpy(v) for v in (a, b, c)), out)
    return out.numpy()


def rounded_once(a, b, c):
    """The float32 nearest to a rational, ties to even: Python rounds int / int correctly, to 53."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:
        return 0.0
    exponent = max(math.frexp(float(exact))[1] - 24, -149)
    if abs(exact) >= Fraction(2) ** (exponent + 24):  # float() rounded up to a power of two
        exponent += 1
    return float(round(exact / Fraction(2) ** exponent) * Fraction(2) ** exponent)


def test_emulated_fused_multiply_add_rounds_once():
    generator = np.random.default_rng(2)
    a, b = generator.standard_normal((2, 3000)).astype(np.float32)
    c = (-(a.astype(np.float64) * b)).astype(np.float32)  # cancels all but the rounding
    c[1::2] = generator.standard_normal(1500).astype(np.float32)
    # A product half an ulp of the sum from a float32, and a little more or less: only one rounding
    # keeps the sides apart.
    one, tiny = np.float32(1 + 2**-23), np.float32(2**-24)
    for factor in (1 - 2**-23, 1, 1 + 2**-23):
        for other in (1 - 2**-23, 1, 1 + 2**-23, -1):
            a = np.append(a, np.float32(factor))
            b = np.append(b, np.float32(other) * tiny)
            c = np.append(c, one)
    for scale in (2.0**-140, 2.0**-126):  # results among the denormals
        a = np.append(a, np.float32(1.2345678))
        b = np.append(b, np.float32(scale))
        c = np.append(c, np.float32(scale / 3))
    expected = [rounded_once(*triple) for triple in zip(a, b, c, strict=True)]
    assert fused(a, b, c).tolist() == expected
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert twice.tolist() != expected  # rounding twice is another function
