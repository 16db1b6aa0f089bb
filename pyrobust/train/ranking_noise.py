"""Ranking loss on randomly substituted documents: prepares a ranker for synonym smoothing.

Source: Wu et al., CIKM 2022, arXiv 2209.06691, section 4.4 (noise data augmentation).
Departures: none known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyrobust._checks import check_at_least
from pyrobust.certify.synonym_table import Document, SynonymTable

__all__ = ["noise_augmented_ranking_loss"]


def noise_augmented_ranking_loss(
    score_fn: Callable[[Any, list[list[str]]], Tensor],
    table: SynonymTable,
    query: Any,
    positives: Sequence[Document],
    negatives: Sequence[Document],
    *,
    margin: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean pairwise hinge ``max(0, margin - s+ + s-)`` over one random draw of each document.

    Args:
        score_fn: ``(query, documents) -> (N,)`` differentiable scores.
        table: the synonyms to draw from.
        query: handed to ``score_fn`` as it is.
        positives: ``N`` relevant documents.
        negatives: ``N`` documents to rank below them, pair by pair.
        margin: in score units, ``>= 0``.
        generator: source of the draws.

    Returns:
        Scalar loss.

    Raises:
        ValueError: the lists differ in length or are empty, or ``margin`` is negative.
    """
    check_at_least("noise_augmented_ranking_loss", "margin", margin, 0.0)
    if len(positives) != len(negatives) or len(positives) == 0:
        raise ValueError(
            "noise_augmented_ranking_loss: positives and negatives must be pairs; got "
            f"{len(positives)} and {len(negatives)}."
        )
    drawn = [table.sample(document, 1, generator)[0] for document in (*positives, *negatives)]
    good, bad = score_fn(query, drawn).chunk(2)
    return (margin - good + bad).clamp_min(0).mean()
