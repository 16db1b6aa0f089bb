"""Losses for unlabelled data: agreement of two views, and entropy.

Source: Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and
Confidence", NeurIPS 2020, arXiv 2001.07685, equations 3 and 4; trusted samples as in Zhang et al.,
"Knowledge Composition using Task Vectors with Learned Anisotropic Scaling", NeurIPS 2024, arXiv
2407.02880 (test-time adaptation).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pyrobust._checks import check_shape, check_unit

__all__ = ["pseudo_label_consistency", "softmax_entropy"]


def pseudo_label_consistency(
    logits_weak: Tensor,
    logits_strong: Tensor,
    trusted: Tensor | None = None,
    threshold: float = 0.99,
) -> Tensor:
    """Cross-entropy of the strong view against the confident label of the weak view.

    Args:
        logits_weak: ``(N, K)`` scores of weakly changed inputs; no gradient flows into them.
        logits_strong: ``(N, K)`` scores of the same inputs, strongly changed.
        trusted: ``(N,)`` int64, the label of samples that keep theirs whatever the model says,
            -1 for all others. None trusts nobody.
        threshold: in [0, 1]; a sample counts where its largest weak probability exceeds it.

    Returns:
        Scalar; the sum over counted samples divided by ``N``.

    Raises:
        ValueError: shapes disagree, or ``threshold`` lies outside [0, 1].

    Example:
        >>> scores = torch.tensor([[9.0, 0.0], [0.1, 0.0]])
        >>> pseudo_label_consistency(scores, torch.zeros(2, 2)) == 0.5 * torch.tensor(2.0).log()
        tensor(True)
    """
    subject = "pseudo_label_consistency"
    check_unit(subject, "threshold", threshold)
    check_shape(subject, "logits_strong", logits_strong, tuple(logits_weak.shape))
    confidence, labels = logits_weak.detach().softmax(1).max(1)
    counted = confidence > threshold
    if trusted is not None:
        check_shape(subject, "trusted", trusted, (len(labels),))
        sure = trusted >= 0
        labels = torch.where(sure, trusted, labels)
        counted = counted | sure
    losses = F.cross_entropy(logits_strong, labels, reduction="none")
    return (losses * counted).mean()


def softmax_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the predicted distributions in nats; ``(N, K)`` scores to a scalar.

    Example:
        >>> softmax_entropy(torch.zeros(3, 4)) == torch.tensor(4.0).log()
        tensor(True)
    """
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()
