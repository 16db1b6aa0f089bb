"""Packed layers whose weights have a remainder, a codebook or two-level scales."""

import copy
import io
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyrobust
from pyrobust import Interval
from pyrobust import nn as rnn
from pyrobust.quantize import round_to_codebook, round_to_nearest, round_to_two_level

QUANTIZERS = {"codebook": round_to_codebook, "two-level": round_to_two_level}


def with_outliers(quantizer):
    def quantize(weight, **options):
        packed = quantizer(weight, **options)
        return packed.with_remainder(weight, weight.abs() > 0.9 * weight.abs().max())

    return quantize


QUANTIZERS["remainder"] = with_outliers(round_to_nearest)
QUANTIZERS["all"] = with_outliers(round_to_codebook)


def network():
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 25, 7)
    )


def packed_network(name, group_dim=1, **options):
    torch.manual_seed(1)
    quantizer = QUANTIZERS[name]
    return pyrobust.pack(
        network(), bits=4, group_size=9, group_dim=group_dim, quantizer=quantizer, **options
    )


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("group_dim", [0, 1])
def test_layers_compute_with_the_dequantized_weight(isa, name, group_dim):
    packed = packed_network(name, group_dim)
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    y = packed(x)
    hidden = F.conv2d(x, packed[0].dequantize(), packed[0].bias, padding=1, groups=2)
    expected = F.linear(hidden.relu().flatten(1), packed[3].dequantize(), packed[3].bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    cotangent = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, x, cotangent)[0] for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_bounds_contain_the_images_of_points(isa, name):
    for activations in (None, "int8"):
        packed = packed_network(name, activations=activations)
        x = torch.rand(2, 4, 5, 5)
        for dtype in (torch.float32, torch.float64):
            box = Interval(x.to(dtype) - 0.02, x.to(dtype) + 0.02, rounding="deployed")
            bounds = packed(box)
            for _ in range(20):
                y = packed(x + 0.02 * (2 * torch.rand_like(x) - 1).sign())
                assert bounds.contains(y.to(dtype)).all()
        if activations is None:  # as tight as the float layers on the decoded weights
            dense = network()
            for i in (0, 3):
                dense[i].weight.data = packed[i].dequantize()
                dense[i].bias.data = packed[i].bias.data
            width = dense(Interval(x - 0.02, x + 0.02)).width()
            assert (packed(Interval(x - 0.02, x + 0.02)).width() <= 1.001 * width).all()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_save_load_copy_and_move(tmp_path, name):
    packed = packed_network(name)
    x = torch.randn(2, 4, 5, 5)
    pyrobust.save(packed, tmp_path / "packed.safetensors")
    with torch.device("meta"):
        blank = network()
    for target in (blank, network(), packed_network(name)):
        loaded = pyrobust.load(tmp_path / "packed.safetensors", target)
        assert torch.equal(loaded(x), packed(x))
        assert loaded[3].layout == packed[3].layout
    moved = copy.deepcopy(packed).to(torch.bfloat16).float()
    assert torch.equal(moved[3].dequantize(), packed[3].dequantize())
    buffer = io.BytesIO()
    torch.save(packed.state_dict(), buffer)
    buffer.seek(0)
    other = packed_network(name)
    for part in other[3]._buffers.values():
        if part is not None:
            part.zero_()
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(x), packed(x))


def test_another_layout_is_refused(tmp_path):
    packed = packed_network("two-level")
    plain = pyrobust.pack(network(), bits=4, group_size=9)
    with pytest.raises(RuntimeError, match=r"another format|packed with"):
        plain.load_state_dict(packed.state_dict())
    pyrobust.save(packed, tmp_path / "packed.safetensors")
    with pytest.raises(ValueError, match="layout"):
        pyrobust.load(tmp_path / "packed.safetensors", plain)
    kept = packed_network("remainder")[3].qtensor
    with pytest.raises(ValueError, match="layout"):
        plain[3].adopt(kept)


@pytest.mark.parametrize("name", ["nf4", "two-level"])
def test_pack_takes_the_names(name):
    packed = pyrobust.pack(network(), bits=4, quantizer=name)
    assert packed[3].layout.codebook == (name == "nf4")
    assert packed[3].layout.two_level == (name == "two-level")
    assert name.replace("nf4", "codebook").replace("-", "_") in repr(packed)
    report = pyrobust.pack_report(packed)
    assert all(row.error < 0.15 for row in report.layers)


@pytest.mark.parametrize("quantizer", QUANTIZERS.values())
@pytest.mark.parametrize("group_dim", [0, 1])
def test_embedding_gathers_rows(isa, quantizer, group_dim):
    weight = torch.randn(13, 20)
    qtensor = quantizer(weight, bits=4, group_size=8, group_dim=group_dim)
    table = rnn.PackedEmbedding.from_qtensor(qtensor)
    indices = torch.tensor([[3, 12], [0, 3]])
    assert torch.equal(table(indices), qtensor.dequantize()[indices])
    with pytest.raises(IndexError, match=r"\[0, 13\)"):
        table(torch.tensor([13]))


def test_linear_from_qtensor_reports_its_bytes():
    qtensor = QUANTIZERS["all"](torch.randn(8, 64), bits=4, group_size=16)
    layer = rnn.PackedLinear.from_qtensor(qtensor, torch.zeros(8), activations="int8")
    assert layer.nbytes_packed == qtensor.nbytes
    assert qtensor.nbytes == 8 * 32 + 2 * 32 + 16 + qtensor.remainder.nbytes
    again = layer.qtensor
    assert torch.equal(again.dequantize(), qtensor.dequantize())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64)
    assert torch.equal(compiled(x), layer(x))


def test_damaged_files_are_refused_or_unchanged(tmp_path):
    packed, path = packed_network("all"), tmp_path / "packed.safetensors"
    pyrobust.save(packed, path)
    whole = path.read_bytes()
    generator = random.Random(0)
    x = torch.randn(2, 4, 5, 5)
    expected, refused = packed(x), 0
    for i in range(60):
        damaged = bytearray(whole)
        if i % 3 == 0:
            damaged = damaged[: generator.randrange(len(whole))]
        else:
            for _ in range(generator.choice((1, 8))):
                damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = pyrobust.load(path, network())
        except ValueError:
            refused += 1
        else:
            assert torch.equal(loaded(x), expected)
    assert refused > 40
