"""Squashed classifier scores and the margin of the label over the best other class.

Source: Z. Li, P.-Y. Chen, T.-Y. Ho, "GREAT Score: Global Robustness Evaluation of Adversarial
Perturbation using Generative Models", NeurIPS 2024, arXiv 2304.09875 (the four squashings).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyrobust import _checks
from pyrobust._checks import check_choice, check_positive

__all__ = ["GREAT_SCORE_MAX", "SQUASHINGS", "check_labels", "confidence_margin", "squash"]

# The largest local score, that of a margin of 1.
GREAT_SCORE_MAX = math.sqrt(math.pi / 2)

SQUASHINGS: dict[str, Callable[[Tensor, float | Tensor], Tensor]] = {
    "sigmoid": lambda z, t: torch.sigmoid(z / t),
    "softmax": lambda z, t: torch.softmax(z / t, dim=-1),
    "sigmoid_softmax": lambda z, t: torch.softmax(torch.sigmoid(z) / t, dim=-1),
    "softmax_sigmoid": lambda z, t: torch.sigmoid(torch.softmax(z, dim=-1) / t),
}


def squash(logits: Tensor, activation: str = "sigmoid", temperature: float = 1.0) -> Tensor:
    """Logits to scores in [0, 1].

    Args:
        logits: ``(..., K)`` float.
        activation: ``"sigmoid"``, ``sigmoid(z / T)``; ``"softmax"``, ``softmax(z / T)``;
            ``"sigmoid_softmax"``, ``softmax(sigmoid(z) / T)``; ``"softmax_sigmoid"``,
            ``sigmoid(softmax(z) / T)``.
        temperature: ``T > 0``.

    Returns:
        ``(..., K)`` in [0, 1], dtype of ``logits``.

    Raises:
        ValueError: the activation is unknown or the temperature not positive.

    Example:
        >>> squash(torch.zeros(1, 2), "softmax")
        tensor([[0.5000, 0.5000]])
    """
    check_choice("squash", "activation", activation, SQUASHINGS)
    check_positive("squash", "temperature", temperature)
    return SQUASHINGS[activation](logits, temperature)


def confidence_margin(scores: Tensor, labels: Tensor) -> Tensor:
    """The score of the label minus the best score of another class.

    Args:
        scores: ``(..., N, K)`` float, ``K >= 2``.
        labels: ``(N,)`` int64 in ``[0, K)``.

    Returns:
        ``(..., N)``, negative where another class wins.
    """
    index = labels.expand(scores.shape[:-1]).unsqueeze(-1)
    own = scores.gather(-1, index).squeeze(-1)
    return own - scores.scatter(-1, index, -torch.inf).amax(-1)


def check_labels(subject: str, labels: Tensor, count: int, num_classes: int) -> None:
    """Raise unless ``labels`` are ``count >= 1`` integers in ``[0, num_classes)``."""
    if count == 0:
        raise ValueError(f"{subject}: there must be at least one sample; got none.")
    _checks.check_labels(subject, "labels", labels, count, num_classes)
