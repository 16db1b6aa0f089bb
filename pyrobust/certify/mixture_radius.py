"""Radii inside which a mixture keeps the class of its robust part, whatever its other part does.

A mixture ``(1 - a) g + a h`` of class probabilities answers ``y`` wherever ``a (h_y - h_i)``
exceeds ``1 - a`` for all other classes ``i``, since ``g`` lies in [0, 1]. Below ``a = 1/2`` that
is impossible.

Source: Bai, Anderson, Kim, Sojoudi, "Improving the Accuracy-Robustness Trade-Off of Classifiers
via Adaptive Smoothing", arXiv 2301.12554, lemma 4.1 and theorems 4.2 and 4.5 (as numbered there).
Departures: the smoothed radius of the paper shifts the scaled functions ``a h_y`` and
``a h_i + 1 - a``; ours shifts ``h_y`` and ``h_i`` themselves, which is never smaller and is
attained (``bound="scaled"`` gives the paper's). Lipschitz constants must be proven: slopes seen
at sampled points are lower bounds of the constant and certify nothing.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from pyrobust._checks import (
    check_choice,
    check_float_tensor,
    check_positive,
    check_shape,
    check_unit,
)
from pyrobust.certify.statistics import gaussian_radius

__all__ = ["lipschitz_radius", "smoothed_lipschitz", "smoothed_mixture_radius"]

NO_RADIUS = (
    "a weight below 1/2 certifies no radius, because the standard part alone can outvote the "
    "robust one"
)
"""Why radii are 0 for low weights; certificates repeat it in their assumption."""

_STEPS = 200  # bisections; the interval is far below one unit in the last place after them


def smoothed_lipschitz(sigma: float) -> float:
    """l2 Lipschitz constant of the Gaussian mean of any function into [0, 1].

    ``1 / (sigma sqrt(2 pi))``, the slope of ``Phi(x / sigma)`` at 0, rounded up; the constant
    ``sqrt(2 / pi) / sigma`` found in public code is twice that.

    Args:
        sigma: standard deviation of the noise, ``> 0``, in the units of the input.

    Raises:
        ValueError: ``sigma`` is not positive and finite.

    Example:
        >>> round(smoothed_lipschitz(0.5), 4)
        0.7979
    """
    check_positive("smoothed_lipschitz", "sigma", sigma)
    return math.nextafter(1 / (sigma * math.sqrt(2 * math.pi)) * (1 + 1e-15), math.inf)


def lipschitz_radius(
    probabilities: Tensor, alpha: float | Tensor, lipschitz: float | Tensor, y: Tensor
) -> Tensor:
    """Radius of the mixture from a Lipschitz constant of each class probability of its robust part.

    ``min_i (a (h_y - h_i) + a - 1) / (a (L_y + L_i))`` over the other classes, floored at 0; in
    the norm that the constants are for.

    Args:
        probabilities: ``(N, K)`` float, values of ``h`` in [0, 1].
        alpha: weight of ``h``, one number or ``(N,)``, in [0, 1]; of an adaptive mixture, the
            lowest weight that it can take.
        lipschitz: proven constant of every ``h_i``, or ``(K,)``, one per class; ``>= 0``. For
            Gaussian means see :func:`smoothed_lipschitz`.
        y: ``(N,)`` int64 classes to keep.

    Returns:
        ``(N,)`` float64, ``>= 0``; ``inf`` where the margin holds and the constants are 0. For
        weights below 1/2 it is 0, and a warning says why.

    Raises:
        ValueError: a value out of range or shapes that disagree.

    Example:
        >>> h = torch.tensor([[0.9, 0.1]])
        >>> radius = lipschitz_radius(h, 0.8, 1.0, torch.tensor([0]))  # (0.64 - 0.2) / 1.6
        >>> round(radius.item(), 4)
        0.275
    """
    subject = "lipschitz_radius"
    check_float_tensor(subject, "probabilities", probabilities)
    check_shape(subject, "probabilities", probabilities, (None, None))
    check_shape(subject, "y", y, (len(probabilities),))
    h = probabilities.detach().double()
    if not bool(((h >= 0) & (h <= 1)).all()):
        raise ValueError(f"{subject}: probabilities must lie in [0, 1]; got {probabilities}.")
    weight = _weights(subject, alpha, h)[:, None]
    slopes = torch.as_tensor(lipschitz, dtype=torch.float64, device=h.device)
    if slopes.ndim > 1 or not bool((torch.isfinite(slopes) & (slopes >= 0)).all()):
        raise ValueError(
            f"{subject}: lipschitz must be finite and at least 0, one number or one per class; "
            f"got {lipschitz}."
        )
    slopes = slopes.expand(h.shape[1])
    # 1e-15: more than the roundings of numbers below 1
    margin = weight * (h.gather(1, y[:, None]) - h) + weight - 1 - 1e-15
    radius = margin / (weight * (slopes[y][:, None] + slopes))
    # A margin of nothing over a constant of nothing, and the class against itself.
    radius = torch.where(margin > 0, radius, 0.0).scatter(1, y[:, None], math.inf).amin(1)
    return radius * (1 - 1e-14)


def smoothed_mixture_radius(
    p_lower_top: Any,
    p_upper_second: Any,
    alpha: float | Tensor,
    sigma: float,
    *,
    bound: str = "tight",
) -> Tensor:
    """l2 radius of a mixture whose robust part is a Gaussian mean.

    ``"tight"``: ``sigma t`` with ``Phi(z_y - t) - Phi(z_i + t) = (1 - a) / a``, where ``z`` are the
    quantiles of the two probabilities. ``"scaled"``, the paper's: ``sigma / 2 (Phi^-1(a h_y) -
    Phi^-1(a h_i + 1 - a))``. Both are sound and equal for ``a = 1``.

    Args:
        p_lower_top: lower bounds of ``h_y``, in [0, 1], any shape.
        p_upper_second: upper bounds of the largest other ``h_i``; None takes ``1 - p_lower_top``.
        alpha: weight of ``h`` in [0, 1], broadcastable; the lowest one of an adaptive mixture.
        sigma: standard deviation of the noise, ``> 0``, in the units of the input.
        bound: ``"tight"`` or ``"scaled"``.

    Returns:
        float64 tensor, ``>= 0``, rounded down; 0 where nothing is certified. For weights below
        1/2 it is always 0, and a warning says why.

    Raises:
        ValueError: a probability outside [0, 1], ``alpha`` outside [0, 1], ``sigma`` not positive.

    Example:
        >>> round(smoothed_mixture_radius(0.841344746, None, 0.85, 1.0, bound="scaled").item(), 3)
        0.568
        >>> round(smoothed_mixture_radius(0.841344746, None, 0.85, 1.0).item(), 3)
        0.777
    """
    subject = "smoothed_mixture_radius"
    check_choice(subject, "bound", bound, ("tight", "scaled"))
    check_positive(subject, "sigma", sigma)
    top = torch.as_tensor(p_lower_top, dtype=torch.float64)
    other = 1 - top
    if p_upper_second is not None:
        other = torch.as_tensor(p_upper_second, dtype=torch.float64)
    for name, value in (("p_lower_top", top), ("p_upper_second", other)):
        if not bool(((value >= 0) & (value <= 1)).all()):
            raise ValueError(f"{subject}: {name} must lie in [0, 1]; got {value}.")
    weight = _weights(subject, alpha, top)
    top, other, weight = torch.broadcast_tensors(top, other.to(top.device), weight)
    possible = weight >= 0.5
    weight = torch.where(possible, weight, 1.0)
    if bound == "scaled":
        # outward by more than the roundings of numbers below 1
        own, rival = weight * top * (1 - 1e-15), weight * other + 1 - weight + 1e-15
        radius = gaussian_radius(own, sigma, p_upper=rival.clamp(max=1.0))
    else:
        radius = _shift(top, other, (1 - weight) / weight) * sigma
    radius = radius * (1 - 1e-12)
    return torch.where(possible & (radius > 0), radius, 0.0)


def _shift(top: Tensor, other: Tensor, gap: Tensor) -> Tensor:
    """Largest ``t`` (rounded down) with ``Phi(z_top - t) - Phi(z_other + t) >= gap``, or 0."""
    high_z, low_z, needed = (
        special.ndtri(top.cpu().numpy()),
        special.ndtri(other.cpu().numpy()),
        gap.cpu().numpy() + 1e-13,  # more than the error of the two distribution functions
    )

    def holds(t: Any) -> Any:
        with np.errstate(invalid="ignore"):
            return special.ndtr(high_z - t) - special.ndtr(low_z + t) >= needed

    # Beyond t = 40 the difference of a finite quantile is 0; an infinite one is cut there.
    low, high = np.zeros_like(high_z), np.full_like(high_z, 40.0)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        good = holds(middle)
        low, high = np.where(good, middle, low), np.where(good, high, middle)
    return torch.from_numpy(np.asarray(np.where(holds(low), low, 0.0))).to(top.device)


def _weights(subject: str, alpha: float | Tensor, like: Tensor) -> Tensor:
    """The weights as float64, checked to lie in [0, 1]."""
    if not isinstance(alpha, Tensor):
        check_unit(subject, "alpha", alpha)
    weight = torch.as_tensor(alpha, dtype=torch.float64, device=like.device)
    if not bool(((weight >= 0) & (weight <= 1)).all()):
        raise ValueError(f"{subject}: alpha must lie in [0, 1]; got {alpha}.")
    if bool((weight < 0.5).any()):
        warnings.warn(f"{subject}: {NO_RADIUS}; got {float(weight.min()):g}.", stacklevel=3)
    return weight.expand(len(like)) if like.ndim == 2 else weight
