"""Votes: arg-max, ties, NaN, histogram."""

import math

import pytest
import torch
from torch.library import opcheck

from pyrobust.ops import count_votes


def test_votes_are_the_histogram_of_the_arg_max(isa):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.randn(3, 50, 11).to(dtype)
        best = torch.from_numpy(logits.float().numpy().argmax(-1))
        expected = torch.nn.functional.one_hot(best, 11).sum(1)
        assert torch.equal(count_votes(logits), expected)


def test_ties_go_to_the_lowest_class():
    ties = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0], [-math.inf] * 3, [0.0, -0.0, -1.0]])
    assert count_votes(ties).tolist() == [3, 1, 0]
    assert count_votes(torch.zeros(2, 0, 4)).tolist() == [[0] * 4] * 2
    assert count_votes(torch.zeros(5, 1)).tolist() == [5]


def test_nan_logits_are_named():
    logits = torch.randn(4, 6, 3)
    logits[2, 5, 1] = math.nan
    logits[3, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"logits must not be NaN; sample \(2, 5\) is"):
        count_votes(logits)


def test_bad_logits_are_refused():
    with pytest.raises(ValueError, match="logits must have 4 classes on the last axis"):
        count_votes(torch.zeros(2, 3), num_classes=4)
    with pytest.raises(ValueError, match="at least one class"):
        count_votes(torch.zeros(2, 0))
    with pytest.raises(ValueError, match=r"shape \(..., n, K\)"):
        count_votes(torch.zeros(3))
    with pytest.raises(TypeError, match="floating-point"):
        count_votes(torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_operator_passes_opcheck(dtype):
    opcheck(torch.ops.pyrobust.count_votes.default, (torch.rand(4, 6, 3, dtype=dtype),))
