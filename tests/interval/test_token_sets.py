"""Embeddings of sets of tokens: the box of all sentences that can be chosen."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from pyrobust import Interval

CANDIDATES = torch.tensor([[[0, 3, 5], [1, 1, 1], [2, 6, 4]]])  # (B, T, S)


@pytest.mark.parametrize("rounding", ["nearest", "real", "deployed"])
def test_every_sentence_lies_inside_and_each_end_is_attained(rounding):
    table = nn.Embedding(8, 4).requires_grad_(False)
    box = Interval.hull(table(CANDIDATES), dim=2, rounding=rounding)
    sentences = torch.stack(
        [table(torch.tensor([choice])) for choice in itertools.product(*CANDIDATES[0].tolist())]
    )
    assert bool(box.contains(sentences).all())
    assert torch.equal(box.lower, sentences.amin(0))
    assert torch.equal(box.upper, sentences.amax(0))


def test_fewer_candidates_have_a_smaller_box_and_one_has_a_point():
    vectors = nn.Embedding(8, 4)(CANDIDATES).detach()
    box = Interval.hull(vectors, dim=2)
    assert bool(box.contains(Interval.hull(vectors[:, :, :2], dim=2)).all())
    assert torch.equal(box.lower[:, 1], box.upper[:, 1])
    assert torch.equal(box.lower[:, 1], vectors[:, 1, 0])


def test_gradients_reach_the_table():
    def ends(table):
        box = Interval.hull(torch.nn.functional.embedding(CANDIDATES, table), dim=2)
        return box.lower[:, [0, 2]], box.upper[:, [0, 2]]

    table = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ends, table)


def test_a_box_around_the_table_holds_every_table_inside():
    table = torch.randn(8, 4)
    box = Interval.ball(table, 0.1)
    image = torch.nn.functional.embedding(CANDIDATES, box)
    assert torch.equal(image.lower, box.lower[CANDIDATES])
    with pytest.raises(NotImplementedError, match="max_norm"):
        torch.nn.functional.embedding(CANDIDATES, box, max_norm=1.0)
