"""The normal transform against the exact quantile, over its whole domain."""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import special

from pyrobust import _native

BOUND = 4.0e-6  # kNormalError of csrc/core/normal.h
REFINE_BELOW = 2**18


def largest_error(first, count):
    out = torch.empty(count)
    _native.normal_values(first, out)
    m = np.arange(first, first + count, dtype=np.float64)
    return np.abs(out.numpy() + special.ndtri((m + 0.5) / 2**32)).max()


def test_error_bound_holds_on_every_octave_border_and_in_samples():
    for exponent in range(18, 31):
        for first in (2**exponent - (0 if exponent == 18 else 2000), 3 * 2**exponent // 2):
            assert largest_error(first, 4000) < BOUND
    generator = np.random.default_rng(0)
    for first in generator.integers(REFINE_BELOW, 2**31 - 20000, 300):
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


def test_sign_bit_mirrors_the_value():
    low, high = torch.empty(1000), torch.empty(1000)
    _native.normal_values(2**29, low)
    _native.normal_values(2**31 + 2**29, high)
    assert torch.equal(low, -high)


def test_refined_tail_meets_the_quantile_and_the_plain_branch():
    with mpmath.workdps(40):
        for m in (0, 1, 2, 77, 2**9 - 1, 2**17, REFINE_BELOW - 1):
            for extra in (0, 1, 2**20, 2**31, 2**32 - 1):
                z = _native.normal_value_refined(m, extra)
                tail = mpmath.ncdf(-mpmath.mpf(z))
                target = mpmath.mpf((m << 32) | extra | 1) / 2**64
                density = mpmath.npdf(mpmath.mpf(z))
                assert abs(tail - target) / density < BOUND * (1 + BOUND * z)
    assert 9.0 < _native.normal_value_refined(0, 0) < 9.1
    assert math.isclose(
        _native.normal_value_refined(REFINE_BELOW, 2**31),
        -special.ndtri((REFINE_BELOW + 0.5) / 2**32),
        abs_tol=BOUND,
    )
