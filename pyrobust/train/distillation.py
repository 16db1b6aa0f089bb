"""Distillation: hard labels and the soft labels of a teacher in one loss.

Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015,
arXiv 1503.02531.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust._checks import check_at_least, check_eval_mode, check_positive, check_unit

__all__ = ["Distillation", "distillation_loss"]


def distillation_loss(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean cross-entropy with the labels plus that with the teacher's probabilities.

    Args:
        logits: ``(N, K)`` of the student.
        labels: ``(N,)`` int64.
        teacher_logits: ``(N, K)``, or None for hard labels alone.
        temperature: both logits are divided by it in the soft part, which is multiplied by its
            square; ``> 0``.
        soft_weight: of the soft part, ``>= 0``.
        label_smoothing: of the hard labels, in [0, 1].

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> distillation_loss(logits, torch.tensor([0]), logits)
        tensor(1.3863)
    """
    check_positive("distillation_loss", "temperature", temperature)
    check_at_least("distillation_loss", "soft_weight", soft_weight, 0.0)
    check_unit("distillation_loss", "label_smoothing", label_smoothing)
    hard = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    if teacher_logits is None:
        return hard
    target = (teacher_logits.detach() / temperature).softmax(-1)
    soft = F.cross_entropy(logits / temperature, target)
    return hard + soft_weight * temperature**2 * soft


@dataclass(frozen=True)
class Distillation:
    """:func:`distillation_loss` as an objective of :func:`~pyrobust.train.fit`.

    Args:
        teacher: in evaluation mode; None for hard labels alone.
        temperature: as for the function.
        soft_weight: as for the function.
        label_smoothing: as for the function.

    Raises:
        ValueError: the teacher is in training mode.
    """

    teacher: nn.Module | None = None
    temperature: float = 1.0
    soft_weight: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.teacher is not None:
            check_eval_mode("Distillation", self.teacher)

    def __call__(self, model: nn.Module, x: Tensor, labels: Tensor, done: float = 0.0) -> Tensor:
        """Mean loss over the batch; ``done`` is not used."""
        soft = None
        if self.teacher is not None:
            with torch.no_grad():
                soft = self.teacher(x)
        return distillation_loss(
            model(x),
            labels,
            soft,
            temperature=self.temperature,
            soft_weight=self.soft_weight,
            label_smoothing=self.label_smoothing,
        )
