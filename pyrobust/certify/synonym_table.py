"""Synonym tables: which words an attacker may swap in, and which words a smoother draws from.

Two sets per word: ``S_w``, the words that may stand in place of ``w`` (symmetric, with ``w``), and
``P_w``, the set from which the smoother draws uniformly. The overlap of the draws of neighbours
bounds how far any average over draws can move when words are swapped.

Words are looked up in lower case without the punctuation around them; a draw of a known word keeps
the punctuation and is written in lower case, so changing the case of a known word gains nothing.

Source: Ye, Gong, Liu, "SAFER: A Structure-free Approach for Certified Robustness to Adversarial
Word Substitutions", ACL 2020; Wu et al., CIKM 2022, arXiv 2209.06691, section 4.
Departures: the overlap of two sets divides by the larger of them. The published code divides by
the size of the word's own set, which is wrong where the two differ (tests show the violation).
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrobust._checks import check_finite, check_float_tensor, check_integer, check_shape
from pyrobust.ops.substitution import substituted_tokens

__all__ = ["Document", "SynonymTable", "split_words"]

Document = str | Sequence[str]
"""A text, split at white space, or a sequence of words."""

_PADDING = frozenset({"", "[PAD]", "<pad>", "<PAD>", "<|pad|>"})
_BLOCK = 1024  # rows of one similarity block: 1024 x 65,536 floats are 256 MiB


def split_words(document: Document, *, subject: str = "split_words") -> list[str]:
    """The words of a document.

    Args:
        document: a text, split at white space, or a sequence of words.
        subject: who asks, for error messages.

    Raises:
        TypeError: a word is not a string.
        ValueError: a word is empty or a padding token; padding must not enter the bound.

    Example:
        >>> split_words("A good, short text.")
        ['A', 'good,', 'short', 'text.']
    """
    words = document.split() if isinstance(document, str) else list(document)
    for position, word in enumerate(words):
        if not isinstance(word, str):
            raise TypeError(f"{subject}: words must be strings; got {type(word).__name__}.")
        if word in _PADDING:
            raise ValueError(
                f"{subject}: documents must hold no padding; got {word!r} at position {position}."
            )
    return words


class SynonymTable:
    """Attack sets ``S_w`` and draw sets ``P_w`` over a vocabulary.

    Build one by :meth:`from_embeddings` or :meth:`from_dict`. Words outside it are never
    substituted and pass through draws unchanged.
    """

    def __init__(
        self,
        words: Sequence[str],
        neighbours: Sequence[Iterable[int]],
        draws: Sequence[Iterable[int]],
    ) -> None:
        """Args are indices into ``words``; the named constructors check and build them."""
        self.words = list(words)
        self._index = {word: i for i, word in enumerate(self.words)}
        self._neighbours = [sorted({i, *row}) for i, row in enumerate(neighbours)]
        self._draws = [np.array(sorted(set(row)), dtype=np.int64) for row in draws]
        sizes = np.array([0, *(len(row) for row in self._draws)], dtype=np.int64)
        self._offsets = torch.from_numpy(sizes.cumsum())
        members = np.concatenate([np.zeros(0, np.int64), *self._draws])
        self._candidates = torch.from_numpy(members)
        self._overlap = self._overlaps()

    @classmethod
    def from_dict(
        cls,
        neighbours: Mapping[str, Iterable[str]],
        perturbation_sets: Mapping[str, Iterable[str]] | None = None,
        *,
        max_set: int = 100,
        symmetrize: bool = False,
    ) -> SynonymTable:
        """A table from listed synonyms.

        Args:
            neighbours: for each word the words that may replace it; a word always replaces itself.
            perturbation_sets: for each word the set to draw from, non-empty; words left out draw
                themselves only. None builds the sets from the graph of ``neighbours``: the
                connected component, or its ``max_set`` members fewest steps away.
            max_set: largest draw set that is built, ``>= 1``.
            symmetrize: complete one-sided entries; by default they are refused.

        Raises:
            ValueError: one-sided neighbours, an empty draw set, a draw set of an unknown word, or
                a word that is not lower case or has punctuation around it.

        Example:
            >>> table = SynonymTable.from_dict({"big": ["large"], "large": ["big"]})
            >>> table.overlap("big"), table.document_bound("a big house")
            (1.0, 0.0)
        """
        subject = "SynonymTable.from_dict"
        check_integer(subject, "max_set", max_set, 1)
        given = {word: set(row) for word, row in neighbours.items()}
        sets = {word: list(row) for word, row in (perturbation_sets or {}).items()}
        words = sorted({*given, *(w for row in (*given.values(), *sets.values()) for w in row)})
        _check_words(subject, words)
        index = {word: i for i, word in enumerate(words)}
        graph: list[set[int]] = [set() for _ in words]
        for word, row in given.items():
            for other in row - {word}:
                if not symmetrize and word not in given.get(other, ()):
                    raise ValueError(
                        f"{subject}: neighbours must be symmetric; {other!r} may replace {word!r} "
                        "but not the other way round (symmetrize=True completes them)."
                    )
                graph[index[word]].add(index[other])
                graph[index[other]].add(index[word])
        if perturbation_sets is None:
            return cls(words, graph, [_nearest_by_steps(i, graph, max_set) for i in index.values()])
        for word, choices in sets.items():
            if not choices or word not in index:
                raise ValueError(
                    f"{subject}: perturbation_sets must be non-empty sets of known words; got "
                    f"{sorted(choices)} for {word!r}."
                )
        return cls(words, graph, [[index[w] for w in sets.get(word, [word])] for word in words])

    @classmethod
    def from_embeddings(
        cls,
        words: Sequence[str],
        vectors: Tensor,
        *,
        threshold: float = 0.9,
        max_set: int = 100,
        remove_top: int = 8,
        counts: Mapping[str, int] | None = None,
    ) -> SynonymTable:
        """A table from word vectors, counter-fitted ones by preference.

        The vectors are scaled to length one and centred, and their ``remove_top`` principal
        directions are removed ("all but the top"). Words whose dot product exceeds ``threshold``
        are neighbours. A draw set is the connected component of the word, or its ``max_set``
        members closest to the word where the component is larger.

        Args:
            words: ``V`` distinct words, lower case, no punctuation around them.
            vectors: ``(V, d)`` float, finite, no zero rows.
            threshold: similarity above which two words are neighbours.
            max_set: largest draw set, ``>= 1``.
            remove_top: principal directions to remove, ``0 <= remove_top < d``.
            counts: occurrences in the corpus; words seen fewer than twice get no neighbours.

        Raises:
            TypeError: ``vectors`` are not floating point.
            ValueError: shapes disagree, a row is zero or not finite, ``remove_top`` is out of
                range, or a word is repeated, not lower case or has punctuation around it.
        """
        subject = "SynonymTable.from_embeddings"
        check_integer(subject, "max_set", max_set, 1)
        check_integer(subject, "remove_top", remove_top, 0)
        check_float_tensor(subject, "vectors", vectors)
        check_shape(subject, "vectors", vectors, (len(words), None))
        check_finite(subject, "vectors", vectors)
        _check_words(subject, words)
        if remove_top >= vectors.shape[1]:
            raise ValueError(
                f"{subject}: remove_top must be below the {vectors.shape[1]} dimensions of the "
                f"vectors; got {remove_top}."
            )
        features = _all_but_the_top(subject, vectors, remove_top)
        active = [i for i, w in enumerate(words) if counts is None or counts.get(w, 0) > 1]
        graph = _similar_pairs(features, active, threshold)
        draws: list[list[int]] = []
        for i, component in enumerate(_components(graph)):
            if len(component) > max_set:
                near = (features[component] @ features[i]).double()
                near[component.index(i)] = torch.inf
                order = near.sort(descending=True, stable=True).indices[:max_set]
                component = [component[j] for j in order.tolist()]
            draws.append(component)
        return cls(words, graph, draws)

    def __len__(self) -> int:
        return len(self.words)

    def substitutes(self, word: str) -> list[str]:
        """What an attacker may write for ``word``: itself first, punctuation kept."""
        before, core, after = _split_punctuation(word)
        found = self._index.get(core)
        if found is None:
            return [word]
        others = [self.words[j] for j in self._neighbours[found] if j != found]
        return [word, *(before + other + after for other in others)]

    def overlap(self, word: str) -> float:
        """``q_w``: the least probability mass that the draws of ``word`` share with a neighbour's.

        The minimum over ``w'`` in ``S_w`` of ``|P_w & P_w'| / max(|P_w|, |P_w'|)``, in [0, 1];
        1 for unknown words.
        """
        found = self._index.get(_split_punctuation(word)[1])
        return 1.0 if found is None else float(self._overlap[found])

    def document_bound(self, tokens: Document, max_edits: int | None = None) -> float:
        """Upper bound of the total variation between the draws of a document and of any attack.

        Args:
            tokens: the whole document, with the words that a model may truncate.
            max_edits: words that the attacker may change; None allows all of them.

        Returns:
            ``1 - prod q_w`` over the ``max_edits`` smallest overlaps, in [0, 1], rounded up.
        """
        words = split_words(tokens, subject="SynonymTable.document_bound")
        overlaps = sorted(self.overlap(word) for word in words)
        if max_edits is not None:
            check_integer("SynonymTable.document_bound", "max_edits", max_edits, 0)
            overlaps = overlaps[:max_edits]
        kept = math.prod(overlaps)
        # Each factor and product is off by at most one rounding of 2**-53.
        return 0.0 if kept == 1.0 else min(1.0, 1.0 - kept + (len(overlaps) + 2) * 2.0**-52)

    def sample(
        self, tokens: Document, n: int, generator: torch.Generator | None = None
    ) -> list[list[str]]:
        """``n`` independent draws: each known word is replaced by a uniform member of its set.

        Args:
            tokens: the document.
            n: number of draws, ``>= 1``.
            generator: source of the draws (CPU); None uses torch's default generator.

        Returns:
            ``n`` documents as lists of words, each as long as ``tokens``.
        """
        check_integer("SynonymTable.sample", "n", n, 1)
        words = split_words(tokens, subject="SynonymTable.sample")
        seed = int(torch.randint(2**62, (), generator=generator).item())
        return self.render(words, self.draw(words, n, seed))

    def draw(self, words: Sequence[str], n: int, seed: int) -> NDArray[np.int64]:
        """``(n, len(words))`` vocabulary indices of ``n`` draws, -1 for unknown words.

        Each is a pure function of ``seed``, its row and its column, uniform to within 2**-64
        (:func:`pyrobust.ops.substituted_tokens`).
        """
        found = [self._index.get(_split_punctuation(word)[1], -1) for word in words]
        tokens = torch.tensor(found, dtype=torch.int64)[None]
        with torch.no_grad():
            drawn = substituted_tokens(tokens, self._offsets, self._candidates, n, seed=seed)
        result: NDArray[np.int64] = drawn[0].numpy()
        return result

    def render(self, words: Sequence[str], drawn: NDArray[np.int64]) -> list[list[str]]:
        """The documents that rows of :meth:`draw` stand for."""
        parts = [_split_punctuation(word) for word in words]
        return [
            [
                word if i < 0 else before + self.words[i] + after
                for word, (before, _, after), i in zip(words, parts, row, strict=True)
            ]
            for row in drawn.tolist()
        ]

    def _overlaps(self) -> NDArray[np.float64]:
        sets = [frozenset(row.tolist()) for row in self._draws]
        result = np.ones(len(sets))
        for i, row in enumerate(self._neighbours):
            for j in row:
                if sets[i] is not sets[j]:
                    shared = len(sets[i] & sets[j]) / max(len(sets[i]), len(sets[j]))
                    result[i] = min(result[i], shared)
        return result


def _split_punctuation(word: str) -> tuple[str, str, str]:
    """Punctuation before, the word in lower case, punctuation after."""
    head = word.lstrip(string.punctuation)
    core = head.rstrip(string.punctuation)
    return word[: len(word) - len(head)], core.lower(), head[len(core) :]


def _check_words(subject: str, words: Sequence[str]) -> None:
    if len(set(words)) != len(words):
        raise ValueError(f"{subject}: words must be distinct; got {len(words)} with repetitions.")
    for word in words:
        if not word or word.split() != [word] or _split_punctuation(word)[1] != word:
            raise ValueError(
                f"{subject}: words must be single, in lower case and without punctuation around "
                f"them; got {word!r}."
            )


def _all_but_the_top(subject: str, vectors: Tensor, remove_top: int) -> Tensor:
    features: Tensor = vectors.detach().cpu().float()
    lengths: Tensor = features.norm(dim=1, keepdim=True)
    if not bool((lengths > 0).all()):
        raise ValueError(f"{subject}: vectors must have no zero rows.")
    features = features / lengths
    features = features - features.mean(0)
    if remove_top > 0:
        directions: Tensor = torch.linalg.eigh(features.double().T @ features.double())[1]
        top = directions[:, -remove_top:].float()
        features = features - (features @ top) @ top.T
    return features


def _similar_pairs(features: Tensor, active: list[int], threshold: float) -> list[set[int]]:
    """Neighbours by similarity; each pair is computed once, so the relation is symmetric."""
    graph: list[set[int]] = [set() for _ in range(len(features))]
    chosen = features[active]
    for start in range(0, len(active), _BLOCK):
        close = chosen[start : start + _BLOCK] @ chosen[start:].T > threshold
        for a, b in close.triu(1).nonzero().tolist():
            i, j = active[start + a], active[start + b]
            graph[i].add(j)
            graph[j].add(i)
    return graph


def _components(graph: Sequence[set[int]]) -> list[list[int]]:
    """For each node the sorted members of its connected component."""
    found: list[list[int]] = [[] for _ in graph]
    for root in range(len(graph)):
        if not found[root]:
            component = sorted(_nearest_by_steps(root, graph, len(graph)))
            for i in component:
                found[i] = component
    return found


def _nearest_by_steps(root: int, graph: Sequence[set[int]], limit: int) -> list[int]:
    """Up to ``limit`` nodes in order of their distance from ``root``, ties by index."""
    order, seen, position = [root], {root}, 0
    while position < len(order) < limit:
        fresh = sorted(graph[order[position]] - seen)
        seen.update(fresh)
        order.extend(fresh)
        position += 1
    return order[:limit]
