"""Confidence bounds for votes and means, and the radii that follow from them.

All functions take numbers, arrays or tensors and return float64 tensors on the device of their
first tensor. Bounds are pushed outward by more than the rounding error of the special functions,
so that the stated confidence also holds for the number returned.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

from pyrobust._checks import check_integer, check_open_unit, check_positive

__all__ = [
    "class_bounds",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "empirical_bernstein_margin",
    "gaussian_radius",
    "hoeffding_lower",
    "hoeffding_upper",
    "randomised_lower",
    "union_bound",
]

# scipy's inverse beta function agrees with 50-digit arithmetic to about 1e-13 of min(p, 1 - p)
# (tests/certify/test_statistics.py); three orders more are given away.
_BETA_MARGIN = 1e-10
_QUANTILE_MARGIN = 1e-13
_LEAST_SHARE = 0.05  # of randomised_lower


def clopper_pearson_lower(k: Any, n: Any, alpha: float) -> Tensor:
    """One-sided exact lower confidence bound of a binomial proportion.

    With probability at least ``1 - alpha`` over the votes the bound lies at or below the true
    proportion (Clopper and Pearson, Biometrika 26, 1934).

    Args:
        k: number of successes, integers in ``[0, n]``, any shape.
        n: number of trials, integers ``>= 1``, broadcastable to ``k``.
        alpha: probability of error, in the open interval (0, 1).

    Returns:
        float64 tensor of the broadcast shape, values in ``[0, 1)``; 0 where ``k`` is 0.

    Raises:
        ValueError: ``alpha`` outside (0, 1), ``n`` below 1, or ``k`` outside ``[0, n]``.

    Example:
        >>> clopper_pearson_lower(100, 100, 0.001)
        tensor(0.9333, dtype=torch.float64)
    """
    successes, trials, device = _counts("clopper_pearson_lower", k, n, alpha)
    positive = np.maximum(successes, 1)
    bound = stats.beta.ppf(alpha, positive, trials - positive + 1)
    bound = bound - _BETA_MARGIN * np.minimum(bound, 1 - bound)
    return _tensor(np.where(successes == 0, 0.0, np.clip(bound, 0.0, 1.0)), device)


def clopper_pearson_upper(k: Any, n: Any, alpha: float) -> Tensor:
    """One-sided exact upper confidence bound of a binomial proportion.

    Args:
        k: number of successes, integers in ``[0, n]``, any shape.
        n: number of trials, integers ``>= 1``, broadcastable to ``k``.
        alpha: probability of error, in the open interval (0, 1).

    Returns:
        float64 tensor of the broadcast shape, values in ``(0, 1]``; 1 where ``k`` equals ``n``.

    Raises:
        ValueError: ``alpha`` outside (0, 1), ``n`` below 1, or ``k`` outside ``[0, n]``.

    Example:
        >>> clopper_pearson_upper(0, 100, 0.001)
        tensor(0.0667, dtype=torch.float64)
    """
    successes, trials, device = _counts("clopper_pearson_upper", k, n, alpha)
    failures = np.maximum(trials - successes, 1)
    bound = stats.beta.isf(alpha, trials - failures + 1, failures)
    bound = bound + _BETA_MARGIN * np.minimum(bound, 1 - bound)
    return _tensor(np.where(successes == trials, 1.0, np.clip(bound, 0.0, 1.0)), device)


def randomised_lower(k: Any, n: Any, alpha: float, uniform: Any) -> Tensor:
    """Lower confidence bound of a binomial proportion with hardly any of ``alpha`` left unused.

    The largest ``p`` with ``P(K > k) + uniform * P(K = k) <= alpha`` (W. L. Stevens, Biometrika 37,
    1950; for smoothing V. Voracek, NeurIPS 2024, arXiv 2406.17830). It lies between the bounds of
    Clopper and Pearson for ``k`` and ``k + 1`` successes; the gain is largest where all succeed.

    Args:
        k: number of successes, integers in ``[0, n]``, any shape.
        n: number of trials, integers ``>= 1``, broadcastable to ``k``.
        alpha: probability of error, in the open interval (0, 1).
        uniform: numbers in ``[0, 1]``, broadcastable, uniform and independent of the votes; they
            must be fixed before the votes are seen. 1 gives the bound of Clopper and Pearson;
            below 0.05 they count as 0.05, and where all succeed below ``2 alpha`` as that, which
            errs less (up to alpha ``n`` successes would prove p = 1).

    Returns:
        float64 tensor of the broadcast shape, values in ``[0, 1)``.

    Raises:
        ValueError: ``alpha``, ``n``, ``k`` or ``uniform`` out of range.

    Example:
        >>> randomised_lower(100, 100, 0.001, torch.tensor([1.0, 0.5, 0.1]))
        tensor([0.9333, 0.9397, 0.9550], dtype=torch.float64)
    """
    subject = "randomised_lower"
    successes, trials, device = _counts(subject, k, n, alpha)
    share = _probabilities(subject, "uniform", uniform)
    share = np.maximum(share, _LEAST_SHARE)
    successes, trials, share = np.broadcast_arrays(successes, trials, share)
    more, failures = successes + 1, trials - successes
    share = np.where(failures == 0, np.maximum(share, min(2 * alpha, 1.0)), share)
    low = _array(clopper_pearson_lower(successes, trials, alpha))
    high = _array(clopper_pearson_lower(np.minimum(more, trials), trials, alpha))
    high = np.where(failures == 0, 1.0, high)
    for _ in range(60):  # bisection, down to the spacing of doubles
        middle = (low + high) / 2
        exceeded = special.betainc(more, np.maximum(failures, 1), middle) * (failures > 0)
        reached = special.betainc(np.maximum(successes, 1), failures + 1, middle)
        reached = np.where(successes == 0, 1.0, reached)
        within = (1 - share) * exceeded + share * reached <= alpha
        low, high = np.where(within, middle, low), np.where(within, high, middle)
    low = low - _BETA_MARGIN * np.minimum(low, 1 - low)
    return _tensor(np.clip(low, 0.0, 1.0), device)


def hoeffding_lower(mean: Any, n: Any, alpha: float, *, span: float = 1.0) -> Tensor:
    """Lower confidence bound of the mean of independent bounded variables (Hoeffding 1963, th. 2).

    Args:
        mean: observed means of ``n`` values each, any shape.
        n: number of values, integers ``>= 1``.
        alpha: probability of error, in the open interval (0, 1).
        span: width of the interval that holds every value, ``> 0``.

    Returns:
        float64 tensor, ``mean - span * sqrt(ln(1 / alpha) / (2 n))``.

    Raises:
        ValueError: ``alpha`` outside (0, 1), ``n`` below 1 or ``span`` not positive.
    """
    value, margin, device = _hoeffding("hoeffding_lower", mean, n, alpha, span)
    return _tensor(np.nextafter(value - margin, -np.inf), device)


def hoeffding_upper(mean: Any, n: Any, alpha: float, *, span: float = 1.0) -> Tensor:
    """Upper confidence bound of the mean of bounded variables; see :func:`hoeffding_lower`.

    Args:
        mean: observed means of ``n`` values each, any shape.
        n: number of values, integers ``>= 1``.
        alpha: probability of error, in the open interval (0, 1).
        span: width of the interval that holds every value, ``> 0``.

    Returns:
        float64 tensor, ``mean + span * sqrt(ln(1 / alpha) / (2 n))``.

    Raises:
        ValueError: ``alpha`` outside (0, 1), ``n`` below 1 or ``span`` not positive.
    """
    value, margin, device = _hoeffding("hoeffding_upper", mean, n, alpha, span)
    return _tensor(np.nextafter(value + margin, np.inf), device)


def empirical_bernstein_margin(values: Tensor, alpha: float, *, span: float, dim: int) -> Tensor:
    """How far a mean may lie above the expectation, judged by the sample variance.

    With probability at least ``1 - alpha`` the mean of ``n`` independent values of a range of
    width ``span`` exceeds its expectation by at most ``sqrt(2 V ln(2 / alpha) / n) + 7 span
    ln(2 / alpha) / (3 (n - 1))``, ``V`` the unbiased sample variance; likewise below (A. Maurer and
    M. Pontil, "Empirical Bernstein bounds and sample-variance penalization", COLT 2009, theorem 4).

    Args:
        values: independent values, float, ``n >= 1`` along ``dim``.
        alpha: probability of error of the one-sided statement, in the open interval (0, 1).
        span: width of the interval that holds every value, ``> 0``.
        dim: the dimension of the values.

    Returns:
        float64 tensor without ``dim``, at most ``span``; ``span`` for a single value.

    Raises:
        ValueError: ``alpha`` outside (0, 1), ``span`` not positive, or no value.
    """
    count = values.shape[dim]
    check_integer("empirical_bernstein_margin", "the number of values", count, 1)
    if count == 1:
        return torch.full_like(values.select(dim, 0), span, dtype=torch.float64)
    variance = values.double().var(dim)
    return bernstein_margin(variance, count, alpha, span=span)


def bernstein_margin(variance: Tensor, n: int, alpha: float, *, span: float) -> Tensor:
    """:func:`empirical_bernstein_margin` from the unbiased sample variance of ``n >= 2`` values."""
    check_open_unit("empirical_bernstein_margin", "alpha", alpha)
    check_positive("empirical_bernstein_margin", "span", span)
    log = float(np.log(2 / alpha))
    margin = (2 * variance.double() * log / n).sqrt() + 7 * span * log / (3 * (n - 1))
    return (margin * (1 + 1e-12)).clamp(max=span)


def union_bound(alpha: float, count: int) -> float:
    """The level at which each of ``count`` statements holds so that all hold at level ``alpha``.

    Args:
        alpha: probability of error of the joint statement, in the open interval (0, 1).
        count: number of statements, ``>= 1``; they may depend on each other.

    Returns:
        ``alpha / count``, rounded down.

    Raises:
        ValueError: ``alpha`` outside (0, 1) or ``count`` below 1.

    Example:
        >>> union_bound(0.001, 1)
        0.001
    """
    check_open_unit("union_bound", "alpha", alpha)
    check_integer("union_bound", "count", count, 1)
    return alpha if count == 1 else float(np.nextafter(alpha / count, 0.0))


def class_bounds(counts: Tensor, top: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Bounds of the top class from below and of every other class from above, jointly.

    Half of alpha goes to the top class, the other half to the other classes in equal parts, each
    by Clopper and Pearson. For radii of several classes, where the top class has less than half of
    the votes and is still far ahead.

    Args:
        counts: ``(B, K)`` int64 votes, ``K >= 2``, of which ``top`` was chosen independently.
        top: ``(B,)`` int64 classes.
        alpha: probability that any of the bounds fails, in (0, 1).

    Returns:
        ``p_lower`` and ``p_upper``, ``(B,)`` float64; ``p_upper`` is at most ``1 - p_lower``.

    Raises:
        ValueError: ``alpha`` outside (0, 1), or fewer than two classes.

    Example:
        >>> lower, upper = class_bounds(torch.tensor([[40, 5, 5]]), torch.tensor([0]), 0.01)
        >>> bool(lower < 0.8), bool(upper > 0.1)
        (True, True)
    """
    check_open_unit("class_bounds", "alpha", alpha)
    classes = counts.shape[-1]
    check_integer("class_bounds", "classes", classes, 2)
    total = counts.sum(-1).clamp_min(1)  # no votes at all: bounds 0 and 1
    lower = clopper_pearson_lower(counts.gather(1, top[:, None])[:, 0], total, alpha / 2)
    others = counts.scatter(1, top[:, None], -1).amax(1)
    each = union_bound(alpha / 2, classes - 1)
    upper = clopper_pearson_upper(others, total, each)
    upper = torch.where(counts.sum(-1) == 0, 1.0, upper)
    return lower, torch.minimum(upper, 1 - lower)


def gaussian_radius(p_lower: Any, sigma: Any, *, p_upper: Any = None) -> Tensor:
    """The l2 radius within which a Gaussian-smoothed classifier keeps its class.

    One class: ``sigma * Phi^-1(p_lower)``; two classes: ``sigma / 2 * (Phi^-1(p_lower) -
    Phi^-1(p_upper))`` (Cohen, Rosenfeld, Kolter, ICML 2019, arXiv 1902.02918, theorem 1). Signed:
    a negative value says by how much the class fails, and nothing is certified there.

    Args:
        p_lower: lower bounds of the top class's probability, in ``[0, 1]``, any shape.
        sigma: standard deviation of the noise, ``> 0``, in the units of the input.
        p_upper: upper bounds of the runner-up's probability, in ``[0, 1]``; None takes
            ``1 - p_lower``.

    Returns:
        float64 tensor, rounded down; ``-inf`` where ``p_lower`` is 0, ``inf`` where it is 1.

    Raises:
        ValueError: a probability outside ``[0, 1]`` or NaN, or ``sigma`` not positive and finite.

    Example:
        >>> gaussian_radius(torch.tensor([0.3, 0.9772498680518208], dtype=torch.float64), 0.25)
        tensor([-0.1311,  0.5000], dtype=torch.float64)
    """
    device = _device(p_lower, p_upper, sigma)
    scale = _array(sigma)
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"gaussian_radius: sigma must be finite and positive; got {sigma}.")
    top = _probabilities("gaussian_radius", "p_lower", p_lower)
    with np.errstate(invalid="ignore"):  # inf - inf: settled below
        if p_upper is None:
            radius = scale * special.ndtri(top)
            size = np.abs(radius)
        else:
            other = _probabilities("gaussian_radius", "p_upper", p_upper)
            first, second = special.ndtri(top), special.ndtri(other)
            radius = scale / 2 * (first - second)
            radius = np.where(np.isnan(radius), -np.inf, radius)
            size = scale / 2 * (np.abs(first) + np.abs(second))
    return _tensor(_round_down(radius, size), device)


def _round_down(value: Any, size: Any) -> Any:
    """Lower by more than the error of operations on numbers of a size; 0 becomes negative."""
    with np.errstate(invalid="ignore"):
        lowered = np.nextafter(value - _QUANTILE_MARGIN * size, -np.inf)
    return np.where(np.isfinite(value), lowered, value)


def _counts(subject: str, k: Any, n: Any, alpha: float) -> tuple[Any, Any, torch.device]:
    check_open_unit(subject, "alpha", alpha)
    successes, trials = _array(k), _array(n)
    _check_trials(subject, trials)
    successes, trials = np.broadcast_arrays(successes, trials)
    wrong = ~((successes >= 0) & (successes <= trials) & (successes == np.floor(successes)))
    if wrong.any():
        seen = f"{successes[wrong][0]:g} of {trials[wrong][0]:g}"
        raise ValueError(f"{subject}: k must be an integer in [0, n]; got {seen}.")
    return successes, trials, _device(k, n)


def _check_trials(subject: str, trials: Any) -> None:
    with np.errstate(invalid="ignore"):
        wrong = ~((trials >= 1) & np.isfinite(trials) & (trials == np.floor(trials)))
    if wrong.any():
        raise ValueError(f"{subject}: n must be at least 1, an integer; got {trials[wrong][0]:g}.")


def _hoeffding(
    subject: str, mean: Any, n: Any, alpha: float, span: float
) -> tuple[Any, Any, torch.device]:
    check_open_unit(subject, "alpha", alpha)
    check_positive(subject, "span", span)
    trials = _array(n)
    _check_trials(subject, trials)
    margin = span * np.sqrt(-np.log(alpha) / (2 * trials)) * (1 + 1e-14)
    return _array(mean), margin, _device(mean, n)


def _probabilities(subject: str, name: str, value: Any) -> Any:
    array = _array(value)
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"{subject}: {name} must lie in [0, 1]; got {value}.")
    return array


def _array(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def _device(*values: Any) -> torch.device:
    tensors = [value for value in values if isinstance(value, Tensor)]
    return tensors[0].device if tensors else torch.device("cpu")


def _tensor(value: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(value, dtype=np.float64)).to(device)
