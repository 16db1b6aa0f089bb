"""Radii of smoothed classifiers in l1 and l0, and the probability that a radius needs.

With ``p_lower`` at most the probability of the top class and ``p_upper`` at least that of every
other, no perturbation below the radius changes the class. One number suffices: ``p_upper`` is then
``1 - p_lower`` (two classes, or all others as one). Radii are signed, as
:func:`pyrobust.certify.gaussian_radius` (l2) is: a negative one says by how much the class fails.

Source: J. Teng, G. Lee, Y. Yuan, "l1 adversarial robustness certificates: a randomized smoothing
approach", 2019 (Laplace); G. Yang et al., "Randomized smoothing of all shapes and sizes", ICML
2020, arXiv 2002.08118 (uniform); A. Levine, S. Feizi, "Robustness certificates for sparse
adversarial attacks by randomized ablation", AAAI 2020, arXiv 1911.09272 (ablation).
Departures: ablation keeps each pixel by a coin of its own instead of a fixed number of pixels;
radii are rounded down, needed probabilities up.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from pyrobust._checks import check_open_unit, check_positive

__all__ = [
    "ablation_needs",
    "ablation_radius",
    "gaussian_needs",
    "laplace_needs",
    "laplace_radius",
    "uniform_needs",
    "uniform_radius",
]

_MARGIN = 1e-13  # relative, hundreds of times the rounding of the few operations here
_LARGEST = 1 - 2**-53


def uniform_radius(p_lower: Any, half_width: float, *, p_upper: Any = None) -> Tensor:
    """The l1 radius under uniform noise: ``half_width * (p_lower - p_upper)``.

    A shift of l1 norm r moves at most ``r / (2 half_width)`` of the probability.

    Args:
        p_lower: lower bounds of the top class's probability, in [0, 1], any shape.
        half_width: the noise is uniform on ``[-half_width, half_width]``, ``> 0``.
        p_upper: upper bounds of the runner-up's probability; None takes ``1 - p_lower``.

    Returns:
        float64, rounded down.

    Raises:
        ValueError: a probability outside [0, 1] or NaN, or ``half_width`` not positive.

    Example:
        >>> round(uniform_radius(0.9, 0.5).item(), 6)
        0.4
    """
    check_positive("uniform_radius", "half_width", half_width)
    top, other, device = _pair("uniform_radius", p_lower, p_upper)
    return _down(half_width * (top - other), half_width, device)


def uniform_needs(radius: float, half_width: float) -> float:
    """The probability above which :func:`uniform_radius` exceeds ``radius``, rounded up."""
    return _up(0.5 + radius / (2 * half_width))


def laplace_radius(p_lower: Any, scale: float, *, p_upper: Any = None) -> Tensor:
    """The l1 radius under Laplace noise.

    The larger of ``-scale * log(1 - p_lower + p_upper)`` and ``scale / 2 * log(p_lower / p_upper)``
    (for two classes always the first): a shift of l1 norm r changes a probability by a factor of
    at most ``exp(r / scale)``.

    Args:
        p_lower: lower bounds of the top class's probability, in [0, 1], any shape.
        scale: mean absolute value of the noise, ``> 0``.
        p_upper: upper bounds of the runner-up's probability; None takes ``1 - p_lower``.

    Returns:
        float64, rounded down; ``inf`` where ``p_lower`` is 1 and ``p_upper`` 0.

    Raises:
        ValueError: a probability outside [0, 1] or NaN, or ``scale`` not positive.

    Example:
        >>> round(laplace_radius(0.9, 1.0).item(), 4)
        1.6094
    """
    check_positive("laplace_radius", "scale", scale)
    top, other, device = _pair("laplace_radius", p_lower, p_upper)
    with np.errstate(divide="ignore"):
        difference = -np.log1p(other - top)
        ratio = (np.log(top) - np.log(other)) / 2
    return _down(scale * np.fmax(difference, ratio), scale, device)


def laplace_needs(radius: float, scale: float) -> float:
    """The probability above which :func:`laplace_radius` exceeds ``radius``, rounded up."""
    return _up(1 - math.exp(-radius / scale) / 2)


def ablation_radius(p_lower: Any, keep: float, *, p_upper: Any = None) -> Tensor:
    """The l0 radius, in pixels, where each pixel is kept with probability ``keep``, else hidden.

    Unless one of the r changed pixels is kept, the classifier sees the same: so a probability
    changes by at most ``1 - (1 - keep)^r``. The radius is the largest r for which that is less
    than half of ``p_lower - p_upper``.

    Args:
        p_lower: lower bounds of the top class's probability, in [0, 1], any shape.
        keep: probability that a pixel is kept, in (0, 1).
        p_upper: upper bounds of the runner-up's probability; None takes ``1 - p_lower``.

    Returns:
        float64 whole numbers, -1 or less where the class itself is not certain, 0 where only it is.

    Raises:
        ValueError: a probability outside [0, 1] or NaN, or ``keep`` outside (0, 1).

    Example:
        >>> ablation_radius(torch.tensor([0.5, 0.6, 0.95]), 0.1).tolist()
        [-1.0, 1.0, 5.0]
    """
    check_open_unit("ablation_radius", "keep", keep)
    top, other, device = _pair("ablation_radius", p_lower, p_upper)
    with np.errstate(divide="ignore"):
        pixels = np.log1p((other - top) / 2) / math.log1p(-keep)
    lowered = pixels - _MARGIN * (1 + np.abs(pixels))
    return torch.from_numpy(np.asarray(np.ceil(lowered) - 1, dtype=np.float64)).to(device)


def ablation_needs(radius: float, keep: float) -> float:
    """The probability above which :func:`ablation_radius` is at least ``radius``, rounded up."""
    return _up(0.5 - math.expm1(radius * math.log1p(-keep)))


def gaussian_needs(radius: float, sigma: float) -> float:
    """The probability above which :func:`pyrobust.certify.gaussian_radius` exceeds ``radius``."""
    return _up(float(special.ndtr(radius / sigma)))


def _pair(subject: str, p_lower: Any, p_upper: Any) -> tuple[Any, Any, torch.device]:
    device = torch.device("cpu")
    arrays: list[Any] = []
    for name, value in (("p_lower", p_lower), ("p_upper", p_upper)):
        if value is None:
            arrays.append(1 - arrays[0])
            continue
        if isinstance(value, Tensor):
            device, value = value.device, value.detach().cpu().double().numpy()
        array = np.asarray(value, dtype=np.float64)
        if not ((array >= 0) & (array <= 1)).all():
            raise ValueError(f"{subject}: {name} must lie in [0, 1]; got {value}.")
        arrays.append(array)
    return arrays[0], arrays[1], device


def _down(radius: Any, unit: float, device: torch.device) -> Tensor:
    """Lower by more than the error: of the result, and of differences of numbers of size 1."""
    with np.errstate(invalid="ignore"):  # inf - inf: not taken
        lowered = np.where(np.isfinite(radius), radius - _MARGIN * (np.abs(radius) + unit), radius)
    return torch.from_numpy(np.asarray(lowered, dtype=np.float64)).to(device)


def _up(probability: float) -> float:
    """Raise by more than the rounding error; at most the largest double below 1."""
    return min(probability + 4e-16 + _MARGIN * probability, _LARGEST) if probability < 1 else 1.0
