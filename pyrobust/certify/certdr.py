"""CertDR: a proof that no synonym swap pushes a document from below rank K into the top K.

A document's score is the mean relevance over random synonym swaps. Two documents that differ by
allowed swaps have nearly the same swaps, so their scores differ by at most the total variation
between them; a score gap at rank K larger than that certifies the top K. For search and retrieval
whose relevance model is a black box; the price is ``n`` forward passes per document.

Source: Wu, Zhang, Guo, Chen, Fan, de Rijke, Cheng, "Certified Robustness to Word Substitution
Ranking Attack for Neural Ranking Models", CIKM 2022, arXiv 2209.06691, sections 4 and 5.
Departures: the overlap of unequal synonym sets is corrected (:class:`SynonymTable`); sampling
error is united over all documents and each document meets its own bound (the published test, kept
as ``criterion="paper"``, does neither and is marked unsound); the squash is calibrated on held-out
queries, since a plain sigmoid saturates for rankers with an arbitrary offset.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrobust._checks import check_choice, check_integer, check_open_unit
from pyrobust.certify.statistics import hoeffding_lower, hoeffding_upper, union_bound
from pyrobust.certify.synonym_table import Document, SynonymTable, split_words

__all__ = [
    "BiEncoder",
    "RankingCertificate",
    "SmoothedRanker",
    "certified_robust_query",
]

Score = Callable[[Any, list[list[str]]], Tensor]


@dataclass(frozen=True)
class BiEncoder:
    """A score in two halves, so that a document's draws are encoded once for all queries.

    Attributes:
        encode_documents: list of ``N`` documents (lists of words) to an ``(N, d)`` tensor.
        compare: a query and ``(N, d)`` encoded documents to ``(N,)`` scores.
    """

    encode_documents: Callable[[list[list[str]]], Tensor]
    compare: Callable[[Any, Tensor], Tensor]

    def __call__(self, query: Any, documents: list[list[str]]) -> Tensor:
        """``(N,)`` scores of ``N`` documents."""
        return self.compare(query, self.encode_documents(documents))


@dataclass(frozen=True)
class RankingCertificate:
    """Whether the top K of one query is proven against synonym swaps below it.

    Attributes:
        certified: no allowed attack on documents below rank ``k``, on any number of them at once,
            puts one of them into the top ``k`` of the exactly smoothed ranker.
        order: ``(m,)`` int64 documents by falling score.
        scores: ``(m,)`` float64 sampled scores in [0, 1], in the order of the documents.
        total_variation: ``(m,)`` float64 bound on how far an attack moves each score.
        margin: smallest gap that is left, in score units; positive where certified.
        k: the protected ranks.
        alpha: probability over the draws that a claim is false, in (0, 1).
        max_edits: words that the attacker may change per document; None for all.
        criterion: ``"per_document"`` or ``"paper"``.
        sound: False for the published criterion, whose error is not bounded by ``alpha``.
        assumption: what the statement takes for granted, in one sentence.
    """

    certified: bool
    order: Tensor
    scores: Tensor
    total_variation: Tensor
    margin: float
    k: int
    alpha: float
    max_edits: int | None
    criterion: str
    sound: bool
    assumption: str

    def summary(self) -> str:
        """One line for people."""
        word = "certified" if self.certified else "not certified"
        budget = "all words" if self.max_edits is None else f"{self.max_edits} words"
        trust = "" if self.sound else "; unsound criterion, no guarantee"
        return (
            f"top {self.k} of {len(self.order)} {word} against swaps of {budget}, margin "
            f"{self.margin:.4g} (alpha = {self.alpha:g}; {self.assumption}{trust})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: v.tolist() if isinstance(v, Tensor) else v for name, v in values}


def certified_robust_query(results: Iterable[RankingCertificate]) -> float:
    """CRQ: the share of queries whose top K is certified, in [0, 1].

    Raises:
        ValueError: there are no results.
    """
    decisions = [result.certified for result in results]
    if not decisions:
        raise ValueError("certified_robust_query: results must not be empty; got none.")
    return sum(decisions) / len(decisions)


class SmoothedRanker:
    """Scores documents by their mean relevance over random synonym swaps, and certifies ranks.

    Scores are a function of the document and ``seed`` alone: they do not depend on the batch
    size, on the other documents or on the order of calls (as far as the model does not).

    Args:
        score_fn: ``(query, documents) -> (N,)`` scores, documents as lists of words; a
            :class:`BiEncoder` encodes each document's draws only once.
        table: the synonyms of attacker and smoother.
        n: draws per document, ``>= 1``; below 100 a warning says how wide the error is.
        squash: fixed rising map of raw scores into [0, 1]: ``"calibrated"`` (call
            :meth:`calibrate` on held-out queries first), ``"sigmoid"``, ``"identity"``, or a
            callable on tensors.
        seed: key of the draws.
        batch_size: documents per call of ``score_fn``, filled across documents.
    """

    def __init__(
        self,
        score_fn: Score,
        table: SynonymTable,
        *,
        n: int = 1000,
        squash: str | Callable[[Tensor], Tensor] = "calibrated",
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        subject = type(self).__name__
        check_integer(subject, "n", n, 1)
        check_integer(subject, "seed", seed, 0)
        check_integer(subject, "batch_size", batch_size, 1)
        if isinstance(squash, str):
            check_choice(subject, "squash", squash, ("calibrated", "sigmoid", "identity"))
        if n < 100:
            error = math.sqrt(math.log(2 * 100 / 0.05) / (2 * n))
            warnings.warn(
                f"{subject}: n should be at least 100; with n = {n} the sampling error alone is "
                f"{error:.2f} for 100 documents at alpha = 0.05.",
                stacklevel=2,
            )
        self.score_fn, self.table, self.n = score_fn, table, n
        self.squash, self.seed, self.batch_size = squash, seed, batch_size
        self.centre: float | None = None
        self.temperature: float | None = None
        # by seed and number of draws, which may be changed, and document
        self._encoded: dict[tuple[int, int, tuple[str, ...]], tuple[Tensor, Tensor]] = {}

    def calibrate(
        self, queries: Sequence[Any], documents: Sequence[Sequence[Document]], k: int
    ) -> SmoothedRanker:
        """Fix ``squash(s) = sigmoid((s - c) / T)`` on held-out queries.

        ``c`` is the median middle between the smoothed raw scores at ranks ``k`` and ``k + 1``,
        ``T`` a quarter of the median gap there. Any fixed rising map keeps the guarantee; the
        queries must not be those to certify, or the map would move with an attack.

        Args:
            queries: held-out queries.
            documents: for each of them the documents to rank, more than ``k``.
            k: the rank to calibrate for.

        Returns:
            The ranker itself.
        """
        subject = "SmoothedRanker.calibrate"
        if len(queries) == 0 or len(queries) != len(documents):
            raise ValueError(
                f"{subject}: queries and documents must be as many and not empty; got "
                f"{len(queries)} and {len(documents)}."
            )
        middles, gaps = [], []
        for query, group in zip(queries, documents, strict=True):
            _check_k(subject, k, len(group))
            ranked = self._means(query, group, lambda s: s).sort(descending=True).values
            middles.append(float(ranked[k - 1] + ranked[k]) / 2)
            gaps.append(float(ranked[k - 1] - ranked[k]))
        if not float(np.median(gaps)) > 0:
            raise ValueError(
                f"{subject}: the scores at ranks {k} and {k + 1} must differ for most queries; "
                "the median gap is 0."
            )
        self.centre, self.temperature = float(np.median(middles)), 0.25 * float(np.median(gaps))
        return self

    def scores(self, query: Any, docs: Sequence[Document]) -> Tensor:
        """Smoothed scores of documents.

        Args:
            query: handed to ``score_fn`` as it is.
            docs: ``m`` documents.

        Returns:
            ``(m,)`` float64 in [0, 1].

        Raises:
            ValueError: the squash leaves [0, 1], scores are not finite or of another shape, or a
                document holds padding.
            RuntimeError: ``squash="calibrated"`` without :meth:`calibrate`.
        """
        return self._means(query, docs, self._squash)

    def certify_top_k(
        self,
        query: Any,
        docs: Sequence[Document],
        k: int,
        *,
        alpha: float = 0.05,
        max_edits: int | None = None,
        criterion: str = "per_document",
    ) -> RankingCertificate:
        """Try to prove that no swap attack on lower documents changes the top ``k``.

        With probability at least ``1 - alpha`` over the draws a certificate is true.

        Args:
            query: handed to ``score_fn`` as it is.
            docs: all documents that are ranked, more than ``k``.
            k: ranks to protect, ``>= 1``.
            alpha: probability of a false claim, in the open interval (0, 1); spread over the
                upper and lower bounds of all documents.
            max_edits: words that the attacker may change in each document; None for all.
            criterion: ``"per_document"``, or ``"paper"`` for the published test, which ignores
                that many documents are sampled and is not sound.

        Raises:
            ValueError: ``k`` is not below the number of documents, or an argument is out of range.
        """
        subject = "SmoothedRanker.certify_top_k"
        _check_k(subject, k, len(docs))
        check_open_unit(subject, "alpha", alpha)
        check_choice(subject, "criterion", criterion, ("per_document", "paper"))
        moved = [self.table.document_bound(document, max_edits) for document in docs]
        variation = torch.tensor(moved, dtype=torch.float64)
        scores = self.scores(query, docs)
        order = scores.sort(descending=True, stable=True).indices
        margin = self._margin(scores, order, variation, k, alpha, criterion)
        assumption = (
            "the attacker swaps words within the table's synonym sets in documents below the top; "
            "the claim is about the exactly smoothed ranker"
        )
        return RankingCertificate(
            certified=margin > 0,
            order=order,
            scores=scores,
            total_variation=variation,
            margin=margin,
            k=k,
            alpha=alpha,
            max_edits=max_edits,
            criterion=criterion,
            sound=criterion == "per_document",
            assumption=assumption,
        )

    def certified_edits(self, result: RankingCertificate, docs: Sequence[Document]) -> int:
        """The most words per document that an attacker may change below a certified top.

        The bounds of all scores hold at once, so trying every number costs no confidence.

        Args:
            result: of :meth:`certify_top_k`.
            docs: the same documents.

        Returns:
            The number, at most the length of the longest lower document; -1 where sampling does not
            even settle the unattacked top.
        """
        subject = "SmoothedRanker.certified_edits"
        words = [split_words(document, subject=subject) for document in docs]

        def holds(edits: int) -> bool:
            moved = [self.table.document_bound(document, edits) for document in words]
            variation = torch.tensor(moved, dtype=torch.float64)
            order, k, alpha = result.order, result.k, result.alpha
            return self._margin(result.scores, order, variation, k, alpha, result.criterion) > 0

        longest = max(len(words[i]) for i in result.order[result.k :].tolist())
        return bisect.bisect_left(range(longest + 1), True, key=lambda e: not holds(e)) - 1

    def _margin(
        self,
        scores: Tensor,
        order: Tensor,
        variation: Tensor,
        k: int,
        alpha: float,
        criterion: str,
    ) -> float:
        """What is left of the gap at rank ``k`` after sampling errors and attacks."""
        top, rest = order[:k], order[k:]
        if criterion == "paper":
            error = 2 * math.sqrt(math.log(2 / alpha) / (2 * self.n))
            gap = float(scores[top[-1]] - scores[rest[0]])
            return gap - float(variation[rest].max()) - error
        level = union_bound(alpha, 2 * len(order))
        floor = hoeffding_lower(scores[top], self.n, level).min()
        reach = hoeffding_upper(scores[rest], self.n, level) + variation[rest]
        return math.nextafter(float(floor - reach.max()), -math.inf)

    def _squash(self, raw: Tensor) -> Tensor:
        if callable(self.squash):
            return self.squash(raw)
        if self.squash == "identity":
            return raw
        if self.squash == "sigmoid":
            return raw.sigmoid()
        if self.centre is None or self.temperature is None:
            raise RuntimeError(
                'SmoothedRanker: squash="calibrated" needs calibrate(queries, documents, k) first.'
            )
        return ((raw - self.centre) / self.temperature).sigmoid()

    def _means(
        self, query: Any, docs: Sequence[Document], squash: Callable[[Tensor], Tensor]
    ) -> Tensor:
        raw, owners, weights = self._raw_scores(query, docs)
        values = squash(raw)
        if squash == self._squash and not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(
                "SmoothedRanker: squash must map scores into [0, 1]; got values from "
                f"{float(values.min()):g} to {float(values.max()):g}."
            )
        totals = torch.zeros(len(docs), dtype=torch.float64)
        return totals.index_add_(0, owners, values.double() * weights) / self.n

    def _raw_scores(self, query: Any, docs: Sequence[Document]) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of all distinct draws, the document each belongs to, how often it was drawn."""
        words = [split_words(document, subject="SmoothedRanker") for document in docs]
        if isinstance(self.score_fn, BiEncoder):
            pairs = [self._encode(document) for document in words]
            counts = [count for _, count in pairs]
            encoded = torch.cat([vectors for vectors, _ in pairs])
            raw = self._checked(self.score_fn.compare(query, encoded), len(encoded))
        else:
            drawn = [self._distinct_draws(document) for document in words]
            counts = [count for _, count in drawn]
            flat = [draw for draws, _ in drawn for draw in draws]
            parts = []
            for start in range(0, len(flat), self.batch_size):
                batch = flat[start : start + self.batch_size]
                parts.append(self._checked(self.score_fn(query, batch), len(batch)))
            raw = torch.cat(parts)
        sizes = torch.tensor([len(count) for count in counts])
        return raw, torch.arange(len(docs)).repeat_interleave(sizes), torch.cat(counts)

    def _distinct_draws(self, words: list[str]) -> tuple[list[list[str]], Tensor]:
        key = hashlib.blake2b("\n".join([str(self.seed), *words]).encode(), digest_size=7)
        drawn = self.table.draw(words, self.n, int.from_bytes(key.digest(), "little"))
        rows, counts = np.unique(drawn, axis=0, return_counts=True)
        return self.table.render(words, rows), torch.from_numpy(counts)

    def _encode(self, words: list[str]) -> tuple[Tensor, Tensor]:
        assert isinstance(self.score_fn, BiEncoder)
        key = (self.seed, self.n, tuple(words))
        if key not in self._encoded:
            draws, counts = self._distinct_draws(words)
            with torch.no_grad():
                starts = range(0, len(draws), self.batch_size)
                parts = [
                    self.score_fn.encode_documents(draws[i : i + self.batch_size]) for i in starts
                ]
            self._encoded[key] = (torch.cat(parts), counts)
        return self._encoded[key]

    @staticmethod
    def _checked(raw: Tensor, count: int) -> Tensor:
        if raw.shape != (count,) or not bool(torch.isfinite(raw).all()):
            raise ValueError(
                f"SmoothedRanker: score_fn must return {count} finite scores, shape ({count},); "
                f"got shape {tuple(raw.shape)}."
            )
        return raw.detach().cpu().double()


def _check_k(subject: str, k: int, count: int) -> None:
    check_integer(subject, "k", k, 1)
    if k >= count:
        raise ValueError(f"{subject}: k must be below the {count} documents; got {k}.")
