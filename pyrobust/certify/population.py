"""What probabilities to expect when many inputs are certified: a prior that steers sampling.

A population decides how cheap a sequential test is, never whether it is valid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

__all__ = ["SMOOTHING_POPULATION", "LikelihoodRatios", "Population"]

Floats = NDArray[np.float64]

# Cell borders around a null hypothesis, in quantile units: the costly inputs are the close ones.
_OFFSETS = np.array([0.0, 0.003, 0.006, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16])
_CELL = 0.1


@dataclass(frozen=True)
class Population:
    """A distribution of ``z = Phi^-1(p)``: survival falls linearly between the given points.

    Attributes:
        z: increasing quantiles.
        survival: falling shares of the inputs with a quantile above each; from 1 to 0.
    """

    z: tuple[float, ...]
    survival: tuple[float, ...]

    def cells(self, z_null: float) -> tuple[Floats, Floats]:
        """Midpoints and masses of cells that are fine around ``z_null``, which is a border."""
        around = np.concatenate([z_null - _OFFSETS, z_null + _OFFSETS])
        even = np.arange(self.z[0], self.z[-1], _CELL)
        inside = (around > self.z[0]) & (around < self.z[-1])
        borders = np.unique(np.concatenate([self.z, even, around[inside]]))
        mass = -np.diff(np.interp(borders, self.z, self.survival))
        return (borders[1:] + borders[:-1]) / 2, mass


class LikelihoodRatios:
    """Mixtures over a population of the likelihood ratio to a null hypothesis.

    Args:
        population: the mixture.
        p_null: the probability that every ratio is taken to, in (0, 1).
    """

    def __init__(self, population: Population, p_null: float) -> None:
        z_null = float(special.ndtri(p_null))
        z, self._mass = population.cells(z_null)
        self._above = z > z_null
        self._log_hit = special.log_ndtr(z) - np.log(p_null)
        self._log_miss = special.log_ndtr(-z) - np.log1p(-p_null)

    def __call__(self, k: NDArray[np.int64], n: int) -> tuple[Floats, Floats]:
        """``(M,)`` sums of mass times ratio at ``k`` of ``n``: over ``p > p_null``, and over all.

        Ratios are cut at e^600; only counts that no test goes on from meet the cut.
        """
        exponent = np.outer(k, self._log_hit) + np.outer(n - k, self._log_miss)
        ratio = np.exp(np.minimum(exponent, 600.0, out=exponent), out=exponent)
        above: Floats = ratio[:, self._above] @ self._mass[self._above]
        return above, ratio @ self._mass


# Certified accuracies of a ResNet-110 on CIFAR-10 at sigma 0.5 (Cohen et al., ICML 2019), radius
# over sigma as z; what is not certified at radius 0 is spread below.
SMOOTHING_POPULATION = Population(
    z=(-1.5, -0.8, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 5.0),
    survival=(1.0, 0.9, 0.652, 0.546, 0.414, 0.32, 0.234, 0.152, 0.094, 0.052, 0.0),
)
