"""Second-level statistics: 3-bit codes of scales and zero-points."""

import pytest
import torch

from pyrobust.quantize import SecondLevel


@pytest.mark.parametrize("groups", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("size", [1e-6, 0.01, 1e5])
def test_scales_are_within_half_a_step_and_zeros_within_their_stride(groups, size):
    scale = size * (0.5 + torch.rand(5, groups))
    zero = torch.randint(0, 16, (5, groups), dtype=torch.uint8)
    level = SecondLevel.of(scale, zero)
    for begin in range(0, groups, 16):
        part = slice(begin, begin + 16)
        span = scale[:, part].amax(1, keepdim=True) - scale[:, part].amin(1, keepdim=True)
        error = (level.scale[:, part].float() - scale[:, part]).abs()
        assert bool((error <= span / 14 + 0.006 * size).all())
    difference = (level.zero(16).int() - zero.int()).abs()
    assert int(difference.max()) <= 1  # a stride of at most 3
    assert level.zero(16).dtype == torch.uint8


def test_few_values_are_exact():
    scale = torch.tensor([[0.5, 1.0, 1.5, 4.0]]).repeat(3, 8)
    zero = torch.tensor([[3, 4, 5, 10]], dtype=torch.uint8).repeat(3, 8)
    level = SecondLevel.of(scale, zero)
    assert torch.equal(level.scale.float(), scale)
    assert torch.equal(level.zero(16), zero)
    assert torch.equal(level.zero(8), zero.clamp(max=7))
    assert SecondLevel.of(scale, None).zero(16) is None


def test_bytes():
    level = SecondLevel.of(torch.rand(4, 64), torch.zeros(4, 64, dtype=torch.uint8))
    assert level.nbytes == 4 * (2 * 24 + 4 * (2 + 2 + 1 + 1))
    assert SecondLevel.of(torch.rand(4, 64), None).nbytes == 4 * (24 + 4 * 4)


def test_nothing_and_zeros():
    assert SecondLevel.of(torch.zeros(2, 3), None).scale.tolist() == [[0.0] * 3] * 2
    assert SecondLevel.of(torch.zeros(0, 3), None).scale.shape == (0, 3)
    with pytest.raises(ValueError, match="zero must have shape"):
        SecondLevel.of(torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.uint8))


def test_the_largest_scale_of_a_group_survives_the_rounding_of_the_smallest():
    """The step runs from the base as it is stored: bfloat16 is off by up to 0.2% there."""
    scale = torch.linspace(1.0030e-6, 1.0100e-6, 16)[None]
    statistics = SecondLevel.of(scale, None)
    base = statistics.scale_base
    assert base.dtype == torch.bfloat16
    assert abs(float(base) / 1.0030e-6 - 1) > 5e-4
    assert float(statistics.scale.max()) == pytest.approx(1.0100e-6, rel=1e-4)
