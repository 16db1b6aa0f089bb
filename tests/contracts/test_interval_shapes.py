"""Every rule of Interval on inputs of other shapes: refused where torch refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyrobust import Interval

from .test_interval_rules import EACH

REFUSED = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)


def other_shapes(shape):
    """Each size one more and one less, a dimension more, a dimension less."""
    for i in range(len(shape)):
        for size in {max(shape[i] - 1, 1), shape[i] + 1}:
            yield (*shape[:i], size, *shape[i + 1 :])
    yield (2, *shape)
    yield shape[1:]


@EACH
def test_boxes_have_the_shapes_of_tensors_or_are_refused(row):
    for shape in other_shapes(row.shape):
        middle = torch.full(shape, (row.low + row.high) / 2 + 0.01)
        box = Interval(middle, middle)
        try:
            expected = row.call(middle).shape
        except REFUSED:
            with pytest.raises(REFUSED):
                row.call(box)
            continue
        assert row.call(box).shape == expected, shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: F.batch_norm(x, torch.zeros(1), torch.ones(1)),
            "batch_norm must have 3 numbers",
        ),
        (lambda x: F.layer_norm(x, (3,)), r"layer_norm must have .* ends in \(3,\)"),
        (lambda x: F.group_norm(x, 2), "group_norm must have channels in 2 equal groups"),
        (lambda x: F.group_norm(x, 3, torch.ones(1)), "group_norm must have 3 numbers"),
        (lambda x: F.prelu(x, torch.ones(2)), "prelu must have 2 channels"),
        (lambda x: torch.mm(x, x), "mm must have operands of 2 and 2 dimensions"),
        (lambda x: torch.bmm(x[0], x[0, :1]), "bmm must have operands of 3 and 3 dimensions"),
        (
            lambda x: F.conv_transpose2d(x, torch.ones(3, 2, 1, 1), torch.ones(1)),
            r"conv_transpose2d must have a bias of 2 numbers; got \(1,\)",
        ),
    ],
)
def test_what_would_broadcast_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(Interval(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)))


def test_attention_with_dropout_is_refused_with_its_place():
    box = Interval(torch.zeros(2, 2, 4), torch.ones(2, 2, 4))
    with pytest.raises(ValueError, match=r"without dropout; got dropout_p = 0.1"):
        F.scaled_dot_product_attention(box, box, box, dropout_p=0.1)
    layer = torch.nn.MultiheadAttention(4, 2, dropout=0.1)
    with pytest.raises(ValueError, match=r"\(in MultiheadAttention\)\. Call model\.eval\(\)"):
        layer(box, box, box)
