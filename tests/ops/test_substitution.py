"""Tokens drawn anew from candidate lists."""

import pytest
import torch
from scipy import stats
from torch.library import opcheck

from pyrobust import _native
from pyrobust.ops import substituted_tokens

OFFSETS = torch.tensor([0, 1, 1, 4, 11])
CANDIDATES = torch.tensor([50, 2, 3, 7, *range(20, 27)])


def test_each_token_becomes_a_member_of_its_list(isa):
    tokens = torch.tensor([[0, 1, 2, 3, 4, -1, 99]]).repeat(2, 20)
    drawn = substituted_tokens(tokens, OFFSETS, CANDIDATES, 200, seed=1)
    accepted = [{50}, {1}, {2, 3, 7}, set(range(20, 27)), {4}, {-1}, {99}]
    for position in range(140):
        assert set(drawn[:, :, position].flatten().tolist()) == accepted[position % 7]


def test_choices_are_uniform_and_independent_of_place():
    drawn = substituted_tokens(torch.full((2, 100), 3), OFFSETS, CANDIDATES, 500, seed=2) - 20
    assert stats.chisquare(torch.bincount(drawn.flatten()).numpy()).pvalue > 1e-4
    pairs = drawn[..., 1:] * 7 + drawn[..., :-1]
    assert stats.chisquare(torch.bincount(pairs.flatten(), minlength=49).numpy()).pvalue > 1e-4
    pairs = drawn[:, 1:] * 7 + drawn[:, :-1]
    assert stats.chisquare(torch.bincount(pairs.flatten(), minlength=49).numpy()).pvalue > 1e-4


def test_choice_is_the_exact_quantile_of_64_bits():
    for count in (1, 2, 3, 7, 100, 2**31 + 5, 2**32 - 1):
        for k in {k for k in (1, count // 2, count - 1) if 0 < k < count}:
            border = -(-k * 2**64 // count)  # the first of 64 bits that gives k
            for u in (border - 1, border, border + 2**31, border - 2**33):
                if not 0 <= u < 2**64:
                    continue
                bits, extra = u >> 32, u & 0xFFFFFFFF
                assert _native.choice_value(count, bits, extra)[0] == u * count >> 64
    assert _native.choice_value(7, 5, 0) == (0, 1)
    assert _native.choice_value(0, 123, 0) == (0, 1)


def test_every_split_thread_and_instruction_set_gives_the_same_draws(isa):
    tokens = torch.randint(-1, 5, (4, 333))
    whole = substituted_tokens(
        tokens, OFFSETS, CANDIDATES, 30, seed=3, first_sample=9, first_index=2
    )
    for begin, size in ((0, 1), (1, 7), (8, 22)):
        part = substituted_tokens(
            tokens, OFFSETS, CANDIDATES, size, seed=3, first_sample=9 + begin, first_index=2
        )
        assert torch.equal(part, whole[:, begin : begin + size])
    _native.set_isa("portable")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            again = substituted_tokens(
                tokens, OFFSETS, CANDIDATES, 30, seed=3, first_sample=9, first_index=2
            )
            assert torch.equal(again, whole)
    finally:
        torch.set_num_threads(before)
        _native.set_isa(isa)


def test_empty_inputs_and_empty_vocabulary():
    tokens = torch.tensor([[1, 2]])
    none = torch.empty(0, dtype=torch.int64)
    assert torch.equal(
        substituted_tokens(tokens, torch.tensor([0]), none, 3, seed=0)[0], tokens.repeat(3, 1)
    )
    empty = torch.empty(2, 0, dtype=torch.int64)
    assert substituted_tokens(empty, OFFSETS, CANDIDATES, 3, seed=0).shape == (2, 3, 0)


def test_operator_passes_opcheck():
    tokens = torch.randint(-1, 5, (2, 9))
    opcheck(
        torch.ops.pyrobust.substituted_tokens.default, (tokens, OFFSETS, CANDIDATES, 3, 1, 2, 3)
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokens": torch.zeros(1, 2)}, TypeError, "tokens must be an int64 tensor"),
        ({"offsets": torch.tensor([1, 11])}, ValueError, "offsets must run from 0 to the 11"),
        ({"offsets": torch.tensor([0, 4])}, ValueError, "offsets must run from 0 to the 11"),
        ({"offsets": torch.tensor([0, 12, 11])}, ValueError, "offsets must not fall"),
        ({"offsets": torch.tensor([[0, 11]])}, ValueError, r"offsets must have shape \(V \+ 1,\)"),
        ({"n": 1.0}, TypeError, "n must be an integer"),
        ({"first_index": 2**48}, ValueError, r"first_index \+ B must not exceed 2\*\*48"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    given = {"tokens": tokens, "offsets": OFFSETS, "candidates": CANDIDATES, "n": 1, "seed": 0}
    given |= options
    order = [given.pop(name) for name in ("tokens", "offsets", "candidates", "n")]
    with pytest.raises(error, match=message):
        substituted_tokens(*order, **given)
