"""Greedy word substitution: the plain attack on rankers that swaps words for synonyms.

Positions are tried in order of importance; at each the synonym that raises the score most is
kept. An attack, not a bound: where it fails nothing is proven.

Source: the greedy baseline of Wu et al., "PRADA: Practical Black-box Adversarial Attacks against
Neural Ranking Models", TOIS 2022, arXiv 2204.01321, as used in arXiv 2209.06691, section 6.
Departures: importance is measured by leaving a word out, so that no gradient is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrobust._checks import check_integer
from pyrobust.certify.synonym_table import Document, SynonymTable, split_words

__all__ = ["SubstitutionResult", "word_substitution_attack"]


@dataclass(frozen=True)
class SubstitutionResult:
    """The best document that the attack found.

    Attributes:
        document: its words.
        score: its score.
        clean_score: the score before the attack; never above ``score``.
        edits: number of words that differ.
        evaluations: documents that were scored.
    """

    document: list[str]
    score: float
    clean_score: float
    edits: int
    evaluations: int


@torch.no_grad()
def word_substitution_attack(
    score_fn: Callable[[Any, list[list[str]]], Tensor],
    table: SynonymTable,
    query: Any,
    document: Document,
    *,
    max_edits: int | None = None,
) -> SubstitutionResult:
    """Raise a document's score for a query by synonym swaps.

    Args:
        score_fn: ``(query, documents) -> (N,)`` scores; for a smoothed ranker its ``scores``.
        table: the allowed swaps.
        query: handed to ``score_fn`` as it is.
        document: the document to promote.
        max_edits: words that may change, ``>= 0``; None for all.

    Raises:
        ValueError: ``max_edits`` is negative or the document holds padding.
    """
    subject = "word_substitution_attack"
    words = split_words(document, subject=subject)
    budget = len(words) if max_edits is None else max_edits
    check_integer(subject, "max_edits", budget, 0)
    options = {j: table.substitutes(word)[1:] for j, word in enumerate(words)}
    places = [j for j, swaps in options.items() if swaps]
    # One word out at a time; a document of a single word has nothing to leave out.
    reduced = [words[:j] + words[j + 1 :] for j in places] if len(words) > 1 else []
    values = [float(v) for v in score_fn(query, [words, *reduced])]
    clean, evaluations = values[0], len(values)
    if reduced:
        change = {j: abs(clean - v) for j, v in zip(places, values[1:], strict=True)}
        places.sort(key=lambda j: -change[j])
    best, edits = clean, 0
    for j in places:
        if edits == budget:
            break
        trials = [[*words[:j], swap, *words[j + 1 :]] for swap in options[j]]
        found = score_fn(query, trials)
        evaluations += len(trials)
        if float(found.max()) > best:
            best, edits = float(found.max()), edits + 1
            words = trials[int(found.argmax())]
    return SubstitutionResult(words, best, clean, edits, evaluations)
