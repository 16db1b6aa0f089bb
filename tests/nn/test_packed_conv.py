"""PackedConv2d against torch's convolution in float64 on the decoded weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyrobust import nn as rnn

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
