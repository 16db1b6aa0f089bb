"""The type of a sequential design: looks, boundaries, exact probability of a false claim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pyrobust._checks import check_integer, check_open_unit
from pyrobust.certify.recursion import Counts, claim_probability, walk

__all__ = ["ROUNDING", "SequentialDesign", "check_design", "finished", "look_schedule"]

ROUNDING = 1e-9  # of alpha, kept back for the rounding of the recursion


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
        claims, stops = walk(p, self.looks, self.upper, self.lower)[:2]
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


def finished(
    p_null: float, alpha: float, looks: Counts, upper: Counts, lower: Counts, *, binding: bool
) -> SequentialDesign:
    """The design with these boundaries and its exact error, its arrays read-only.

    ``binding`` counts on giving up at ``lower``; otherwise the error holds whether or not one does.
    """
    kept = lower
    if not binding:
        kept = np.full_like(looks, -1)
        kept[-1] = upper[-1] - 1
    error = claim_probability(p_null, looks, upper, kept)
    for boundary in (looks, upper, lower):
        boundary.setflags(write=False)
    return SequentialDesign(p_null, alpha, error, looks, upper, lower)


def check_design(subject: str, p_null: float, alpha: float, looks: Any) -> None:
    """Raise ValueError unless the arguments can make a design."""
    check_open_unit(subject, "p_null", p_null)
    check_open_unit(subject, "alpha", alpha)
    if len(looks) == 0 or looks[0] < 1 or (np.diff(looks) <= 0).any():
        raise ValueError(f"{subject}: looks must be positive and increasing; got {looks}.")
