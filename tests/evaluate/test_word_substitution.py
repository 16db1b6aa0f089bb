"""The greedy attack finds what an exhaustive search finds where positions do not interact."""

import itertools

import pytest
import torch

from pyrobust.certify import SynonymTable
from pyrobust.evaluate import word_substitution_attack

TABLE = SynonymTable.from_dict({"a": ["b", "c"], "b": ["a"], "c": ["a"], "d": ["e"], "e": ["d"]})
VALUES = {"a": 0.0, "b": 1.0, "c": 2.0, "d": 0.5, "e": 0.0, "z": 0.0}


def score(query, documents):
    return torch.tensor([sum(VALUES[w] for w in d) for d in documents])


def test_an_additive_score_is_maximised():
    document = ["a", "z", "d", "e"]
    found = word_substitution_attack(score, TABLE, None, document)
    every = itertools.product(*(TABLE.substitutes(w) for w in document))
    assert found.score == float(score(None, [list(d) for d in every]).max()) == 3.0
    assert found.document == ["c", "z", "d", "d"]
    assert (found.clean_score, found.edits) == (0.5, 2)
    assert found.evaluations == 4 + 2 + 1 + 1


def test_the_budget_is_kept():
    document = ["a", "a", "e"]
    scores = [word_substitution_attack(score, TABLE, None, document, max_edits=r) for r in range(4)]
    assert [s.edits for s in scores] == [0, 1, 2, 3]
    assert scores[0].document == document
    assert scores[3].score == 4.5
    with pytest.raises(ValueError, match="max_edits"):
        word_substitution_attack(score, TABLE, None, document, max_edits=-1)
