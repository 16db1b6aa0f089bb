"""Codebooks and NF4."""

import pytest
import torch

from pyrobust.quantize import codebook_of, nf4_levels, round_to_codebook

# Published in appendix E of arXiv 2305.14314.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
NF4 += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
NF4 += [0.7229568362236023, 1.0]


def test_levels_are_the_published_ones():
    torch.testing.assert_close(nf4_levels().float(), torch.tensor(NF4), rtol=0, atol=2e-6)


def test_stored_levels_lie_within_half_a_grid_step():
    stored = (codebook_of(nf4_levels()).double() - 128) / 127
    assert ((stored - nf4_levels()).abs() <= 0.5 / 127).all()
    assert stored[7] == 0


@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4])
@pytest.mark.parametrize("group_dim", [0, 1])
def test_every_weight_takes_the_nearest_level(bits, group_dim):
    count = 3 if bits == 1.58 else 2 ** int(bits)
    levels = torch.randn(count)  # in any order
    weight = torch.randn(9, 50)
    packed = round_to_codebook(weight, levels=levels, bits=bits, group_size=16, group_dim=group_dim)
    scale = packed.scale.float().repeat_interleave(16, group_dim)[:9, :50]
    grid = scale[..., None] * (packed.codebook.float() - 128)
    nearest = (grid - weight[..., None]).abs().min(-1).values
    torch.testing.assert_close((packed.dequantize() - weight).abs(), nearest, rtol=0, atol=1e-6)


def test_rounding_the_levels_costs_under_one_percent_of_the_error():
    weight = torch.randn(256, 512)
    groups = weight.reshape(256, 8, 64)
    largest = groups.abs().amax(2, keepdim=True)
    exact = nf4_levels().float()
    codes = (groups / largest)[..., None].sub(exact).abs().argmin(-1)
    published = (exact[codes] * largest - groups).square().mean()
    ours = (round_to_codebook(weight).dequantize() - weight).square().mean()
    assert ours <= 1.01 * published


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 8, "levels": torch.ones(256)}, "bits must be one of"),
        ({"bits": 3}, r"bits \(without levels\) must be one of 4; got 3"),
        ({"levels": torch.ones(8)}, "levels must have shape"),
        ({"levels": torch.zeros(16)}, "other than 0"),
        ({"group_size": 0}, "group_size must be at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        round_to_codebook(torch.ones(2, 4), **options)
