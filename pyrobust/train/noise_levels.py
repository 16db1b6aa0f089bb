"""Noise levels of diffusion training and the schedules that go with them.

Source: Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative
Models", NeurIPS 2022, arXiv 2206.00364, equation 5 (levels); Song, Dhariwal, "Improved Techniques
for Training Consistency Models", ICLR 2024, arXiv 2310.14189 (how many, doubling in stages; the
public code of rRCM rounds up where that paper rounds down, and is followed here); Lei et al., ICLR
2025, arXiv 2501.13094 (decay of the target).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrobust._checks import check_integer, check_open_unit, check_positive

__all__ = ["KarrasSchedule", "improved_consistency_scales", "sigmoid_ema"]


@dataclass(frozen=True)
class KarrasSchedule:
    """Noise levels between ``sigma_max`` and ``sigma_min``, evenly spaced in ``sigma^(1/rho)``.

    Args:
        sigma_min: lowest level, ``> 0``, in the units of the normalised input.
        sigma_max: highest level, ``> sigma_min``.
        rho: bends the spacing towards the low levels, ``> 0``.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> [round(sigma, 4) for sigma in KarrasSchedule().sigmas(3).tolist()]
        [80.0, 2.5152, 0.002]
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        subject = "KarrasSchedule"
        check_positive(subject, "sigma_min", self.sigma_min)
        check_positive(subject, "sigma_max - sigma_min", self.sigma_max - self.sigma_min)
        check_positive(subject, "rho", self.rho)

    def sigmas(self, n: int) -> Tensor:
        """``(n,)`` float64 levels, strictly falling, the ends exact; ``n >= 2``."""
        check_integer("KarrasSchedule", "n", n, 2)
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        levels: Tensor = (
            high + torch.linspace(0, 1, n, dtype=torch.float64) * (low - high)
        ) ** self.rho
        levels[0], levels[-1] = self.sigma_max, self.sigma_min
        return levels

    def nearest(self, sigma: float, n: int) -> int:
        """Index of the level nearest to ``sigma`` among ``n``.

        Raises:
            ValueError: ``sigma`` lies outside the levels.
        """
        if not self.sigma_min <= sigma <= self.sigma_max:
            raise ValueError(
                f"KarrasSchedule: sigma must lie in [{self.sigma_min:g}, {self.sigma_max:g}]; "
                f"got {sigma}."
            )
        return int((self.sigmas(n) - sigma).abs().argmin())


def improved_consistency_scales(step: int, total: int, start: int = 20, end: int = 80) -> int:
    """How many noise levels a step uses: ``min(start 2^ceil(step / K'), end) + 1``.

    ``K' = ceil(total / log2(ceil(end / start) + 1))``, the length of a stage.

    Args:
        step: steps done, ``>= 0``.
        total: all steps, ``>= 1``.
        start: intervals at step 0, ``>= 1``.
        end: most intervals, ``>= start``.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> [improved_consistency_scales(step, 1000) for step in (0, 1, 400, 450)]
        [21, 41, 41, 81]
    """
    subject = "improved_consistency_scales"
    check_integer(subject, "step", step, 0)
    check_integer(subject, "total", total, 1)
    check_integer(subject, "start", start, 1)
    check_integer(subject, "end", end, start)
    stage = math.ceil(total / math.log2(math.ceil(end / start) + 1))
    doublings = -(-step // stage)
    return int(min(start * 2 ** min(doublings, 60), end)) + 1


def sigmoid_ema(
    step: int, total: int, start: float = 0.99, end: float = 0.9999, sharpness: float = 15.0
) -> float:
    """Decay of the moving average that serves as target, rising from ``start`` to ``end``.

    Args:
        step: steps done, ``>= 0``.
        total: all steps, ``>= 1``.
        start: decay at step 0, in (0, 1).
        end: decay that is approached, in ``[start, 1)``.
        sharpness: how early it is reached, ``> 0`` (15 for CIFAR, 10 for ImageNet).

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> sigmoid_ema(0, 100), round(sigmoid_ema(100, 100), 6)
        (0.99, 0.9999)
    """
    subject = "sigmoid_ema"
    check_integer(subject, "step", step, 0)
    check_integer(subject, "total", total, 1)
    check_open_unit(subject, "start", start)
    check_open_unit(subject, "end", end)
    check_positive(subject, "sharpness", sharpness)
    if end < start:
        raise ValueError(f"{subject}: end must be at least start = {start}; got {end}.")
    if end == start:
        return start
    done = min(step / total, 1.0)
    base = math.sqrt(done * (end**2 - start**2) + start**2)
    share = 2 / (1 + math.exp(-sharpness * (base - start) / (end - start))) - 1
    return share * end + (1 - share) * start
