"""The certification job of CertDR: the top K of each query of a text collection."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyrobust._checks import check_choice, check_integer, check_open_unit
from pyrobust.certify.certdr import BiEncoder, SmoothedRanker
from pyrobust.certify.job_data import QueryData
from pyrobust.certify.log import LogRow
from pyrobust.certify.synonym_table import SynonymTable
from pyrobust.data.text_collection import TextCollection

__all__ = ["RankingJob", "load_synonyms"]


@dataclass(frozen=True)
class PreparedRanking:
    """A calibrated ranker with the texts that it ranks."""

    ranker: SmoothedRanker
    score: Any
    texts: TextCollection


@dataclass(frozen=True)
class RankingJob:
    """Certified top K by random synonym swaps (:class:`~pyrobust.certify.SmoothedRanker`).

    The network scores: it has the methods ``encode_documents`` and ``compare`` of
    :class:`~pyrobust.certify.BiEncoder`, or is called as ``(query, documents)``.

    Attributes:
        synonyms: file of the table, see :func:`load_synonyms`.
        top: ranks to protect, ``>= 1``.
        max_edits: words that the attacker may change per document; None for all.
        candidates: rank only that many documents of highest plain score, which the claim then
            takes as given; None ranks all.
        held_out: queries at the end that calibrate the scores and are not certified, ``>= 0``.
        squash: ``"calibrated"``, ``"sigmoid"`` or ``"identity"``.
        samples: draws per document, ``>= 100``.
        alpha: probability of a false claim per query, in (0, 1).
        seed: of the draws, ``>= 0``.
        batch_size: documents per call of the network, ``>= 1``.
    """

    synonyms: str = ""
    top: int = 10
    max_edits: int | None = None
    candidates: int | None = None
    held_out: int = 10
    squash: str = "calibrated"
    samples: int = 1000
    alpha: float = 1e-3
    seed: int = 0
    batch_size: int = 512
    norm: ClassVar[str] = "words"
    block: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]] = ("certified", "margin", "top")
    files: ClassVar[tuple[str, ...]] = ("synonyms",)

    def __post_init__(self) -> None:
        if not Path(self.synonyms).is_file():
            raise ValueError(f"certify: synonyms must be an existing file; got {self.synonyms!r}.")
        for name, least in [("top", 1), ("samples", 100), ("batch_size", 1), ("seed", 0)]:
            check_integer("certify", name, getattr(self, name), least)
        if self.max_edits is not None:
            check_integer("certify", "max_edits", self.max_edits, 0)
        if self.candidates is not None:
            check_integer("certify", "candidates", self.candidates, self.top + 1)
        check_choice("certify", "squash", self.squash, ("calibrated", "sigmoid", "identity"))
        check_integer("certify", "held_out", self.held_out, int(self.squash == "calibrated"))
        check_open_unit("certify", "alpha", self.alpha)

    def prepare(self, model: Any, data: QueryData) -> PreparedRanking:
        """The ranker, calibrated on the last queries."""
        texts, score = data.texts, model
        if hasattr(model, "encode_documents"):
            score = BiEncoder(model.encode_documents, model.compare)
        ranker = SmoothedRanker(
            score,
            load_synonyms(self.synonyms),
            n=self.samples,
            squash=self.squash,
            seed=self.seed,
            batch_size=self.batch_size,
        )
        ready = PreparedRanking(ranker, score, texts)
        if self.squash == "calibrated":
            queries = texts.queries[len(texts.queries) - self.held_out :]
            groups = [
                [texts.documents[i] for i in self._candidates(ready, query)] for query in queries
            ]
            with torch.no_grad():
                ranker.calibrate(queries, groups, self.top)
        return ready

    def rows(
        self, model: PreparedRanking, images: range, labels: Tensor, first: int, num_classes: int
    ) -> Iterator[LogRow]:
        """One row per query.

        ``predict`` is the first relevant document of the top, else its first document, and -1
        where sampling does not settle the top; ``label`` is the same relevant document, else one
        that the top misses (-2 where none is known). So ``correct`` says that the top holds one.
        ``radius`` is the largest number of words per document that may be changed below the top;
        ``top`` holds the positions of the documents.
        """
        texts, ranker = model.texts, model.ranker
        for query in images:
            chosen = self._candidates(model, texts.queries[query])
            documents = [texts.documents[i] for i in chosen]
            with torch.no_grad():
                result = ranker.certify_top_k(
                    texts.queries[query],
                    documents,
                    self.top,
                    alpha=self.alpha,
                    max_edits=self.max_edits,
                )
            edits = ranker.certified_edits(result, documents)
            best = [chosen[i] for i in result.order[: self.top].tolist()]
            wanted = texts.relevant[query]
            hits = [i for i in best if i in wanted]
            yield LogRow(
                idx=query,
                label=hits[0] if hits else min(wanted, default=-2),
                predict=-1 if edits < 0 else (hits or best)[0],
                radius=float(max(edits, 0)),
                time=self.samples * len(documents),
                extra=(
                    str(int(result.certified)),
                    repr(result.margin),
                    ",".join(map(str, best)),
                ),
            )

    def _candidates(self, model: PreparedRanking, query: str) -> list[int]:
        """Positions of the documents to rank."""
        documents = model.texts.documents
        if self.candidates is None or self.candidates >= len(documents):
            return list(range(len(documents)))
        words, step = [text.split() for text in documents], self.batch_size
        with torch.no_grad():
            parts = [
                model.score(query, words[start : start + step])
                for start in range(0, len(words), step)
            ]
        order = torch.cat(parts).sort(descending=True, stable=True).indices
        return sorted(order[: self.candidates].tolist())


def load_synonyms(path: str | Path) -> SynonymTable:
    """A synonym table from a file.

    Args:
        path: ``*.json`` with ``neighbours`` and, if wanted, ``perturbation_sets``, as
            :meth:`SynonymTable.from_dict` takes them; or text, each line a group of words that may
            stand for one another, no word in two groups.

    Raises:
        ValueError: the file is neither, or the table is refused.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"certify: synonyms must be JSON; {path} is not ({error}).") from error
        if not isinstance(found, Mapping) or "neighbours" not in found:
            raise ValueError(f"certify: synonyms must hold neighbours; {path} does not.")
        return SynonymTable.from_dict(found["neighbours"], found.get("perturbation_sets"))
    groups = [line.split() for line in text.splitlines() if line.strip()]
    table = {word: [w for w in group if w != word] for group in groups for word in group}
    if len(table) != sum(map(len, groups)):
        raise ValueError(f"certify: synonyms must hold each word in one line; {path} repeats some.")
    return SynonymTable.from_dict(table)
