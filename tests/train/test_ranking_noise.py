"""The noise-augmented hinge against its definition."""

import pytest
import torch

from pyrobust.certify import SynonymTable
from pyrobust.train import noise_augmented_ranking_loss

TABLE = SynonymTable.from_dict({"a": ["b"], "b": ["a"], "c": []})
VALUES = {"a": 0.0, "b": 2.0, "c": 0.5}


def test_the_loss_is_the_mean_hinge_of_the_draws():
    seen = []

    def score(query, documents):
        seen.append(documents)
        return torch.tensor([VALUES[d[0]] for d in documents], requires_grad=True)

    generator = torch.Generator().manual_seed(0)
    good, bad = ["a"] * 200, ["c"] * 200
    loss = noise_augmented_ranking_loss(score, TABLE, None, good, bad, generator=generator)
    drawn = [d[0] for d in seen[0][:200]]
    expected = sum(max(0.0, 1 - VALUES[w] + 0.5) for w in drawn) / 200
    assert float(loss.detach()) == pytest.approx(expected)
    assert 60 < drawn.count("b") < 140
    assert loss.requires_grad


def test_pairs_are_needed():
    with pytest.raises(ValueError, match="pairs; got 1 and 0"):
        noise_augmented_ranking_loss(lambda q, d: torch.zeros(1), TABLE, None, ["a"], [])
