"""Two-level scales."""

import pytest
import torch

from pyrobust.quantize import round_to_nearest, round_to_two_level


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", [(9, 50), (16, 64), (3, 0), (0, 5)])
def test_no_weight_moves_by_more_than_half_a_step(bits, group_dim, symmetric, shape):
    weight = torch.randn(shape) * torch.rand(shape[0], 1).exp()
    packed = round_to_two_level(
        weight, bits=bits, group_size=16, group_dim=group_dim, symmetric=symmetric
    )
    step = packed.scale.float().repeat_interleave(16, group_dim)[: shape[0], : shape[1]]
    step = step * packed.row_scale[:, None]
    assert ((packed.dequantize() - weight).abs() <= 0.5001 * step).all()
    assert packed.scale.dtype == torch.uint8
    assert not packed.scale.numel() or int(packed.scale.max()) <= 255 // (2**bits - 1)


@pytest.mark.parametrize(("bits", "ratio"), [(2, 1.02), (3, 1.03), (4, 1.05)])
def test_error_stays_close_to_that_of_float_scales(bits, ratio):
    weight = torch.randn(128, 1024)

    def error(packed):
        return (packed.dequantize() - weight).square().mean().sqrt()

    ours = error(round_to_two_level(weight, bits=bits))
    assert ours <= ratio * error(round_to_nearest(weight, bits=bits))


def test_zeros_stay_zero_and_bad_options_are_named():
    weight = torch.zeros(4, 32)
    weight[1, 3] = 5.0
    packed = round_to_two_level(weight, group_size=8)
    assert torch.equal(packed.dequantize() == 0, weight == 0)
    for bits in (1, 1.58, 8):
        with pytest.raises(ValueError, match="bits must be one of 2, 3, 4"):
            round_to_two_level(weight, bits=bits)
