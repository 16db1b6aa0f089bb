"""Thresholds of the rounded Gaussian against mpmath, and the lazily decided search."""

from fractions import Fraction

import mpmath
import numpy as np
import pytest

from pyrobust import _native
from pyrobust.ops._grid_thresholds import grid_thresholds, threshold


def exact(j, scale):
    with mpmath.workprec(600):
        x = mpmath.mpf(2 * j - 1) * scale.denominator / (2 * scale.numerator)
        return int(mpmath.floor(mpmath.erfc(x / mpmath.sqrt(2)) * mpmath.mpf(2) ** 127))


@pytest.mark.parametrize("scale", [0.037, 0.3, 7.65, 63.75, 255.0, 2400.0])
def test_thresholds_are_right_to_the_last_place(scale):
    scale = Fraction(scale)
    last = int(13.1 * scale + 0.5)
    places = {1, 2, 3, last, last + 1, last + 2, *range(1, last, max(1, last // 25))}
    assert all(threshold(j, scale) == exact(j, scale) for j in places if j > 0)


def test_table_holds_all_thresholds_in_words():
    words = grid_thresholds(0.12, 255).numpy().view(np.uint32).astype(object)
    values = [int(a) << 96 | int(b) << 64 | int(c) << 32 | int(d) for a, b, c, d in words.T]
    scale = Fraction(0.12) * 255
    assert values == [threshold(j, scale) for j in range(1, len(values) + 1)]
    assert values[-1] > 0 == threshold(len(values) + 1, scale)
    assert grid_thresholds(1e-4, 255).tolist() == [[0]] * 4


def split(value):
    return [value >> shift & 0xFFFFFFFF for shift in (96, 64, 32, 0)]


def test_search_decides_with_as_few_words_as_it_needs():
    table, scale = grid_thresholds(0.12, 255), Fraction(0.12) * 255
    values = [threshold(j, scale) for j in range(1, table.shape[1] + 1)]
    generator = np.random.default_rng(0)
    for j in (1, 2, 17, 150, 300, len(values)):
        for distance in (0, 1, 2**31, 2**33, 2**63, 2**65, 2**95, 2**97):
            for u in (values[j - 1] - distance, values[j - 1] + distance):
                if not 0 <= u < 2**127:
                    continue
                k = sum(u < value for value in values)
                near = [values[i] for i in (k - 1, k) if 0 <= i < len(values)]
                needed = max(next((w + 1 for w in range(4) if split(u)[w] != split(v)[w]), 4)
                             for v in near)  # fmt: skip
                for guess in (0, k - 1, k, k + 1, 10**6, int(generator.integers(1, 400))):
                    found, words = _native.grid_value(split(u), table, guess)
                    assert found == k
                    assert words <= needed
    assert _native.grid_value([0, 0, 0, 0], table, 0)[0] == len(values)


def test_stepped_tables_agree_with_single_thresholds():
    for sigma in (0.032, 0.25, 1.0, 9.4):
        scale = Fraction(sigma) * 255
        words = grid_thresholds(sigma, 255).numpy().view(np.uint32).astype(object)
        for j in {1, 2, words.shape[1], *range(1, words.shape[1], words.shape[1] // 7)}:
            assert split(threshold(j, scale)) == [int(word) for word in words[:, j - 1]]
        assert threshold(words.shape[1] + 1, scale) == 0
