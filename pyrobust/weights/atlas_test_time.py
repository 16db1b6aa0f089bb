"""Test-time adaptation of aTLAS: learn coefficients from unlabelled inputs.

The most confident samples of each class are trusted and keep the label that the base gave them;
all others teach by the agreement of a weak and a strong view. See ``weights.atlas`` for the source.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyrobust._checks import check_choice, check_integer, check_open_unit, check_unit
from pyrobust.weights.anisotropic_composition import AnisotropicComposition
from pyrobust.weights.coefficient_search import CoefficientSearch, Fitting, Head, run_epochs

__all__ = ["adapt_test_time", "trusted_samples"]


def trusted_samples(logits: Tensor, per_class: int) -> Tensor:
    """The labels of the most confident samples of each predicted class.

    Args:
        logits: ``(N, K)`` scores of the unadapted model.
        per_class: samples of each class, ``>= 1``; fewer where fewer are predicted.

    Returns:
        ``(N,)`` int64: the predicted class of trusted samples, -1 for all others.

    Example:
        >>> trusted_samples(torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), 1)
        tensor([ 0, -1,  1])
    """
    check_integer("trusted_samples", "per_class", per_class, 1)
    confidence, labels = logits.softmax(1).max(1)
    trusted = torch.full_like(labels, -1)
    for c in range(logits.shape[1]):
        members = (labels == c).nonzero()[:, 0]
        order = confidence[members].argsort(descending=True, stable=True)[:per_class]
        trusted[members[order]] = c
    return trusted


def adapt_test_time(
    composition: AnisotropicComposition,
    head: Head,
    images: Tensor,
    *,
    weak: Callable[[Tensor], Tensor],
    strong: Callable[[Tensor], Tensor],
    objective: str = "consistency",
    threshold: float | str = "adaptive",
    per_class: int | None = None,
    trusted_share: float = 0.25,
    epochs: int = 10,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    clip: float | None = 1.0,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    progress: bool = False,
) -> CoefficientSearch:
    """Adapt to unlabelled inputs; ends with the coefficients of the last epoch.

    Args:
        composition: trained in place.
        head: features to ``(N, K)`` scores; frozen.
        images: ``(N, ...)`` inputs without labels.
        weak: weak change of a batch of inputs; its view gives the labels.
        strong: strong change of a batch; its view is taught.
        objective: ``"consistency"``, or ``"entropy"`` of the weak view (trusted samples are then
            not used).
        threshold: confidence above which an untrusted sample counts, in [0, 1]; ``"adaptive"``
            follows the mean confidence of the batches (decay 0.9, from the unadapted model's).
        per_class: trusted samples of each class; None is ``min(N / (10 K), 100)``, at least 1.
        trusted_share: of each batch, in (0, 1).
        epochs: passes over the untrusted samples, ``>= 1``.
        batch_size: ``>= 2``.
        lr: of AdamW.
        weight_decay: of AdamW.
        clip: largest norm of the gradient; None does not clip.
        autocast: mixed precision.
        seed: order of the samples.
        progress: show a progress bar.

    Returns:
        ``history`` has ``loss`` and ``score``, the mean largest probability over ``images``;
        the ``score`` is that of the last epoch: without labels there is nothing to choose by.

    Raises:
        ValueError: an option is out of range, or there are no images.
    """
    subject = "adapt_test_time"
    check_choice(subject, "objective", objective, ("consistency", "entropy"))
    check_integer(subject, "epochs", epochs, 1)
    check_integer(subject, "batch_size", batch_size, 2)
    check_open_unit(subject, "trusted_share", trusted_share)
    if isinstance(threshold, str):
        check_choice(subject, "threshold", threshold, ("adaptive",))
    else:
        check_unit(subject, "threshold", threshold)
    if len(images) == 0:
        raise ValueError(f"{subject}: images must hold at least one input; got 0.")
    with torch.no_grad():
        logits = torch.cat([head(composition(x)) for x in images.split(batch_size)])
    share = max(1, min(len(images) // (10 * logits.shape[1]), 100))
    trusted = trusted_samples(logits, share if per_class is None else per_class)
    teacher = _Views(composition, head, weak, strong, objective, threshold)
    teacher.level = float(logits.softmax(1).amax(1).mean())
    fitting = Fitting(composition, lr=lr, weight_decay=weight_decay, clip=clip, autocast=autocast)
    generator = torch.Generator().manual_seed(seed)

    def epoch() -> float:
        losses = [
            fitting.step(lambda pick=pick: teacher.loss(images[pick], trusted[pick]))  # type: ignore[misc]
            for pick in _batches(trusted, batch_size, trusted_share, generator)
        ]
        return sum(losses) / len(losses)

    @torch.no_grad()
    def judge() -> dict[str, float]:
        found = [head(composition(x)).softmax(1).amax(1) for x in images.split(batch_size)]
        return {"score": float(torch.cat(found).mean())}

    return run_epochs(fitting, epoch, judge, epochs, progress, "test time", choose="last")


class _Views:
    """The loss of one batch from its two views, and the threshold that follows the confidence."""

    def __init__(
        self,
        composition: AnisotropicComposition,
        head: Head,
        weak: Callable[[Tensor], Tensor],
        strong: Callable[[Tensor], Tensor],
        objective: str,
        threshold: float | str,
    ) -> None:
        self.composition, self.head = composition, head
        self.weak, self.strong = weak, strong
        self.objective, self.threshold = objective, threshold
        self.level = 0.0

    def loss(self, x: Tensor, trusted: Tensor) -> Tensor:
        # train builds on nn, nn on weights: at the top of the file this would be a circle
        from pyrobust.train.pseudo_labels import pseudo_label_consistency, softmax_entropy

        if self.objective == "entropy":
            return softmax_entropy(self.head(self.composition(self.weak(x))))
        with torch.no_grad():
            weak = self.head(self.composition(self.weak(x)))
        self.level = 0.9 * self.level + 0.1 * float(weak.softmax(1).amax(1).mean())
        limit = self.level if isinstance(self.threshold, str) else self.threshold
        strong = self.head(self.composition(self.strong(x)))
        return pseudo_label_consistency(weak, strong, trusted, min(limit, 1.0))


def _batches(
    trusted: Tensor, batch_size: int, share: float, generator: torch.Generator
) -> list[Tensor]:
    """Index batches: every untrusted sample once, joined by trusted ones in turn."""
    sure, rest = (trusted >= 0).nonzero()[:, 0], (trusted < 0).nonzero()[:, 0]
    sure = sure[torch.randperm(len(sure), generator=generator)]
    rest = rest[torch.randperm(len(rest), generator=generator)]
    kept = max(1, round(share * batch_size))
    if len(rest) == 0:
        return list(sure.split(batch_size))
    batches = []
    for i, others in enumerate(rest.split(batch_size - kept)):
        turn = torch.arange(i * kept, (i + 1) * kept) % len(sure)
        batches.append(torch.cat([others, sure[turn]]))
    return batches
