"""Margin losses on the logits of each modality.

Source: Z. Yang, Y. Wei, C. Liang, D. Hu, "Quantifying and Enhancing Multi-modal Robustness with
Modality Preference", ICLR 2024, arXiv 2402.06244, section 4.2.
Departures: computed by log-sum-exp, which cannot overflow; with mixup the positive logit is mixed
inside the exponential (the published code subtracts raw logits there).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust._checks import check_at_least, check_unit
from pyrobust.nn.orthogonal_fusion import FusionOutput

__all__ = ["MultimodalMarginLoss", "mixup_margin", "multimodal_margin"]

_LOG_FLOOR = math.log(1e-5)


def multimodal_margin(modality_logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Smooth maximum, over modalities and wrong classes, of minus the margin.

    ``mean log(1e-5 + sum_m sum_{k != y} exp(h_m[k] - h_m[y]))``, equation (9).

    Args:
        modality_logits: ``(B, K)`` float of each modality.
        labels: ``(B,)`` int64 in ``[0, K)``.

    Returns:
        Scalar, nats; finite for logits of any size.

    Raises:
        ValueError: no modality, or sizes that disagree.

    Example:
        >>> float(multimodal_margin([torch.zeros(1, 2)], torch.tensor([0]))) < 1e-4
        True
    """
    return mixup_margin(modality_logits, labels, labels, 1.0)


def mixup_margin(
    modality_logits: Sequence[Tensor], first: Tensor, second: Tensor, share: float
) -> Tensor:
    """:func:`multimodal_margin` for inputs mixed from two samples.

    Both labels leave the sum; ``share h[first] + (1 - share) h[second]`` is the positive logit.

    Args:
        modality_logits: ``(B, K)`` float of each modality.
        first: ``(B,)`` int64 labels of the samples taken with ``share``.
        second: ``(B,)`` int64 labels of the others.
        share: mixing weight in [0, 1].

    Returns:
        Scalar, nats.

    Raises:
        ValueError: no modality, sizes that disagree, or ``share`` outside [0, 1].
    """
    check_unit("mixup_margin", "share", share)
    if not modality_logits:
        raise ValueError("mixup_margin: modality_logits must hold at least one modality.")
    terms = []
    for logits in modality_logits:
        if logits.ndim != 2 or first.shape != second.shape or first.shape != logits.shape[:1]:
            raise ValueError(
                f"mixup_margin: logits {tuple(logits.shape)} and labels {tuple(first.shape)}, "
                f"{tuple(second.shape)} must be (B, K), (B,) and (B,)."
            )
        a, b = logits.gather(1, first[:, None]), logits.gather(1, second[:, None])
        gap = logits - (share * a + (1 - share) * b)
        labels = torch.stack([first, second], dim=1)
        terms.append(gap.scatter(1, labels, -torch.inf))
    floor = torch.full((len(first), 1), _LOG_FLOOR).to(terms[0])
    return torch.logsumexp(torch.cat([*terms, floor], dim=1), dim=1).mean()


class MultimodalMarginLoss(nn.Module):
    """Cross-entropy of the fused logits plus ``rho`` times :func:`multimodal_margin`.

    Args:
        rho: weight of the margin term, ``>= 0``; the paper takes 2.

    Raises:
        ValueError: ``rho`` is negative.
    """

    def __init__(self, rho: float = 2.0) -> None:
        super().__init__()
        check_at_least("MultimodalMarginLoss", "rho", rho, 0.0)
        self.rho = rho

    def forward(self, output: FusionOutput, labels: Tensor) -> Tensor:
        """Scalar loss of a :class:`~pyrobust.nn.FusionOutput` at ``(B,)`` int64 labels."""
        margin = multimodal_margin(output.modality_logits, labels)
        return F.cross_entropy(output.logits, labels) + self.rho * margin

    def extra_repr(self) -> str:
        """The weight."""
        return f"rho={self.rho}"
