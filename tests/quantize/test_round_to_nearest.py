"""Round-to-nearest: nothing moves by more than half a step, and 0 stays 0."""

import pytest
import torch

from pyrobust.quantize import BITS, QTensor, round_to_nearest


def steps_of(packed: QTensor) -> torch.Tensor:
    scale = packed.scale.double().repeat_interleave(packed.group_size, packed.group_dim)
    return scale[: packed.shape[0], : packed.shape[1]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("magnitude", [1e-41, 1e-6, 1.0, 1e7, 8e37])
def test_no_weight_moves_by_more_than_half_a_step(bits, group_dim, symmetric, magnitude):
    weight = torch.rand(19, 45) * 2 - 1
    weight[:, ::7] = 0.0
    weight[3] = weight[3].abs()
    weight = weight * magnitude
    packed = round_to_nearest(
        weight, bits=bits, group_size=8, group_dim=group_dim, symmetric=symmetric
    )
    moved = (packed.dequantize(torch.float64) - weight.double()).abs()
    assert (moved <= 0.5 * steps_of(packed) * (1 + 1e-5)).all()
    assert (packed.dequantize()[weight == 0] == 0).all()
    assert (packed.zero is None) == symmetric


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_dim", [0, 1])
def test_quantizing_twice_changes_nothing(bits, group_dim):
    once = round_to_nearest(torch.randn(24, 40), bits=bits, group_size=8, group_dim=group_dim)
    values = once.dequantize()
    codes = once.unpack_codes()
    again = QTensor.from_codes(
        codes, once.scale, once.zero, bits=bits, group_size=8, group_dim=group_dim
    )
    assert torch.equal(again.dequantize(), values)


@pytest.mark.parametrize("bits", [1, 1.58])
def test_few_levels_minimise_the_squared_error(bits):
    weight = torch.randn(6, 33)
    packed = round_to_nearest(weight, bits=bits, group_size=16)
    error = (packed.dequantize() - weight).square().sum()
    grid = torch.linspace(0.01, 3, 600)
    best = 0.0
    for group in [*weight[:, :16], *weight[:, 16:32], *weight[:, 32:]]:
        levels = torch.tensor([-1.0, 1.0] if bits == 1 else [-1.0, 0.0, 1.0])
        points = grid[:, None, None] * levels
        best += (points - group[None, :, None]).square().amin(2).sum(1).min()
    assert error <= best * (1 + 1e-4)


def test_scales_are_float16_where_they_fit():
    assert round_to_nearest(torch.randn(4, 8), bits=4).scale.dtype == torch.float16
    assert round_to_nearest(torch.randn(4, 8) * 1e-5, bits=4).scale.dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1)])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_dim", [0, 1])
def test_degenerate_shapes(shape, bits, group_dim):
    packed = round_to_nearest(torch.randn(shape), bits=bits, group_dim=group_dim)
    assert packed.dequantize().shape == shape


def test_groups_of_zeros_stay_zero():
    for bits in BITS:
        assert not round_to_nearest(torch.zeros(3, 10), bits=bits, group_size=4).dequantize().any()


@pytest.mark.parametrize(
    ("weight", "options", "error", "message"),
    [
        (torch.randn(2, 2), {"bits": 7}, ValueError, "bits must be one of"),
        (
            torch.randn(2, 2),
            {"bits": 4, "group_size": 0},
            ValueError,
            "group_size must be at least",
        ),
        (torch.randn(2, 2), {"bits": 4, "group_dim": 3}, ValueError, "group_dim must be one of"),
        (torch.randn(2), {"bits": 4}, ValueError, "weight must have shape"),
        (torch.full((2, 2), torch.nan), {"bits": 4}, ValueError, "weight must be finite"),
        (torch.ones(2, 2, dtype=torch.int32), {"bits": 4}, TypeError, "floating-point"),
    ],
)
def test_bad_input_gives_one_clear_error(weight, options, error, message):
    with pytest.raises(error, match=message):
        round_to_nearest(weight, **options)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_errors_are_those_of_torchao(bits):
    """Asymmetric groups of 128; it places the zero-point in its own way, so codes may differ."""
    torchao = pytest.importorskip("torchao.quantization")
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Sequential(torch.nn.Linear(512, 256, bias=False))
    model[0].weight.data = weight.clone()
    config = torchao.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=torchao.PerGroup(128),
        mapping_type=torchao.MappingType.ASYMMETRIC,
    )
    torchao.quantize_(model, config)
    ours = round_to_nearest(weight, bits=bits, group_size=128, symmetric=False).dequantize()
    error, reference = (
        float((each - weight).norm()) for each in (ours, model[0].weight.dequantize())
    )
    assert error == pytest.approx(reference, rel=2e-3)
