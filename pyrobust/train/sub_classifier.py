"""Training of a classifier of a part of the input under noise, with the consistency penalty.

Source: S. Xia et al., "Mitigating the curse of dimensionality for certified robustness via dual
randomized smoothing", ICLR 2024, arXiv 2404.09586 (a network trained on whole noisy images is
fine-tuned on each half); J. Jeong, J. Shin, "Consistency regularization for certified robustness
of smoothed classifiers", NeurIPS 2020, arXiv 2006.04062 (the penalty).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust._checks import check_at_least, check_integer, check_positive
from pyrobust.certify.sub_image import SubImage
from pyrobust.train.loop import fit
from pyrobust.train.smoothing_losses import consistency_penalty

__all__ = ["NoisyConsistency", "train_subclassifier"]


@dataclass(frozen=True)
class NoisyConsistency:
    """Objective of :func:`pyrobust.train.fit`: cross-entropy on noisy copies and their agreement.

    Args:
        sigma: standard deviation of the noise, ``> 0``, in the units of the input.
        consistency: weight of :func:`consistency_penalty`, ``>= 0`` (the paper: 15).
        copies: noisy copies per input, ``>= 1``; at least 2 with ``consistency``.
        entropy: see :func:`consistency_penalty`.
        view: applied to the noisy input before the model, as a :class:`SubImage`; None is the
            identity.
        generator: source of the noise; None uses torch's default generator.

    Raises:
        ValueError: an argument out of range.
    """

    sigma: float
    consistency: float = 0.0
    copies: int = 1
    entropy: float = 0.05
    view: Callable[[Tensor], Tensor] | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        subject = type(self).__name__
        check_positive(subject, "sigma", self.sigma)
        check_at_least(subject, "consistency", self.consistency, 0.0)
        check_at_least(subject, "entropy", self.entropy, 0.0)
        check_integer(subject, "copies", self.copies, 2 if self.consistency > 0 else 1)

    def __call__(self, model: nn.Module, x: Tensor, labels: Tensor, done: float = 0.0) -> Tensor:
        """Mean loss over the batch; ``done`` is not used."""
        copies = x.repeat(self.copies, *[1] * (x.ndim - 1))
        noise = torch.randn(copies.shape, generator=self.generator, dtype=x.dtype)
        noisy = copies + self.sigma * noise.to(x.device)
        logits = model(noisy if self.view is None else self.view(noisy))
        loss = F.cross_entropy(logits, labels.repeat(self.copies))
        if self.consistency > 0:
            apart = logits.view(self.copies, x.shape[0], -1)
            loss = loss + self.consistency * consistency_penalty(apart, entropy=self.entropy)
        return loss


def train_subclassifier(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    mask: Tensor,
    sigma: float,
    consistency: float = 0.0,
    copies: int = 1,
    fill: str = "pool",
    reduce: str = "keep",
    epochs: int = 10,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> nn.Module:
    """Fine-tune ``model`` in place on one part of noisy inputs; leaves it in evaluation mode.

    Start from a network trained on whole noisy images, one copy per half.

    Args:
        model: classifier of what ``SubImage(mask, fill=fill, reduce=reduce)`` returns.
        images: ``(N, ...)`` float inputs.
        labels: ``(N,)`` int64 classes.
        mask: the part; see :class:`pyrobust.certify.SubImage`.
        sigma: standard deviation of the noise, ``> 0``, in the units of the input.
        consistency: weight of the consistency penalty, ``>= 0`` (the paper: 15 with 4 copies).
        copies: noisy copies per image, ``>= 1``; at least 2 with ``consistency``.
        fill: see :class:`pyrobust.certify.SubImage`.
        reduce: see :class:`pyrobust.certify.SubImage`.
        epochs: passes over the data, ``>= 1`` (the paper: 40).
        batch_size: images per step, ``>= 1``.
        learning_rate: of Adam, ``> 0``.
        generator: order of the batches and noise.
        progress: show a progress bar.

    Returns:
        ``model``.

    Raises:
        ValueError: an argument out of range, or a mask that does not fit.
        FloatingPointError: the loss is no longer finite.
    """
    objective = NoisyConsistency(
        sigma=sigma,
        consistency=consistency,
        copies=copies,
        view=SubImage(mask, fill=fill, reduce=reduce),
        generator=generator,
    )
    return fit(
        model,
        images,
        labels,
        objective=objective,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        generator=generator,
        progress=progress,
    )
