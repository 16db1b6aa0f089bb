"""Packed convolutions against torch's in float64 on the decoded weight."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyrobust
from pyrobust import nn as rnn
from pyrobust import ops

GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    {"padding": "same", "kernel_size": (2, 4)},
    {"padding": "valid", "kernel_size": 1},
    {"groups": 2, "padding": 1},
    {"groups": 4, "padding": 1, "bias": False},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (1, 2), "padding_mode": "circular", "stride": 2},
    {"padding": "same", "padding_mode": "replicate", "kernel_size": (2, 3)},
]


def float_conv(geometry):
    return nn.Conv2d(4, 8, **{"kernel_size": 3, **geometry})


@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("bits", [1.58, 3, 8])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_equals_the_float64_convolution_with_the_decoded_weight(geometry, bits, group_dim):
    conv = float_conv(geometry)
    layer = rnn.PackedConv2d.from_conv2d(conv, bits=bits, group_size=5, group_dim=group_dim)
    conv.weight.data = layer.dequantize()
    x = torch.randn(3, 4, 9, 8)
    with torch.no_grad():
        expected = conv.double()(x.double())
        conv.weight.data.abs_()
        if conv.bias is not None:
            conv.bias.data.abs_()
        magnitude = conv(x.double().abs())
        assert ((layer(x).double() - expected).abs() <= 1e-6 * magnitude).all()
        assert torch.equal(layer(x[0]), layer(x)[0])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("group_dim", [0, 1])
def test_int8_activations_round_each_patch(groups, group_dim):
    conv = nn.Conv2d(4, 8, 3, groups=groups, bias=False)
    layer = rnn.PackedConv2d.from_conv2d(
        conv, group_size=3, group_dim=group_dim, activations="int8"
    )
    x = torch.randn(2, 4, 6, 5)
    patches = F.unfold(x.double(), 3).transpose(1, 2).unflatten(2, (groups, -1))
    step = patches.abs().amax(-1, keepdim=True) / 127
    rounded = torch.round(patches / step) * step
    weight = layer.dequantize().double().flatten(1).unflatten(0, (groups, -1))
    expected = torch.einsum("blgk,gok->bgol", rounded, weight).flatten(1, 2)
    assert torch.allclose(layer(x).double().flatten(2), expected, atol=1e-5)


def test_decoded_weight_has_the_layout_of_torch():
    conv = nn.Conv2d(4, 6, (3, 2))
    layer = rnn.PackedConv2d.from_conv2d(conv, bits=8, group_size=4)
    assert layer.dequantize().shape == conv.weight.shape
    assert torch.allclose(layer.dequantize(), conv.weight, atol=0.01)


@pytest.mark.parametrize(
    ("geometry", "sentence"),
    [({"stride": 2, "padding": "same"}, "padding='same'"), ({"groups": 3}, "divisible by groups")],
)
def test_impossible_geometries_are_refused(geometry, sentence):
    with pytest.raises(ValueError, match=sentence):
        rnn.PackedConv2d(4, 8, 3, **geometry)


def test_small_images_and_other_shapes_are_refused():
    layer = rnn.PackedConv2d(4, 8, 3)
    with pytest.raises(ValueError, match="at least as large as the window; got 2 and 3"):
        layer(torch.zeros(1, 4, 5, 2))
    with pytest.raises(ValueError, match="x must have shape"):
        layer(torch.zeros(5, 5))
    with pytest.raises(ValueError, match="dtype of x"):
        layer(torch.zeros(1, 4, 5, 5, dtype=torch.float8_e5m2))


def test_the_printed_form_tells_geometry_and_format():
    text = repr(rnn.PackedConv2d(4, 8, 3, stride=2, padding="valid", groups=2, bits=2))
    assert text == (
        "PackedConv2d(4, 8, kernel_size=(3, 3), stride=(2, 2), padding='valid', groups=2, "
        "bias=True, bits=2, group_size=128)"
    )


# -- lines ---------------------------------------------------------------------------------------

LINES = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": (2,), "dilation": 3, "bias": False},
    {"padding": "same", "kernel_size": 4},
    {"padding": "valid", "kernel_size": 1},
    {"groups": 4, "padding": 1},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 2, "padding_mode": "circular", "stride": 2},
]


@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("bits", [1.58, 3, 8])
@pytest.mark.parametrize("geometry", LINES, ids=str)
def test_lines_equal_the_float64_convolution_with_the_decoded_weight(geometry, bits, group_dim):
    conv = nn.Conv1d(4, 8, **{"kernel_size": 3, **geometry})
    layer = rnn.PackedConv1d.from_conv1d(conv, bits=bits, group_size=5, group_dim=group_dim)
    assert layer.dequantize().shape == conv.weight.shape
    conv.weight.data = layer.dequantize()
    x = torch.randn(3, 4, 17)
    with torch.no_grad():
        expected = conv.double()(x.double())
        assert torch.allclose(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.allclose(layer(x.double()), expected)
        assert torch.equal(layer(x[0]), layer(x)[0])
    given = x.clone().requires_grad_()
    wide = x.double().requires_grad_()
    layer(given).square().sum().backward()
    conv(wide).square().sum().backward()
    assert torch.allclose(given.grad.double(), wide.grad, rtol=1e-4, atol=1e-4)


def test_lines_have_the_bits_of_images_of_height_1():
    conv = nn.Conv1d(4, 8, 3, padding=1)
    line = rnn.PackedConv1d.from_conv1d(conv, group_size=6, activations="int8")
    image = rnn.PackedConv2d(4, 8, (1, 3), padding=(0, 1), group_size=6, activations="int8")
    image.adopt(line.qtensor, line.bias)
    x = torch.randn(2, 4, 15)
    assert torch.equal(line(x), image(x[:, :, None])[:, :, 0])


def test_lines_of_other_shapes_are_refused_in_their_own_words():
    layer = rnn.PackedConv1d(4, 8, 3)
    with pytest.raises(
        ValueError, match=r"packed_conv1d: x must have shape \(B, 4, L\) or \(4, L\)"
    ):
        layer(torch.zeros(1, 4, 5, 5))
    box = pyrobust.Interval(torch.zeros(1, 4, 2), torch.ones(1, 4, 2))
    for x in (torch.zeros(1, 4, 2), box):
        with pytest.raises(ValueError, match=r"packed_conv1d: .* got 2 and 3 along axis -1"):
            layer(x)
    with pytest.raises(TypeError, match=r"layer must be .*Conv1d.*; got Conv2d"):
        rnn.PackedConv1d.from_conv1d(nn.Conv2d(4, 8, 3))
    weight = {"codes": layer.codes, "scale": layer.scale, "zero": layer.zero}
    options = {"in_channels": 4, "bits": 4, "group_size": 128}
    for wrong, words in (
        ({"kernel_size": (3, 3)}, "kernel_size must be one integer"),
        ({"kernel_size": 3, "padding": (1, 1)}, "padding must be one integer"),
        ({"kernel_size": 3, "padding": "same", "stride": 2}, "padding 'same' needs stride 1"),
    ):
        with pytest.raises(ValueError, match=f"packed_conv1d: {words}"):
            ops.packed_conv1d(torch.zeros(1, 4, 5), **weight, **options, **wrong)


def test_the_printed_form_of_lines_leaves_out_what_is_usual():
    text = repr(rnn.PackedConv1d(4, 8, 3, padding=2, dilation=(2,), bits=2))
    assert text == (
        "PackedConv1d(4, 8, kernel_size=(3,), padding=(2,), dilation=(2,), bias=True, bits=2, "
        "group_size=128)"
    )


def test_models_of_lines_are_packed_and_come_back_from_a_file(tmp_path):
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
    packed = pyrobust.pack(model, bits=4, group_size=6)
    assert [row.type for row in pyrobust.pack_report(packed).packed] == ["Conv1d", "Linear"]
    pyrobust.save(packed, tmp_path / "model.safetensors")
    loaded = pyrobust.load(tmp_path / "model.safetensors", copy.deepcopy(model))
    x = torch.randn(5, 2, 10)
    assert torch.equal(loaded(x), packed(x))
