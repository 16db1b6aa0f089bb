"""TextCollection: queries, documents and which document answers which query.

The files are in SMART's form, that of the Cranfield collection: entries begin with ``.I ID``, their
text with ``.W``; a line of judgements holds query, document and degree. The number of a query is
its place in its file, as Cranfield's judgements count, not its ``.I``.
"""

from __future__ import annotations

import gzip
import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["TextCollection", "load_texts"]

_SUBJECT = "load_texts"


@dataclass(frozen=True)
class TextCollection:
    """Texts to rank.

    Attributes:
        name: short name for reports.
        queries: their texts.
        documents: their texts, none empty.
        relevant: for each query the positions of its documents; empty where nothing is known.
    """

    name: str
    queries: tuple[str, ...]
    documents: tuple[str, ...]
    relevant: tuple[frozenset[int], ...]


def load_texts(source: str) -> TextCollection:
    """The text collection that ``source`` names.

    Args:
        source: a folder with one file each of ``*.all*`` (documents) and ``*.qry*`` (queries) and,
            if known, ``*qrel*`` (judgements), gzipped or not; or ``"module:function"``, a function
            without arguments that returns a :class:`TextCollection`, a pair of queries and
            documents, or these and the relevant positions of each query.

    Returns:
        The collection; documents without words are left out.

    Raises:
        FileNotFoundError: the folder does not exist or holds no such files.
        ValueError: the function cannot be found or returns something else, or a file is damaged.
    """
    folder = Path(source)
    if folder.is_dir():
        return _from_folder(folder)
    if ":" not in source:
        raise FileNotFoundError(
            f"{_SUBJECT}: data must be a folder of texts or module:function; got {source!r}."
        )
    module_name, _, function_name = source.partition(":")
    try:
        made: Any = getattr(importlib.import_module(module_name), function_name)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{_SUBJECT}: data must be module:function; got {source!r} ({error})."
        ) from error
    if isinstance(made, TextCollection):
        return made
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not all(map(_is_texts, made[:2])):
        raise ValueError(
            f"{_SUBJECT}: {source} must return a TextCollection or (queries, documents[, "
            f"relevant]); got {type(made).__name__}."
        )
    relevant = made[2] if len(made) == 3 else [()] * len(made[0])
    return _collection(source, made[0], made[1], [frozenset(row) for row in relevant])


def _is_texts(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(text, str) for text in value)
    )


def _from_folder(folder: Path) -> TextCollection:
    documents = _entries(_file(folder, "*.all*"))
    queries = _entries(_file(folder, "*.qry*"))
    place = {number: i for i, (number, _) in enumerate(documents)}
    relevant: list[set[int]] = [set() for _ in queries]
    judged = [path for path in sorted(folder.glob("*qrel*")) if path.suffix != ".readme"]
    for line in _text(judged[0]).splitlines() if judged else ():
        try:
            query, document = (int(word) for word in line.split()[:2])
            row = relevant[query - 1] if query >= 1 else relevant[len(queries)]
            row.add(place[document])
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(
                f"{_SUBJECT}: {judged[0]} must judge known queries and documents; got {line!r}."
            ) from error
    texts = [[text for _, text in group] for group in (queries, documents)]
    return _collection(folder.name, texts[0], texts[1], [frozenset(row) for row in relevant])


def _collection(
    name: str, queries: Sequence[str], documents: Sequence[str], relevant: list[frozenset[int]]
) -> TextCollection:
    """The collection without empty documents."""
    if len(relevant) != len(queries) or any(
        not 0 <= i < len(documents) for row in relevant for i in row
    ):
        raise ValueError(
            f"{_SUBJECT}: relevant must hold positions among the {len(documents)} documents for "
            f"each of the {len(queries)} queries."
        )
    kept = [i for i, text in enumerate(documents) if text.split()]
    place = {old: new for new, old in enumerate(kept)}
    return TextCollection(
        name,
        tuple(queries),
        tuple(documents[i] for i in kept),
        tuple(frozenset(place[i] for i in row if i in place) for row in relevant),
    )


def _file(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{_SUBJECT}: {folder} must hold a file {pattern}.")
    return found[0]


def _entries(path: Path) -> list[tuple[int, str]]:
    """Identifier and text of each entry."""
    entries = re.findall(r"^\.I +(\d+)\s*$(.*?)(?=^\.I |\Z)", _text(path), re.M | re.S)
    if not entries:
        raise ValueError(f"{_SUBJECT}: {path} must hold entries that begin with .I; it has none.")
    return [(int(number), body.partition("\n.W")[2].strip()) for number, body in entries]


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("latin-1")
    except (OSError, EOFError) as error:
        raise ValueError(f"{_SUBJECT}: {path} is damaged ({error}).") from error
