"""How many samples a radius is worth: a pilot's votes choose the number, fresh samples the radius.

The radius that ``n`` samples certify grows slowly with ``n``, and not at all for an input that no
number of samples certifies. Given the pilot's votes, the plan takes the ``n`` of the largest
expected radius less the price of its samples, over a prior of the probability. Since the pilot only
chooses ``n`` and its votes are never counted again, the Clopper-Pearson bound of the fresh samples
holds at the full level whatever the plan.

Source: R. Chen, J. Li, J. Yan, P. Li, B. Sheng, "Input-specific robustness certification for
randomized smoothing", AAAI 2022, arXiv 2112.12084 (planning from a pilot).
Departures: the pilot is not reused for the estimate, so no level is lost or unproven; the number
comes from an expectation over a prior instead of a bound on the loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special, stats
from torch import Tensor

from pyrobust._checks import check_integer, check_open_unit, check_positive
from pyrobust.certify.population import SMOOTHING_POPULATION, Population
from pyrobust.certify.statistics import clopper_pearson_lower

__all__ = ["PRICE", "RadiusPlan", "radius_plan"]

# Of a sample, in standard deviations of radius. On published CIFAR-10 logs at budget 100,000 it
# loses 0.8% to 2.2% of the mean radius (bench/samples_to_decide.py).
PRICE = 1e-6

_QUANTILES = (np.arange(31) + 0.5) / 31  # of the binomial counts that an expectation averages over


@dataclass(frozen=True)
class RadiusPlan:
    """The number of samples for each outcome of a pilot.

    Attributes:
        sizes: ``(S,)`` int64 numbers of samples to choose from, from 0 to the budget.
        gain: ``(Z, S)`` expected radius for each probability of the prior, in units of the price,
            less the price of the samples.
        log_hit: ``(Z,)`` logarithms of the probabilities.
        log_miss: ``(Z,)`` logarithms of one minus them.
        log_prior: ``(Z,)`` logarithms of their prior.
    """

    sizes: NDArray[np.int64]
    gain: NDArray[np.float64]
    log_hit: NDArray[np.float64]
    log_miss: NDArray[np.float64]
    log_prior: NDArray[np.float64]

    def choose(self, votes: Tensor, pilot: Tensor) -> Tensor:
        """``(B,)`` int64 numbers of samples for ``votes`` of ``pilot`` copies for the class."""
        hits = votes.cpu().double().numpy()[:, None]
        misses = pilot.cpu().double().numpy()[:, None] - hits
        posterior = special.softmax(
            hits * self.log_hit + misses * self.log_miss + self.log_prior, axis=1
        )
        return torch.from_numpy(self.sizes[(posterior @ self.gain).argmax(1)])


def radius_plan(
    radius: Callable[[Tensor], Tensor],
    alpha: float,
    budget: int,
    *,
    price: float = PRICE,
    population: Population = SMOOTHING_POPULATION,
) -> RadiusPlan:
    """Expected radii for a grid of probabilities and numbers of samples.

    Args:
        radius: signed radius of lower bounds of the probability, in units of the noise's sigma.
        alpha: level of the bound, in (0, 1).
        budget: largest number of samples, ``>= 1``.
        price: of a sample, in the unit of ``radius``, ``> 0``.
        population: prior of the probability; it cannot hurt the guarantee.

    Returns:
        The plan.

    Raises:
        ValueError: an argument out of range.
    """
    subject = "radius_plan"
    check_open_unit(subject, "alpha", alpha)
    check_integer(subject, "budget", budget, 1)
    check_positive(subject, "price", price)
    z = np.concatenate(
        [np.arange(-1.5, 0, 0.15), np.arange(0, 4.5, 0.1), np.arange(4.5, 7.01, 0.25)]
    )
    borders = np.concatenate([z[:1] - 0.1, (z[1:] + z[:-1]) / 2, z[-1:]])
    mass = -np.diff(np.interp(borders, population.z, population.survival))
    probability = special.ndtr(z)
    sizes = np.unique(np.geomspace(min(200, budget), budget, 28).round().astype(np.int64))
    gain = np.zeros((len(z), len(sizes) + 1))
    for j, n in enumerate(sizes, 1):
        counts = stats.binom.ppf(_QUANTILES[None], n, probability[:, None])
        # few distinct counts, and the inverse beta function is what costs
        distinct, where = np.unique(counts, return_inverse=True)
        values = radius(clopper_pearson_lower(distinct, int(n), alpha)).numpy()
        gain[:, j] = np.maximum(values, 0.0)[where.reshape(counts.shape)].mean(1) - price * n
    return RadiusPlan(
        sizes=np.concatenate([[0], sizes]),
        gain=gain,
        log_hit=special.log_ndtr(z),
        log_miss=special.log_ndtr(-z),
        log_prior=np.log(np.maximum(mass, 1e-9)),
    )


@functools.lru_cache(maxsize=64)
def plan_for(noise: Any, alpha: float, budget: int, price: float) -> RadiusPlan:
    """The plan for a noise (hashable), its radii in units of its sigma; kept in memory."""
    return radius_plan(lambda p: noise.radius(p) / noise.sigma, alpha, budget, price=price)
