"""Group-sequential tests of one probability: few samples to decide whether ``p > p_null``.

Votes arrive in groups. At each look the count of successes is compared with two numbers: at or
above the upper one the claim ``p > p_null`` is made, at or below the lower one it is given up. The
probability of a false claim is computed exactly, by recursion over the distribution of the count,
and is at most alpha for every ``p <= p_null`` (the paths of a larger p lie above those of a
smaller one, so the probability of a claim grows with p).

Two ways to choose the numbers:

- :func:`spending_design`: alpha is spent over the looks as ``alpha (n / budget)^exponent``; giving
  up is free to be ignored (non-binding), so its rule cannot hurt the guarantee.
- :func:`optimal_design`: backward induction; no test with these looks and this error has a lower
  mean cost (samples and missed claims) for the population it is built for. Valid for any other.

Source: C. Jennison, B. Turnbull, "Group sequential methods", 2000; K. Lan, D. DeMets, "Discrete
sequential boundaries for clinical trials", Biometrika 70 (1983); S. Barber, C. Jennison, "Optimal
asymmetric one-sided group sequential tests", Biometrika 89 (2002).
Departures: binomial counts throughout, no normal approximation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pyrobust._checks import check_choice, check_integer, check_open_unit, check_positive
from pyrobust.certify.population import SMOOTHING_POPULATION, LikelihoodRatios, Population

__all__ = [
    "SequentialDesign",
    "look_schedule",
    "optimal_design",
    "sequential_design",
    "spending_design",
]

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

_NEGLIGIBLE = 1e-25  # probabilities below are dropped, summed up, and added to the error
_ROUNDING = 1e-9  # of alpha, kept back for the rounding of the recursion
_WINDOW = 9.0  # standard deviations around the null that backward induction looks at


@dataclass(frozen=True)
class SequentialDesign:
    """Looks and boundaries of one test, with its exact error.

    Attributes:
        p_null: the claim is ``p > p_null``.
        alpha: the level asked for.
        error: exact probability of a claim at ``p = p_null``; at most ``alpha``.
        looks: ``(L,)`` int64, increasing numbers of samples; the last is the budget.
        upper: ``(L,)`` int64, claim where the count is at least this; ``n + 1`` never.
        lower: ``(L,)`` int64, give up where the count is at most this; -1 never. At the last look
            it is ``upper - 1``.
    """

    p_null: float
    alpha: float
    error: float
    looks: Counts
    upper: Counts
    lower: Counts

    def operating(self, p: float) -> tuple[float, float]:
        """Probability of a claim and mean number of samples when the truth is ``p``."""
        claims, stops = _forward(p, self.looks, self.upper, self.lower)[:2]
        return float(claims.sum()), float(stops @ self.looks)


def look_schedule(budget: int, *, first: int = 10, ratio: float = 1.08) -> Counts:
    """Numbers of samples at which to look: from ``first`` to ``budget``, in steps of at least 4.

    Args:
        budget: the last look, ``>= 1``.
        first: the first look.
        ratio: growth from look to look, ``> 1``.

    Returns:
        Increasing int64 array that ends with ``budget``.

    Raises:
        ValueError: ``budget`` or ``first`` below 1.
    """
    check_integer("look_schedule", "budget", budget, 1)
    check_integer("look_schedule", "first", first, 1)
    looks, n = [], min(first, budget)
    while n < budget:
        looks.append(n)
        n = max(n + 4, round(n * ratio))
    return np.array([*looks, budget], dtype=np.int64)


def sequential_design(
    p_null: float, alpha: float, budget: int, *, kind: str = "optimal"
) -> SequentialDesign:
    """The design of ``kind`` ``"optimal"`` or ``"spending"`` with its defaults; cached.

    Args:
        p_null: probability under test, in (0, 1).
        alpha: error of the claim ``p > p_null``, in (0, 1).
        budget: largest number of samples, ``>= 1``.
        kind: ``"optimal"`` or ``"spending"``.

    Returns:
        The design.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> design = sequential_design(0.5, 0.001, 1000)
        >>> design.error <= 0.001, int(design.looks[-1])
        (True, 1000)
    """
    check_choice("sequential_design", "kind", kind, ("optimal", "spending"))
    return _cached_design(p_null, alpha, budget, kind)


@functools.lru_cache(maxsize=256)
def _cached_design(p_null: float, alpha: float, budget: int, kind: str) -> SequentialDesign:
    make = optimal_design if kind == "optimal" else spending_design
    return make(p_null, alpha, look_schedule(budget))


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
    _check("spending_design", p_null, alpha, looks)
    check_positive("spending_design", "exponent", exponent)
    upper = looks + 1
    state, first, spent, before = np.ones(1), 0, 0.0, 0
    for i, n in enumerate(looks):
        state, first, lost = _advance(state, first, int(n) - before, p_null)
        before = int(n)
        allowed = alpha * (1 - _ROUNDING) * (n / looks[-1]) ** exponent - spent - lost
        tail = np.cumsum(state[::-1])[::-1]  # P(count >= first + j)
        claimed = int(np.searchsorted(-tail, -allowed))  # first j with tail <= allowed
        if claimed < state.size:
            upper[i] = first + claimed
            spent += float(tail[claimed])
            state = state[:claimed]
        spent += lost
    lower = _futile(p_null, looks, upper, futility, population)
    never = np.full_like(looks, -1)
    never[-1] = upper[-1] - 1
    return _finished(p_null, alpha, looks, upper, lower, binding=never)


def optimal_design(
    p_null: float,
    alpha: float,
    looks: Counts,
    *,
    price: float = 4e-6,
    population: Population = SMOOTHING_POPULATION,
) -> SequentialDesign:
    """The test of least mean cost for a population: samples at ``price``, a missed claim at 1.

    The Bayes problem with a penalty for a claim at ``p_null`` is solved backwards, look by look;
    the penalty is then raised until the exact error is at most alpha.

    Args:
        p_null: probability under test, in (0, 1).
        alpha: error of the claim, in (0, 1).
        looks: increasing numbers of samples.
        price: of one sample, in missed claims, ``> 0``. Smaller misses fewer and samples more.
        population: what p to expect; it changes the cost, never the guarantee.

    Returns:
        The design.

    Raises:
        ValueError: an argument out of range, or no number of samples in ``looks`` can decide.
    """
    _check("optimal_design", p_null, alpha, looks)
    check_positive("optimal_design", "price", price)
    problem = _BayesProblem(p_null, looks, price, population)
    level = alpha * (1 - _ROUNDING)

    def error_at(log_penalty: float) -> tuple[float, Counts, Counts]:
        upper, lower = problem.solve(float(np.exp(log_penalty)))
        return _error(p_null, looks, upper, lower), upper, lower

    low, high = -2.0, -np.log(alpha) + 5.0
    while (best := error_at(high))[0] > level:
        low, high = high, high + 2.0
    for _ in range(14):
        middle = (low + high) / 2
        trial = error_at(middle)
        if trial[0] <= level:
            high, best = middle, trial
        else:
            low = middle
        if best[0] > 0.995 * alpha:
            break
    return _finished(p_null, alpha, looks, best[1], best[2], binding=best[2])


class _BayesProblem:
    """Backward induction under the null: every cost is weighted by likelihood ratios to p_null.

    With L_p(k, n) the likelihood ratio of p to p_null, the state (n, k) costs the least of: the
    penalty (claim), the sum of weight(p) L_p over p > p_null (give up), and price times the
    group's size times the sum of weight(p) L_p plus the mean, under p_null, of the next look's
    cost (go on). All are at most the penalty, so nothing overflows.
    """

    def __init__(self, p_null: float, looks: Counts, price: float, population: Population) -> None:
        self.p_null, self.looks = p_null, looks
        spread = _WINDOW * np.sqrt(looks * p_null * (1 - p_null)) + 2
        self.first = np.maximum(0, np.floor(looks * p_null - spread)).astype(np.int64)
        self.last = np.minimum(looks, np.ceil(looks * p_null + spread)).astype(np.int64)
        steps = np.diff(looks)
        self.missed, self.going_on = [], []
        ratios = LikelihoodRatios(population, p_null)
        for i, n in enumerate(looks):
            k = np.arange(self.first[i], self.last[i] + 1)
            missed, whole = ratios(k, int(n))
            self.missed.append(missed)
            self.going_on.append(price * steps[i] * whole if i < len(steps) else whole)

    def solve(self, penalty: float) -> tuple[Counts, Counts]:
        """Boundaries for one penalty."""
        upper, lower = self.looks + 1, np.full_like(self.looks, -1)
        cost = np.empty(0)
        for i in range(len(self.looks) - 1, -1, -1):
            stop = np.minimum(penalty, self.missed[i])
            k0 = int(self.first[i])
            if i == len(self.looks) - 1:
                claim = penalty < self.missed[i]
                cost = stop
                lower[i] = k0 + int(np.argmax(claim)) - 1 if claim.any() else self.looks[i]
                upper[i] = lower[i] + 1
                continue
            go_on = self.going_on[i] + self._next_mean(i, cost, penalty)
            claim = (penalty <= go_on) & (penalty < self.missed[i])
            give_up = (self.missed[i] <= go_on) & (self.missed[i] <= penalty)
            upper[i] = k0 + _run_from_top(claim)
            lower[i] = k0 + _run_from_bottom(give_up) - 1
            cost = np.minimum(stop, go_on)
        return upper, np.minimum(lower, upper - 1)

    def _next_mean(self, i: int, cost: Floats, penalty: float) -> Floats:
        """Mean cost of look i + 1 for each count of look i; 0 below its window, penalty above."""
        step = int(self.looks[i + 1] - self.looks[i])
        first, last = int(self.first[i]), int(self.last[i])
        begin, end = int(self.first[i + 1]), int(self.last[i + 1])
        padded = np.concatenate(
            [
                np.zeros(max(0, begin - first)),
                cost[max(0, first - begin) :],
                np.full(max(0, last + step - end), penalty),
            ]
        )[: last - first + 1 + step]
        return _next_look(padded, step, self.p_null)


def _run_from_top(flags: NDArray[np.bool_]) -> int:
    """Index of the first of the trues that reach the end; the length where the end is false."""
    return int(flags.size - np.argmin(flags[::-1])) if not flags.all() else 0


def _run_from_bottom(flags: NDArray[np.bool_]) -> int:
    """Number of trues at the start."""
    return int(np.argmin(flags)) if not flags.all() else int(flags.size)


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


def _next_look(values: Floats, step: int, p: float) -> Floats:
    """Mean of ``values[i + j]`` over the successes ``j`` of ``step`` samples."""
    begin, weights = _increments(step, p)
    window = values[begin : values.size - step + begin + weights.size - 1]
    result: Floats = np.convolve(window, weights[::-1], mode="valid")
    return result


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
        spread = _WINDOW * np.sqrt(n * p_null * (1 - p_null)) + 2
        first = max(0, int(n * p_null - spread))
        last = min(n, int(n * p_null + spread) + 1)
        whole = ratios(np.arange(first, last + 1), n)[1]
        success = np.where(np.arange(first, last + 1) >= upper[i], whole, 0.0)
        if i + 1 < len(looks):
            step = int(looks[i + 1]) - n
            below = np.zeros(max(0, begin_later - first))
            above = np.zeros(max(0, last + step + 1 - begin_later - later.size))
            padded = np.concatenate([below, later[max(0, first - begin_later) :], above])
            ahead = _next_look(padded[: last - first + 1 + step], step, p_null)
            success = np.where(success > 0, success, ahead)
            futile = success < limit * whole
            lower[i] = min(first + _run_from_bottom(futile) - 1, int(upper[i]) - 1)
        later, begin_later = success, first
    return lower


def _advance(state: Floats, first: int, step: int, p: float) -> tuple[Floats, int, float]:
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


def _forward(p: float, looks: Counts, upper: Counts, lower: Counts) -> tuple[Floats, Floats, float]:
    """Per look the probabilities of a claim and of stopping; and the probability lost to cuts."""
    claims, stops, lost = np.zeros(len(looks)), np.zeros(len(looks)), 0.0
    state, first, before = np.ones(1), 0, 0
    for i, n in enumerate(looks):
        state, first, cut = _advance(state, first, int(n) - before, p)
        before, lost = int(n), lost + cut
        top = int(np.clip(upper[i] - first, 0, state.size))
        bottom = int(np.clip(lower[i] + 1 - first, 0, top))
        claims[i] = state[top:].sum()
        stops[i] = claims[i] + state[:bottom].sum()
        state, first = state[bottom:top], first + bottom
    return claims, stops, lost


def _error(p_null: float, looks: Counts, upper: Counts, lower: Counts) -> float:
    """Upper bound of the probability of a claim at ``p_null``, tight to rounding."""
    claims, _, lost = _forward(p_null, looks, upper, lower)
    return float(claims.sum()) + lost


def _finished(
    p_null: float, alpha: float, looks: Counts, upper: Counts, lower: Counts, *, binding: Counts
) -> SequentialDesign:
    error = _error(p_null, looks, upper, binding)
    for boundary in (looks, upper, lower):
        boundary.setflags(write=False)
    return SequentialDesign(p_null, alpha, error, looks, upper, lower)


def _check(subject: str, p_null: float, alpha: float, looks: Any) -> None:
    check_open_unit(subject, "p_null", p_null)
    check_open_unit(subject, "alpha", alpha)
    if len(looks) == 0 or looks[0] < 1 or (np.diff(looks) <= 0).any():
        raise ValueError(f"{subject}: looks must be positive and increasing; got {looks}.")
