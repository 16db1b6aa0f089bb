"""Losses of training for randomized smoothing, as pure functions of the logits of noisy copies.

Gaussian augmentation, stability training, MACER and the consistency penalty; objectives that draw
the copies and call these, and the worst case over a ball (SmoothAdv), are in
:mod:`pyrobust.train.smoothing`.

Source: J. Cohen et al., ICML 2019, arXiv 1902.02918, section 3.3 (augmentation); B. Li, C. Chen,
W. Wang, L. Carin, "Certified adversarial robustness with additive noise", NeurIPS 2019, arXiv
1809.03113, equation 8 (stability); R. Zhai et al., "MACER: attack-free and scalable robust training
via maximizing certified radius", ICLR 2020, arXiv 2001.02378, equations 8 to 12; J. Jeong, J. Shin,
"Consistency regularization for certified robustness of smoothed classifiers", NeurIPS 2020, arXiv
2006.04062, equation 7.
Departures: MACER's radius is computed from probabilities kept inside the range of the quantile
function instead of dropping the inputs where it is not finite (those inputs have no gradient
either way).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pyrobust._checks import check_at_least, check_positive, check_shape

__all__ = [
    "consistency_penalty",
    "consistency_terms",
    "gaussian_augmentation_loss",
    "macer_loss",
    "smoothed_cross_entropy",
    "stability_loss",
]


def gaussian_augmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of every noisy copy.

    Args:
        logits: ``(B, m, K)`` float; ``m`` noisy copies per input.
        labels: ``(B,)`` int64 in ``[0, K)``.

    Returns:
        Scalar, nats.

    Raises:
        ValueError: the shapes disagree.

    Example:
        >>> gaussian_augmentation_loss(torch.zeros(1, 3, 4), torch.tensor([2]))
        tensor(1.3863)
    """
    _check("gaussian_augmentation_loss", logits, labels)
    copies = logits.shape[1]
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(copies))


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
    """``-log`` of the label's mean probability over the copies: the loss of the smoothed model.

    What SmoothAdv attacks and MACER classifies with (Salman et al. 2019, arXiv 1906.04584, eq. 6).

    Args:
        logits: ``(B, m, K)`` float; ``m`` noisy copies per input.
        labels: ``(B,)`` int64 in ``[0, K)``.
        reduction: ``"mean"`` or ``"none"``.

    Returns:
        Scalar, or ``(B,)``; nats.

    Raises:
        ValueError: the shapes disagree.
    """
    _check("smoothed_cross_entropy", logits, labels)
    log_each = F.log_softmax(logits, dim=-1)
    log_mean = torch.logsumexp(log_each, dim=1) - math.log(logits.shape[1])
    return F.nll_loss(log_mean, labels, reduction=reduction)


def stability_loss(clean: Tensor, logits: Tensor, labels: Tensor, *, weight: float = 2.0) -> Tensor:
    """Cross-entropy of the clean input, and of the noisy predictions against the clean one.

    ``CE(clean, label) + weight * mean H(softmax(clean), softmax(noisy))``; gradients pass through
    both predictions, as in published code.

    Args:
        clean: ``(B, K)`` float logits of the inputs themselves.
        logits: ``(B, m, K)`` float; ``m`` noisy copies per input.
        labels: ``(B,)`` int64 in ``[0, K)``.
        weight: of the second term, ``>= 0``.

    Returns:
        Scalar, nats.

    Raises:
        ValueError: the shapes disagree or ``weight`` is negative.
    """
    _check("stability_loss", logits, labels)
    check_shape("stability_loss", "clean", clean, (logits.shape[0], logits.shape[2]))
    check_at_least("stability_loss", "weight", weight, 0.0)
    target = clean.softmax(-1)[:, None]
    apart = -(target * F.log_softmax(logits, dim=-1)).sum(-1).mean()
    return F.cross_entropy(clean, labels) + weight * apart


def macer_loss(
    logits: Tensor,
    labels: Tensor,
    sigma: float,
    *,
    weight: float = 12.0,
    beta: float = 16.0,
    gamma: float = 8.0,
) -> Tensor:
    """Cross-entropy of the smoothed model, and a hinge on its radius where it is right.

    ``mean [CE + weight * sigma / 2 * max(gamma - xi, 0) * right]``, where ``xi`` is the difference
    of the normal quantiles of the two best mean probabilities, with logits scaled by ``beta``: the
    radius is ``sigma xi / 2``. As in published code the hinge acts where ``xi <= gamma`` and is
    finite.

    Args:
        logits: ``(B, m, K)`` float; ``m`` noisy copies per input, ``K >= 2``.
        labels: ``(B,)`` int64 in ``[0, K)``.
        sigma: standard deviation of the noise, ``> 0``.
        weight: of the hinge, ``>= 0`` (the paper's lambda).
        beta: inverse temperature of the radius, ``> 0``.
        gamma: margin of the hinge, ``> 0``.

    Returns:
        Scalar.

    Raises:
        ValueError: the shapes disagree or a parameter is out of range.
    """
    subject = "macer_loss"
    _check(subject, logits, labels)
    check_positive(subject, "sigma", sigma)
    check_at_least(subject, "weight", weight, 0.0)
    check_positive(subject, "beta", beta)
    check_positive(subject, "gamma", gamma)
    loss = smoothed_cross_entropy(logits, labels)
    best, index = (beta * logits).softmax(-1).mean(1).topk(2, dim=-1)
    right = index[:, 0] == labels
    # Outside (tiny, 1 - eps) the quantile is infinite; such inputs are left out below.
    info = torch.finfo(logits.dtype)
    inside = (best[:, 1] > info.tiny) & (best[:, 0] < 1)
    kept = best.clamp(info.tiny, 1 - info.eps)
    quantiles = torch.special.ndtri(kept)
    xi = quantiles[:, 0] - quantiles[:, 1]
    counted = right & inside & (xi <= gamma)
    hinge = torch.where(counted, gamma - xi, 0.0).sum() / labels.shape[0]
    return loss + weight * sigma / 2 * hinge


def consistency_terms(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence of noisy copies from their mean prediction, and the entropy of the mean.

    Args:
        logits: ``(copies, N, K)`` float; the copies of one input along the first axis.

    Returns:
        ``mean_i KL(mean || p_i)`` and ``H(mean)``, scalars averaged over the batch, nats.

    Raises:
        ValueError: ``logits`` has another number of axes.
    """
    if logits.ndim != 3:
        raise ValueError(
            f"consistency_penalty: logits must have shape (copies, N, K); "
            f"got {tuple(logits.shape)}."
        )
    log_each = F.log_softmax(logits, dim=-1)
    mean = log_each.exp().mean(0)
    log_mean = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
    divergence = (mean * (log_mean - log_each)).sum(-1).mean()
    return divergence, -(mean * log_mean).sum(-1).mean()


def consistency_penalty(logits: Tensor, *, entropy: float = 0.05) -> Tensor:
    """How far the predictions of noisy copies of one input differ from their mean.

    ``mean_i KL(mean || p_i) + entropy * H(mean)``, averaged over the batch (Jeong and Shin, eq. 7;
    their lambda multiplies this, and their eta is lambda times ``entropy``).

    Args:
        logits: ``(copies, N, K)`` float; the copies of one input along the first axis.
        entropy: weight of the entropy of the mean prediction, ``>= 0``.

    Returns:
        Scalar, ``>= 0``, nats.

    Raises:
        ValueError: ``entropy`` is negative or ``logits`` has another number of axes.

    Example:
        >>> consistency_penalty(torch.zeros(2, 1, 4), entropy=0.0)
        tensor(0.)
    """
    check_at_least("consistency_penalty", "entropy", entropy, 0.0)
    divergence, spread = consistency_terms(logits)
    return divergence + entropy * spread


def _check(subject: str, logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 3:
        raise ValueError(
            f"{subject}: logits must have shape (B, copies, K); got {tuple(logits.shape)}."
        )
    check_shape(subject, "labels", labels, (logits.shape[0],))
