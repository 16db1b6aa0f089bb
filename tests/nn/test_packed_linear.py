"""PackedLinear: the stored bytes mean what the layout says, and the product is the exact one."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pyrobust import nn as rnn
from pyrobust.quantize import round_to_nearest

FORMATS = [1, 1.58, 2, 3, 4, 8]


def unpack_by_the_layout(layer) -> np.ndarray:
    """The weight from the bytes alone, one element at a time, as the layout is described."""
    rows, cols = layer.out_features, layer.in_features
    codes, scale = layer.codes.numpy(), layer.scale.double().numpy()
    weight = np.empty((rows, cols))
    for r in range(rows):
        stream = int.from_bytes(codes[r].tobytes(), "little")  # bit 0 first
        for c in range(cols):
            group = (
                (r, c // layer.group_size) if layer.group_dim == 1 else (r // layer.group_size, c)
            )
            if layer.bits == 1.58:  # five base-3 digits a byte, the first the least significant
                value = int(codes[r, c // 5]) // 3 ** (c % 5) % 3 - 1
            else:
                code = (stream >> (layer.bits * c)) & (2**layer.bits - 1)
                zero = 2 ** (layer.bits - 1) if layer.zero is None else int(layer.zero[group])
                value = 2 * code - 1 if layer.bits == 1 else code - zero
            weight[r, c] = scale[group] * value
    return weight.astype(np.float32)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize(
    ("rows", "cols", "group_size"), [(1, 1, 4), (5, 13, 4), (9, 33, 16), (3, 7, 64)]
)
def test_dequantize_equals_an_independent_unpacking(
    bits, group_dim, symmetric, rows, cols, group_size
):
    layer = rnn.PackedLinear(
        cols, rows, bits=bits, group_size=group_size, group_dim=group_dim, symmetric=symmetric
    )
    assert np.array_equal(layer.dequantize().numpy(), unpack_by_the_layout(layer))


@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_float32_product_equals_the_float64_one(bits, group_dim, batch):
    layer = rnn.PackedLinear(101, 37, bits=bits, group_size=32, group_dim=group_dim)
    x, weight = torch.randn(batch, 101).double(), layer.dequantize().double()
    expected = x @ weight.T + layer.bias.double()
    error = (layer(x.float()).double() - (x.float().double() @ weight.T + layer.bias)).abs()
    magnitude = x.abs() @ weight.abs().T + layer.bias.abs().double()
    assert (error <= 1e-6 * magnitude).all()
    assert expected.shape == error.shape


def test_from_linear_is_round_to_nearest_and_keeps_the_bias():
    linear = nn.Linear(10, 4).eval()
    layer = rnn.PackedLinear.from_linear(linear, bits=3, group_size=5)
    expected = round_to_nearest(linear.weight, bits=3, group_size=5)
    assert torch.equal(layer.codes, expected.codes)
    assert torch.equal(layer.dequantize(), expected.dequantize())
    assert torch.equal(layer.bias, linear.bias)
    assert layer.bias.data_ptr() != linear.bias.data_ptr()
    assert not layer.bias.requires_grad
    assert not layer.training
    assert layer.nbytes_packed == expected.nbytes


def test_from_qtensor_shares_the_codes():
    qtensor = round_to_nearest(torch.randn(4, 10), bits=2, group_size=5, symmetric=True)
    layer = rnn.PackedLinear.from_qtensor(qtensor, activations="int8")
    assert layer.qtensor.codes is qtensor.codes
    assert layer.symmetric
    assert layer.bias is None
    with pytest.raises(ValueError, match="bias must have shape"):
        rnn.PackedLinear.from_qtensor(qtensor, torch.zeros(3))


def test_same_seed_packs_the_initial_weights_of_torch():
    torch.manual_seed(1)
    layer = rnn.PackedLinear(8, 3, bits=8, group_size=8)
    torch.manual_seed(1)
    linear = nn.Linear(8, 3)
    assert torch.allclose(layer.dequantize(), linear.weight, atol=0.005)
    assert torch.equal(layer.bias, linear.bias)


def test_a_meta_layer_has_no_data_and_is_filled_by_a_state_dict():
    source = rnn.PackedLinear(8, 3, group_size=8)
    layer = rnn.PackedLinear(8, 3, group_size=8, device="meta")
    assert layer.codes.is_meta
    assert layer.bias.is_meta
    layer.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(layer.dequantize(), source.dequantize())


def test_a_shared_weight_stays_shared_through_copies_and_moves():
    first = rnn.PackedLinear(8, 3, group_size=8, bias=False)
    model = nn.ModuleList([first, rnn.PackedLinear.from_qtensor(first.qtensor)])
    for other in (copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16)):
        assert other[0].codes.data_ptr() == other[1].codes.data_ptr()
        assert other[0].scale.data_ptr() == other[1].scale.data_ptr()


def test_scales_of_another_dtype_are_loaded_without_rounding():
    tiny = nn.Linear(8, 3)
    nn.init.constant_(tiny.weight, 1e-9)  # below the range of float16: float32 scales
    source = rnn.PackedLinear.from_linear(tiny, group_size=8)
    target = rnn.PackedLinear(8, 3, group_size=8)
    assert source.scale.dtype != target.scale.dtype
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.dequantize(), source.dequantize())


def test_a_float_state_is_refused_with_advice():
    with pytest.raises(RuntimeError, match="holds a float weight"):
        rnn.PackedLinear(8, 3).load_state_dict(nn.Linear(8, 3).state_dict())


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"bits": 5}, ValueError, "bits must be one of 1, 1.58, 2, 3, 4, 8; got 5"),
        ({"bits": "4"}, ValueError, "bits must be one of"),
        ({"group_size": 0}, ValueError, "group_size must be at least 1; got 0"),
        ({"group_size": 2.5}, TypeError, "group_size must be an integer"),
        ({"group_dim": 2}, ValueError, "group_dim must be one of 0, 1; got 2"),
        ({"activations": "int4"}, ValueError, "activations must be one of None, int8"),
    ],
)
def test_wrong_options_are_refused(options, error, sentence):
    with pytest.raises(error, match=sentence):
        rnn.PackedLinear(8, 3, **options)
    with pytest.raises(error, match=sentence):
        rnn.PackedLinear.from_linear(nn.Linear(8, 3), **options)


def test_wrong_layers_and_weights_are_refused():
    with pytest.raises(TypeError, match=r"layer must be a torch\.nn\.Linear; got Conv2d"):
        rnn.PackedLinear.from_linear(nn.Conv2d(1, 1, 1))
    bad = nn.Linear(8, 3)
    bad.weight.data[1, 1] = float("nan")
    with pytest.raises(ValueError, match="weight must be finite"):
        rnn.PackedLinear.from_linear(bad)


def test_weight_is_readable_for_foreign_code_and_cannot_be_assigned():
    layer = rnn.PackedLinear(8, 3, group_size=4)
    assert torch.equal(layer.weight, layer.dequantize())
    for value in (torch.zeros(3, 8), nn.Parameter(torch.zeros(3, 8)), None):
        with pytest.raises(AttributeError, match=r"PackedLinear: weight cannot be set.*adopt"):
            layer.weight = value
    before = layer.dequantize()
    with torch.no_grad():
        layer.weight.zero_()  # a copy
    assert torch.equal(layer.dequantize(), before)


def test_scripts_are_refused_and_traces_are_not():
    model = nn.Sequential(rnn.PackedConv1d(2, 4, 3), nn.Flatten(), rnn.PackedLinear(16, 3))
    with pytest.raises(NotImplementedError, match=r"PackedConv1d: .*torch\.jit\.script.*export"):
        torch.jit.script(model)
    x = torch.randn(2, 2, 6)
    assert torch.equal(torch.jit.trace(model, x)(x + 1), model(x + 1))


def test_the_printed_form_tells_the_format():
    text = repr(rnn.PackedLinear(8, 3, bits=1.58, group_dim=0, activations="int8"))
    assert text == (
        "PackedLinear(in_features=8, out_features=3, bias=True, bits=1.58, group_size=128, "
        "group_dim=0, symmetric=True, activations='int8')"
    )


def test_a_state_loads_whether_activations_are_rounded_or_not():
    """They are a choice of how to run, not of what the codes mean."""
    source, target = rnn.PackedLinear(16, 4), rnn.PackedLinear(16, 4, activations="int8")
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.dequantize(), source.dequantize())
    assert target.activations == "int8"
