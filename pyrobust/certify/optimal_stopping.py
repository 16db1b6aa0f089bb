"""The sequential test of least mean cost, by backward induction.

No test with the same looks and the same error has a lower mean of samples and missed claims for the
population it is built for; it is valid for any other, since the error is that at ``p_null`` alone.

Source: J. Eales, C. Jennison, "An improved method for deriving optimal one-sided group sequential
tests", Biometrika 79 (1992); S. Barber, C. Jennison, "Optimal asymmetric one-sided group sequential
tests", Biometrika 89 (2002).
Departures: binomial counts throughout, no normal approximation; the Bayes problem is written under
the null hypothesis, with likelihood ratios, so that nothing overflows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyrobust._checks import check_positive
from pyrobust.certify.design import ROUNDING, SequentialDesign, check_design, finished
from pyrobust.certify.population import SMOOTHING_POPULATION, LikelihoodRatios, Population
from pyrobust.certify.recursion import Counts, Floats, claim_probability, mean_ahead

__all__ = ["PRICE", "first_true_run", "last_true_run", "optimal_design"]

# Of a sample, in missed claims. On published CIFAR-10 logs at budget 100,000 it misses at most 0.1
# points of certified accuracy (bench/samples_to_decide.py).
PRICE = 3e-6

WINDOW = 9.0  # standard deviations around the null that backward induction looks at


def optimal_design(
    p_null: float,
    alpha: float,
    looks: Counts,
    *,
    price: float = PRICE,
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
    check_design("optimal_design", p_null, alpha, looks)
    check_positive("optimal_design", "price", price)
    problem = _BayesProblem(p_null, looks, price, population)
    level = alpha * (1 - ROUNDING)

    def error_at(log_penalty: float) -> tuple[float, Counts, Counts]:
        upper, lower = problem.solve(float(np.exp(log_penalty)))
        return claim_probability(p_null, looks, upper, lower), upper, lower

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
    return finished(p_null, alpha, looks, best[1], best[2], binding=True)


class _BayesProblem:
    """Backward induction under the null: every cost is weighted by likelihood ratios to p_null.

    With L_p(k, n) the likelihood ratio of p to p_null, the state (n, k) costs the least of: the
    penalty (claim), the sum of weight(p) L_p over p > p_null (give up), and price times the
    group's size times the sum of weight(p) L_p plus the mean, under p_null, of the next look's
    cost (go on). All are at most the penalty, so nothing overflows.
    """

    def __init__(self, p_null: float, looks: Counts, price: float, population: Population) -> None:
        self.p_null, self.looks = p_null, looks
        spread = WINDOW * np.sqrt(looks * p_null * (1 - p_null)) + 2
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
            upper[i] = k0 + last_true_run(claim)
            lower[i] = k0 + first_true_run(give_up) - 1
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
        return mean_ahead(padded, step, self.p_null)


def last_true_run(flags: NDArray[np.bool_]) -> int:
    """Index of the first of the trues that reach the end; the length where the end is false."""
    return int(flags.size - np.argmin(flags[::-1])) if not flags.all() else 0


def first_true_run(flags: NDArray[np.bool_]) -> int:
    """Number of trues at the start."""
    return int(np.argmin(flags)) if not flags.all() else int(flags.size)
