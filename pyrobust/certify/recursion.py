"""The count of successes from look to look: its exact distribution, forwards and backwards.

Probabilities too small to matter are dropped where they cannot lead to a claim; what is dropped is
summed, so that a probability of error can be stated as an upper bound.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = ["Counts", "Floats", "advance", "claim_probability", "mean_ahead", "walk"]

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

_NEGLIGIBLE = 1e-25  # probabilities below are dropped, summed up, and added to the error


def advance(state: Floats, first: int, step: int, p: float) -> tuple[Floats, int, float]:
    """Distribution of the count after ``step`` more samples, its first count, and the mass cut."""
    if state.size == 0:
        return state, first, 0.0
    begin, weights = _increments(step, p)
    lost = float(step * _NEGLIGIBLE)
    result = np.convolve(state, weights)
    first += begin
    small = int(np.argmax(result > _NEGLIGIBLE))  # the low end only: it cannot reach a claim
    lost += float(result[:small].sum())
    return result[small:], first + small, lost


def walk(p: float, looks: Counts, upper: Counts, lower: Counts) -> tuple[Floats, Floats, float]:
    """Per look the probabilities of a claim and of stopping; and the probability lost to cuts."""
    claims, stops, lost = np.zeros(len(looks)), np.zeros(len(looks)), 0.0
    state, first, before = np.ones(1), 0, 0
    for i, n in enumerate(looks):
        state, first, cut = advance(state, first, int(n) - before, p)
        before, lost = int(n), lost + cut
        top = int(np.clip(upper[i] - first, 0, state.size))
        bottom = int(np.clip(lower[i] + 1 - first, 0, top))
        claims[i] = state[top:].sum()
        stops[i] = claims[i] + state[:bottom].sum()
        state, first = state[bottom:top], first + bottom
    return claims, stops, lost


def claim_probability(p_null: float, looks: Counts, upper: Counts, lower: Counts) -> float:
    """Upper bound of the probability of a claim at ``p_null``, tight to rounding."""
    claims, _, lost = walk(p_null, looks, upper, lower)
    return float(claims.sum()) + lost


@functools.lru_cache(maxsize=512)
def _increments(step: int, p: float) -> tuple[int, Floats]:
    """Probabilities of the successes of ``step`` samples, from the first that is not negligible."""
    spread = 12 * (step * p * (1 - p)) ** 0.5 + 40
    first, last = max(0, int(step * p - spread)), min(step, int(step * p + spread) + 1)
    weights = stats.binom.pmf(np.arange(first, last + 1), step, p)
    if (first > 0 and weights[0] > _NEGLIGIBLE) or (last < step and weights[-1] > _NEGLIGIBLE):
        first, weights = 0, stats.binom.pmf(np.arange(step + 1), step, p)
    kept = np.flatnonzero(weights > _NEGLIGIBLE)
    return first + int(kept[0]), weights[kept[0] : kept[-1] + 1]


def mean_ahead(values: Floats, step: int, p: float) -> Floats:
    """Mean of ``values[i + j]`` over the successes ``j`` of ``step`` samples."""
    begin, weights = _increments(step, p)
    window = values[begin : values.size - step + begin + weights.size - 1]
    result: Floats = np.convolve(window, weights[::-1], mode="valid")
    return result
