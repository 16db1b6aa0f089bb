"""Models of sentence-transformers as scorers of a :class:`~pyrobust.certify.SmoothedRanker`.

Both adapters call the model's public method and import nothing, so that any object with the same
method will do. Words are joined by one space. A word past the model's limit of tokens is cut off by
the model and still counts in :meth:`~pyrobust.certify.SynonymTable.document_bound`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pyrobust._checks import check_integer
from pyrobust.certify.certdr import BiEncoder, Score

__all__ = ["sentence_bi_encoder", "sentence_cross_encoder"]


class SentenceModel(Protocol):
    """What is used of ``sentence_transformers.SentenceTransformer``."""

    def encode(self, sentences: list[str], **options: Any) -> Any:
        """``(N, d)`` vectors of ``N`` texts."""


class PairModel(Protocol):
    """What is used of ``sentence_transformers.CrossEncoder``."""

    def predict(self, inputs: list[tuple[str, str]], **options: Any) -> Any:
        """``(N,)`` scores of ``N`` pairs of a query and a document."""


def sentence_bi_encoder(model: SentenceModel, *, batch_size: int = 1) -> BiEncoder:
    """Cosine of query and document by a ``SentenceTransformer``.

    The vectors of a document's draws do not depend on the query, so a ranker computes them once.

    Args:
        model: has ``encode``; in evaluation mode, as sentence-transformers loads it.
        batch_size: texts per forward pass, ``>= 1``. With 1 a text's vector has the same bits in
            any company, so scores and logs are reproducible to the bit; larger batches are faster
            and round differently, by the padding and by the texts beside it.

    Returns:
        The scorer; its queries are strings (or lists of words), its scores lie in [-1, 1].

    Raises:
        TypeError: ``model`` has no ``encode``.
        ValueError: ``batch_size`` is below 1.
    """
    subject = "sentence_bi_encoder"
    _check_method(subject, model, "encode")
    check_integer(subject, "batch_size", batch_size, 1)

    def encode(documents: list[list[str]]) -> Tensor:
        texts = [" ".join(words) for words in documents]
        vectors = model.encode(
            texts, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        return F.normalize(torch.as_tensor(vectors).detach().float(), dim=1)

    def compare(query: str | Sequence[str], vectors: Tensor) -> Tensor:
        # a sum per row, not a product with a matrix: its order does not depend on the rows
        return (vectors * encode([_words(query)])).sum(1)

    return BiEncoder(encode, compare)


def sentence_cross_encoder(model: PairModel, *, batch_size: int = 1) -> Score:
    """Scores by a ``CrossEncoder``, which reads query and document together.

    Args:
        model: has ``predict``.
        batch_size: pairs per forward pass, ``>= 1``; as in :func:`sentence_bi_encoder`.

    Returns:
        ``(query, documents) -> (N,)`` scores, for :class:`~pyrobust.certify.SmoothedRanker`.

    Raises:
        TypeError: ``model`` has no ``predict``.
        ValueError: ``batch_size`` is below 1.
    """
    subject = "sentence_cross_encoder"
    _check_method(subject, model, "predict")
    check_integer(subject, "batch_size", batch_size, 1)

    def score(query: str | Sequence[str], documents: list[list[str]]) -> Tensor:
        text = " ".join(_words(query))
        pairs = [(text, " ".join(words)) for words in documents]
        found = model.predict(
            pairs, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        return torch.as_tensor(found).detach().float()

    return score


def _words(query: str | Sequence[str]) -> list[str]:
    return query.split() if isinstance(query, str) else list(query)


def _check_method(subject: str, model: object, name: str) -> None:
    if not callable(getattr(model, name, None)):
        raise TypeError(
            f"{subject}: model must have a method {name}, as in sentence-transformers; got "
            f"{type(model).__name__}."
        )
