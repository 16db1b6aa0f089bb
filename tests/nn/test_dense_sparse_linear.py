"""DenseSparseLinear: the product of both parts, and what its state dict costs."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyrobust
from pyrobust.nn import DenseSparseLinear
from pyrobust.quantize import outlier_mask, quantize_with_outliers, round_to_nearest


def example(rows=30, columns=100, *, whole=0, fraction=0.02, **form):
    weight = torch.randn(rows, columns)
    mask = outlier_mask(weight, weight.abs(), fraction)
    mask[:, :whole] = True
    return weight, quantize_with_outliers(weight, mask, **{"group_size": 16, **form})


FORMS = [
    {},
    {"bits": 3, "whole": 2},
    {"bits": 2, "symmetric": True},
    {"bits": 8, "group_dim": 0},
    {"bits": 4, "second_level": True, "whole": 1},
    {"bits": 3, "second_level": True, "symmetric": True},
    {"bits": 4, "fraction": 0.0},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [1, 33])
def test_the_product_is_that_of_the_decoded_weight(form, batch):
    _, packed = example(**form)
    bias = torch.randn(30)
    layer = DenseSparseLinear.from_qtensor(packed, bias)
    assert torch.equal(layer.dequantize(), packed.dequantize())
    x = torch.randn(batch, 100)
    expected = F.linear(x.double(), packed.dequantize().double(), bias.double())
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)):
        y = layer.to(dtype)(x.to(dtype)).double()
        rounded = F.linear(x.to(dtype).double(), packed.dequantize().double(), layer.bias.double())
        assert float((y - rounded).abs().max() / expected.abs().max()) < tolerance
    layer.activations = "int8"
    y = layer.float()(x).double()
    assert float((y - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("form", FORMS)
def test_the_state_dict_gives_the_same_weight_back(form, tmp_path):
    _, packed = example(**form)
    layer = DenseSparseLinear.from_qtensor(packed, torch.randn(30))
    state = layer.state_dict()
    for assign in (False, True):
        other = copy.deepcopy(layer)
        for tensor in other.state_dict().values():
            tensor.zero_()
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other.dequantize(), packed.dequantize())
    path = tmp_path / "layer.safetensors"
    pyrobust.save(nn.Sequential(layer), path)
    for target in (nn.Sequential(nn.Linear(100, 30)), nn.Sequential(copy.deepcopy(layer))):
        loaded = pyrobust.load(path, target)[0]
        assert isinstance(loaded, DenseSparseLinear)
        assert torch.equal(loaded.dequantize(), packed.dequantize())
        assert torch.equal(loaded.bias, layer.bias)
        assert loaded.second_level == layer.second_level
    with pytest.raises(ValueError, match="holds a DenseSparseLinear '0'"):
        pyrobust.load(path, nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_a_state_of_another_storage_is_refused():
    plain = DenseSparseLinear.from_qtensor(example(whole=1)[1])
    for form in ({"whole": 2}, {"whole": 1, "second_level": True}):
        other = DenseSparseLinear.from_qtensor(example(**form)[1])
        with pytest.raises(RuntimeError, match=r"packed with|another format"):
            plain.load_state_dict(other.state_dict())


def test_saved_bytes_are_the_counted_bits(tmp_path):
    weight, packed = example(512, 1024, bits=4, fraction=0.01)
    layer = DenseSparseLinear.from_qtensor(packed)
    expected = 4 + (16 + 4) / 16 + 0.01 * (16 + 16) + 16 / 1024
    assert layer.bits_per_weight == pytest.approx(expected, rel=1e-3)
    path = tmp_path / "one.safetensors"
    pyrobust.save(nn.Sequential(layer), path)
    assert path.stat().st_size == pytest.approx(weight.numel() * expected / 8, rel=0.01)

    _, packed = example(512, 1024, bits=4, fraction=0.01, second_level=True)
    layer = DenseSparseLinear.from_qtensor(packed)
    expected = 4 + (3 + 3) / 16 + 48 / 256 + 0.01 * (16 + 16) + 16 / 1024
    assert layer.bits_per_weight == pytest.approx(expected, rel=1e-3)
    pyrobust.save(nn.Sequential(layer), path)
    assert path.stat().st_size == pytest.approx(weight.numel() * expected / 8, rel=0.01)


def test_whole_columns_take_one_index_each():
    none = DenseSparseLinear.from_qtensor(example(512, 256, fraction=0.0)[1])
    some = DenseSparseLinear.from_qtensor(example(512, 256, fraction=0.0, whole=3)[1])
    assert some.whole_columns == 3
    assert len(some.outlier_values) == 0
    extra = some.nbytes_packed - none.nbytes_packed
    assert extra == 3 * (2 * 512 + 4) + 2 * 512


def test_wide_rows_take_longer_indices():
    _, packed = example(3, 40_000, fraction=0.01)
    layer = DenseSparseLinear.from_qtensor(packed)
    assert layer.outlier_columns.dtype == torch.int32
    other = copy.deepcopy(layer)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dequantize(), packed.dequantize())


@pytest.mark.parametrize("activations", [None, "int8"])
def test_bounds_contain_what_the_layer_computes(activations):
    _, packed = example(11, 40, bits=3, second_level=True, fraction=0.05)
    layer = DenseSparseLinear.from_qtensor(packed, torch.randn(11), activations=activations)
    x = torch.rand(3, 40)
    bounds = layer(pyrobust.Interval.ball(x, 0.05))
    for _ in range(100):
        y = layer(x + 0.05 * (2 * torch.rand_like(x) - 1))
        assert bool(((y >= bounds.lower) & (y <= bounds.upper)).all())


def test_meta_and_back():
    _, packed = example(whole=1, second_level=True)
    layer = DenseSparseLinear.from_qtensor(packed)
    state = layer.state_dict()
    empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    assert torch.equal(empty.dequantize(), packed.dequantize())


def test_refusals():
    weight = torch.randn(4, 6)
    with pytest.raises(TypeError, match="qtensor must be a"):
        DenseSparseLinear.from_qtensor(weight)
    two_level = pyrobust.quantize.round_to_two_level(weight, bits=4, group_size=3)
    with pytest.raises(ValueError, match="scales of its groups only"):
        DenseSparseLinear.from_qtensor(two_level)
    plain = DenseSparseLinear.from_qtensor(round_to_nearest(weight, bits=4))
    with pytest.raises(ValueError, match="in_features = 6"):
        plain(torch.randn(2, 5))
