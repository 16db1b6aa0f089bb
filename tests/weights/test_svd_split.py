"""Singular value split and the rank rule."""

import pytest
import torch

from pyrobust.weights import rank_for_energy, svd_split


def test_parts_add_up():
    matrix = torch.randn(20, 30)
    split = svd_split(matrix, rank=7)
    torch.testing.assert_close((split.u * split.s) @ split.vh + split.residual, matrix)
    best = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(split.residual.norm(), best[7:].norm())


@pytest.mark.parametrize("measure", ["sum", "squares"])
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
def test_rank_is_the_smallest_that_reaches_the_energy(measure, energy):
    values = torch.linalg.svdvals(torch.randn(25, 40, dtype=torch.float64))
    rank = rank_for_energy(values, energy, measure=measure)
    weights = values if measure == "sum" else values**2
    share = torch.cumsum(weights, 0) / weights.sum()
    assert rank == 25 or share[rank - 1] >= energy
    assert rank == 1 or share[rank - 2] < energy


def test_low_rank_and_zero_matrices():
    low = torch.randn(30, 3) @ torch.randn(3, 20)
    split = svd_split(low, rank=3)
    assert (low - (split.u * split.s) @ split.vh).abs().max() < 1e-6 * low.abs().max() * 10
    exact = svd_split(low.double(), rank=3)
    assert (low - (exact.u * exact.s) @ exact.vh).abs().max() < 1e-6
    assert svd_split(torch.zeros(4, 5)).rank == 1


def test_half_precision_is_decomposed_in_float32():
    split = svd_split(torch.randn(8, 8).bfloat16(), rank=2)
    assert split.s.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: svd_split(torch.ones(3)), "must be 2-D"),
        (lambda: svd_split(torch.ones(3, 3), rank=4), "at most 3; got 4"),
        (lambda: svd_split(torch.ones(3, 3), rank=0), "at least 1; got 0"),
        (lambda: svd_split(torch.ones(3, 3), energy=0.0), r"energy must lie in \(0, 1\]"),
        (lambda: svd_split(torch.ones(3, 3) / 0), "must be finite"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
