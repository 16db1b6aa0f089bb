"""Sequential tests of one probability: few samples to decide whether ``p > p_null``.

Votes arrive in groups. At each look the count of successes is compared with two numbers: at or
above the upper one the claim ``p > p_null`` is made, at or below the lower one it is given up. The
probability of a false claim is computed exactly, by recursion over the distribution of the count,
and is at most alpha for every ``p <= p_null`` (the paths of a larger p lie above those of a
smaller one, so the probability of a claim grows with p).

Ways to choose the numbers:

- :func:`optimal_design`: least mean cost for a population (:mod:`.optimal_stopping`).
- :func:`spending_design`: alpha is spent over the looks as ``alpha (n / budget)^exponent``; giving
  up is free to be ignored (non-binding), so its rule cannot hurt the guarantee.
- :func:`fixed_design`: one look, at the budget; the textbook test.

Source: C. Jennison, B. Turnbull, "Group sequential methods", 2000; K. Lan, D. DeMets, "Discrete
sequential boundaries for clinical trials", Biometrika 70 (1983).
Departures: binomial counts throughout, no normal approximation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from scipy import special, stats

from pyrobust._checks import check_choice, check_integer, check_positive
from pyrobust.certify.design import (
    ROUNDING,
    SequentialDesign,
    check_design,
    finished,
    look_schedule,
)
from pyrobust.certify.design_cache import cached_design
from pyrobust.certify.optimal_stopping import PRICE, WINDOW, first_true_run, optimal_design
from pyrobust.certify.population import SMOOTHING_POPULATION, LikelihoodRatios, Population
from pyrobust.certify.recursion import Counts, Floats, advance, mean_ahead

__all__ = [
    "SequentialDesign",
    "fixed_design",
    "look_schedule",
    "optimal_design",
    "sequential_design",
    "spending_design",
    "table_designs",
]

KINDS = ("optimal", "spending", "fixed")


def sequential_design(
    p_null: float, alpha: float, budget: int, *, kind: str = "optimal", price: float = PRICE
) -> SequentialDesign:
    """The design of a kind with its usual looks; computed once, then read from a cache.

    Designs are kept in memory and on disk (:mod:`pyrobust.certify.design_cache`); what comes from
    the disk is used only if the recursion confirms its error.

    Args:
        p_null: probability under test, in (0, 1).
        alpha: error of the claim ``p > p_null``, in (0, 1).
        budget: largest number of samples, ``>= 1``.
        kind: ``"optimal"``, ``"spending"`` or ``"fixed"``.
        price: of a sample in the optimal design, in missed claims, ``> 0``.

    Returns:
        The design.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> design = sequential_design(0.5, 0.001, 1000)
        >>> design.error <= 0.001, int(design.looks[-1])
        (True, 1000)
    """
    check_choice("sequential_design", "kind", kind, KINDS)
    return _design(p_null, alpha, budget, kind, price if kind == "optimal" else PRICE)


def table_designs(
    nulls: Sequence[float], alpha: float, budget: int, *, kind: str = "optimal"
) -> list[SequentialDesign]:
    """One design per null hypothesis for tests that share their samples.

    Hypotheses are nested: a claim counts only where every easier one is made, so each is tested at
    the full level, and the chance of any false claim is at most alpha. Samples that the next
    hypothesis needs anyway are half paid for, so those of a table are priced higher than for one
    test; the hard ones (``p > Phi(2)``) less so, since they miss most.

    Args:
        nulls: increasing probabilities under test, each in (0, 1).
        alpha: error of all claims together, in (0, 1).
        budget: largest number of samples, ``>= 1``.
        kind: see :func:`sequential_design`.

    Returns:
        Designs with common looks.
    """
    if len(nulls) == 1:
        return [sequential_design(nulls[0], alpha, budget, kind=kind)]
    prices = [
        max(PRICE / 3, 4 * PRICE * 4.0 ** -max(0.0, float(special.ndtri(p)) - 2.0)) for p in nulls
    ]
    return [
        sequential_design(p, alpha, budget, kind=kind, price=price)
        for p, price in zip(nulls, prices, strict=True)
    ]


@functools.lru_cache(maxsize=256)
def _design(p_null: float, alpha: float, budget: int, kind: str, price: float) -> SequentialDesign:
    if kind == "fixed":
        return fixed_design(p_null, alpha, budget)
    looks = look_schedule(budget)
    if kind == "spending":
        return spending_design(p_null, alpha, looks)
    check_design("optimal_design", p_null, alpha, looks)
    key = {"kind": kind, "p_null": p_null, "alpha": alpha, "budget": budget, "price": price}
    return cached_design(key, lambda: optimal_design(p_null, alpha, looks, price=price))


def fixed_design(p_null: float, alpha: float, budget: int) -> SequentialDesign:
    """The test with one look: claim where the count is too high for ``p_null`` at level alpha.

    Args:
        p_null: probability under test, in (0, 1).
        alpha: error of the claim, in (0, 1).
        budget: number of samples, ``>= 1``.

    Returns:
        The design; it claims exactly where the Clopper-Pearson bound exceeds ``p_null``.

    Raises:
        ValueError: an argument out of range.
    """
    check_integer("fixed_design", "budget", budget, 1)
    looks = np.array([budget], dtype=np.int64)
    check_design("fixed_design", p_null, alpha, looks)
    level = alpha * (1 - ROUNDING)
    upper = int(stats.binom.isf(level, budget, p_null)) + 1
    while stats.binom.sf(upper - 1, budget, p_null) > level:
        upper += 1
    counts = np.array([upper], dtype=np.int64)
    return finished(p_null, alpha, looks, counts, counts - 1, binding=True)


def spending_design(
    p_null: float,
    alpha: float,
    looks: Counts,
    *,
    exponent: float = 0.3,
    futility: float = 0.003,
    population: Population = SMOOTHING_POPULATION,
) -> SequentialDesign:
    """Spend ``alpha (n / budget)^exponent`` by look ``n``, exactly.

    Args:
        p_null: probability under test, in (0, 1).
        alpha: error of the claim, in (0, 1).
        looks: increasing numbers of samples.
        exponent: of the spending function, ``> 0``; smaller spends earlier.
        futility: give up where the predictive probability of ever claiming is below this. The
            error is computed without giving up, so it holds whether or not one does.
        population: prior of p for the predictive probability; it cannot hurt the guarantee.

    Returns:
        The design.

    Raises:
        ValueError: an argument out of range.
    """
    check_design("spending_design", p_null, alpha, looks)
    check_positive("spending_design", "exponent", exponent)
    upper = looks + 1
    state, first, spent, before = np.ones(1), 0, 0.0, 0
    for i, n in enumerate(looks):
        state, first, lost = advance(state, first, int(n) - before, p_null)
        before = int(n)
        allowed = alpha * (1 - ROUNDING) * (n / looks[-1]) ** exponent - spent - lost
        tail = np.cumsum(state[::-1])[::-1]  # P(count >= first + j)
        claimed = int(np.searchsorted(-tail, -allowed))  # first j with tail <= allowed
        if claimed < state.size:
            upper[i] = first + claimed
            spent += float(tail[claimed])
            state = state[:claimed]
        spent += lost
    lower = _futile(p_null, looks, upper, futility, population)
    return finished(p_null, alpha, looks, upper, lower, binding=False)


def _futile(
    p_null: float, looks: Counts, upper: Counts, limit: float, population: Population
) -> Counts:
    """Largest counts whose predictive probability of ever reaching ``upper`` is below ``limit``."""
    lower = np.full_like(looks, -1)
    lower[-1] = upper[-1] - 1
    ratios = LikelihoodRatios(population, p_null)
    later: Floats = np.empty(0)
    begin_later = 0
    for i in range(len(looks) - 1, -1, -1):
        n = int(looks[i])
        spread = WINDOW * np.sqrt(n * p_null * (1 - p_null)) + 2
        first = max(0, int(n * p_null - spread))
        last = min(n, int(n * p_null + spread) + 1)
        whole = ratios(np.arange(first, last + 1), n)[1]
        success = np.where(np.arange(first, last + 1) >= upper[i], whole, 0.0)
        if i + 1 < len(looks):
            step = int(looks[i + 1]) - n
            below = np.zeros(max(0, begin_later - first))
            above = np.zeros(max(0, last + step + 1 - begin_later - later.size))
            padded = np.concatenate([below, later[max(0, first - begin_later) :], above])
            ahead = mean_ahead(padded[: last - first + 1 + step], step, p_null)
            success = np.where(success > 0, success, ahead)
            futile = success < limit * whole
            lower[i] = min(first + first_true_run(futile) - 1, int(upper[i]) - 1)
        later, begin_later = success, first
    return lower
