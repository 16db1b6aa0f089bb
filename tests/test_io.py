"""pyrobust.save and load: the same model comes back, and nothing else is accepted."""

import json
import os
import random
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import pyrobust
from pyrobust import _safetensors


class Mixed(nn.Module):
    """Every kind of thing that a file may hold: packed layers, ties, norms, buffers, float rest."""

    def __init__(self, tied=True, width=16):
        super().__init__()
        self.table = nn.Embedding(20, width, padding_idx=0)
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1, groups=1)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Linear(4 * 9, width)
        self.again = nn.Linear(width, width)
        self.twice = self.again
        self.mix = nn.Conv1d(1, 1, 3, padding=1)
        self.head = nn.Linear(width, 20, bias=False)
        if tied:
            self.head.weight = self.table.weight
        self.register_buffer("offset", torch.randn(width))

    def forward(self, images, words):
        hidden = self.body(self.norm(self.conv(images)).flatten(1)) + self.table(words)
        hidden = self.mix(self.twice(self.again(hidden))[:, None])[:, 0]
        return self.head(hidden + self.offset)


INPUTS = (torch.randn(3, 1, 5, 6), torch.tensor([0, 5, 19]))


def trained(**options) -> nn.Module:
    model = Mixed(**options)
    model(*INPUTS)  # moves the statistics of the norm
    return model.eval()


def packed_model(**options) -> nn.Module:
    return pyrobust.pack(trained(), bits=3, group_size=8, **options)


def assert_same(first, second):
    assert torch.equal(first(*INPUTS), second(*INPUTS))
    state, other = first.state_dict(), second.state_dict()
    assert list(state) == list(other)
    for name in state:
        assert torch.equal(state[name], other[name]), name
        assert state[name].dtype == other[name].dtype, name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    "options", [{}, {"group_dim": 0, "symmetric": True, "activations": "int8"}]
)
def test_a_float_architecture_becomes_the_saved_model(path, options):
    packed = packed_model(**options)
    pyrobust.save(packed, path)
    model = Mixed().eval()
    assert pyrobust.load(path, model) is model
    assert_same(packed, model)
    assert model.head.codes is model.table.codes
    assert model.twice is model.again


def test_a_meta_architecture_is_filled(path):
    packed = packed_model()
    pyrobust.save(packed, path)
    with torch.device("meta"):
        model = Mixed().eval()
    assert_same(packed, pyrobust.load(path, model))
    assert model.head.codes is model.table.codes


def test_a_packed_model_is_filled(path):
    packed = packed_model()
    pyrobust.save(packed, path)
    other = pyrobust.pack(Mixed().eval(), bits=3, group_size=8)
    norm = other.norm.weight
    assert_same(packed, pyrobust.load(path, other))
    assert other.norm.weight is norm
    assert other.head.codes is other.table.codes


def test_ties_of_the_file_are_restored_in_an_architecture_without_them(path):
    pyrobust.save(packed_model(), path)
    model = pyrobust.load(path, Mixed(tied=False).eval())
    assert model.head.codes is model.table.codes
    pyrobust.save(trained(), path)
    model = pyrobust.load(path, Mixed(tied=False).eval())
    assert model.head.weight is model.table.weight


def test_a_model_that_shares_what_the_file_does_not_is_refused(path):
    pyrobust.save(trained(tied=False), path)
    with pytest.raises(ValueError, match="the model shares them"):
        pyrobust.load(path, Mixed())


def test_a_float_model_and_a_state_dict_can_be_saved(path):
    model = trained()
    pyrobust.save(model, path)
    assert_same(model, pyrobust.load(path, Mixed().eval()))
    packed = packed_model()
    pyrobust.save(packed.state_dict(), path)
    assert_same(packed, pyrobust.load(path, Mixed().eval()))


def test_half_precision_models_and_tiny_scales_come_back(path):
    model = trained().bfloat16()
    model.body.weight.data *= 1e-9
    packed = pyrobust.pack(model)
    assert packed.body.scale.dtype == torch.float32
    pyrobust.save(packed, path)
    loaded = pyrobust.load(path, Mixed().bfloat16())
    assert loaded.body.scale.dtype == torch.float32
    assert torch.equal(loaded.body.dequantize(), packed.body.dequantize())
    assert loaded.table.dtype == loaded.body.bias.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"BF16 of shape .* the model has F32"):
        pyrobust.load(path, Mixed())


def test_a_single_layer_becomes_its_twin(path):
    layer = pyrobust.pack(nn.Linear(8, 4))
    pyrobust.save(layer, path)
    loaded = pyrobust.load(path, nn.Linear(8, 4))
    assert torch.equal(loaded.dequantize(), layer.dequantize())


def test_the_file_is_ordinary_safetensors_with_every_tensor_once(path):
    packed = packed_model()
    pyrobust.save(packed, path)
    tensors = load_file(path)
    assert "head.codes" not in tensors
    for name, tensor in tensors.items():
        assert torch.equal(tensor, packed.state_dict()[name])
    body = packed.body
    body.load_state_dict({k[5:]: v for k, v in tensors.items() if k.startswith("body.")})


def test_layers_with_fused_paths_call_their_packed_layers_after_loading(path):
    def make():
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        return nn.TransformerEncoder(layer, 1).eval()

    pyrobust.save(pyrobust.pack(make()), path)
    loaded = pyrobust.load(path, make())
    assert not loaded.layers[0].activation_relu_or_gelu
    assert not loaded.use_nested_tensor


def test_a_failed_write_leaves_the_old_file_and_no_draft(path, monkeypatch):
    pyrobust.save(trained(), path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        pyrobust.save(packed_model(), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Mixed(width=12), "weight_shape"),
        (lambda: nn.Sequential(Mixed()), "no such layer"),
        (lambda: nn.ModuleDict({"table": nn.Linear(16, 20)}), "PackedEmbedding 'table'.* a Linear"),
        (lambda: pyrobust.pack(Mixed(), bits=4, group_size=8), r"bits 3 \(model: 4\)"),
        (lambda: pyrobust.pack(Mixed(), bits=3, group_size=4), r"group_size 8 \(model: 4\)"),
        (lambda: with_extra(Mixed()), "same architecture as the model; it lacks extra.bias"),
        (lambda: without_offset(Mixed()), "it also has offset"),
        (lambda: other_buffer(Mixed()), r"'offset' as F32 of shape \(16,\)"),
    ],
)
def test_other_architectures_are_refused_and_left_as_they_were(path, make, sentence):
    pyrobust.save(packed_model(), path)
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=sentence):
        pyrobust.load(path, model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def with_extra(model):
    model.extra = nn.LayerNorm(4)
    return model


def without_offset(model):
    del model.offset
    return model


def other_buffer(model):
    model.offset = torch.zeros(15)
    return model


def test_a_packed_layer_that_the_file_does_not_hold_is_refused(path):
    pyrobust.save(trained(), path)
    with pytest.raises(ValueError, match="does not hold the packed layer 'table'"):
        pyrobust.load(path, packed_model())


@pytest.mark.parametrize("length", [0, 5, 100, 3000, -1])
def test_truncated_files_are_refused(path, length):
    pyrobust.save(packed_model(), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="truncated, damaged or foreign"):
        pyrobust.load(path, Mixed())


@pytest.mark.parametrize(
    "flips", [150, pytest.param(5000, marks=pytest.mark.slow, id="many flips")]
)
def test_a_flipped_bit_is_noticed_or_changes_nothing(path, flips):
    packed = packed_model()
    pyrobust.save(packed, path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    refused = 0
    model = Mixed().eval()
    for flip in range(flips):
        place = draw.randrange(header) if flip % 4 else draw.randrange(header, len(whole))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            pyrobust.load(path, model)
        except ValueError as error:
            assert str(error).startswith("load: ")  # noqa: PT017
            assert isinstance(model.conv, nn.Conv2d)
            refused += 1
        else:  # a bit that means nothing, as in the name of the framework
            assert_same(packed, model)
            model = Mixed().eval()
    assert refused > 0.9 * flips


@pytest.mark.parametrize("cuts", [100, pytest.param(3000, marks=pytest.mark.slow, id="many cuts")])
def test_files_cut_anywhere_are_refused(path, cuts):
    pyrobust.save(packed_model(), path)
    whole, draw, model = path.read_bytes(), random.Random(1), Mixed().eval()
    for _ in range(cuts):
        path.write_bytes(whole[: draw.randrange(len(whole))])
        with pytest.raises(ValueError, match=r"^load: .*truncated, damaged or foreign"):
            pyrobust.load(path, model)
    assert isinstance(model.conv, nn.Conv2d)


HUGE = [2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -1, -(2**63), 0]


def numbers_of(tree, place=()):
    """The places of all integers in lists and dictionaries."""
    branches = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in branches:
        if isinstance(value, dict | list):
            yield from numbers_of(value, (*place, key))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield (*place, key)


def with_number(tree, place, number):
    copy = json.loads(json.dumps(tree))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = number
    return copy


@pytest.mark.parametrize(
    "rounds", [200, pytest.param(3000, marks=pytest.mark.slow, id="many numbers")]
)
def test_huge_numbers_in_the_header_and_the_description_are_refused(path, rounds):
    packed = packed_model()
    pyrobust.save(packed, path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    description = json.loads(header["__metadata__"]["pyrobust"])
    sums = next(key for key in header["__metadata__"] if key not in ("format", "pyrobust"))
    places = [list(numbers_of(tree)) for tree in (header, description)]
    draw = random.Random(2)
    for turn in range(rounds):
        place, number = draw.choice(places[turn % 2]), draw.choice(HUGE)
        changed = header
        if turn % 2 == 0:
            changed = with_number(header, place, number)
        else:  # with a checksum that fits, so that the number itself is met
            text = json.dumps(with_number(description, place, number))
            entries = {"pyrobust": text, sums: str(zlib.crc32(text.encode()))}
            changed = header | {"__metadata__": header["__metadata__"] | entries}
        if changed == header:
            continue
        encoded = json.dumps(changed).encode()
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
        model = Mixed().eval()
        with pytest.raises(ValueError, match=r"^load: "):
            pyrobust.load(path, model)
        assert isinstance(model.conv, nn.Conv2d), place
    for size in (2**31, 2**40, 2**63, 2**64 - 1):  # of the header itself
        path.write_bytes(size.to_bytes(8, "little") + whole[8:])
        with pytest.raises(ValueError, match=r"^load: "):
            pyrobust.load(path, Mixed().eval())


def test_a_layer_described_in_two_ways_is_refused(path):
    """A loaded model may round activations or not as it likes; a file must say one thing."""
    pyrobust.save(packed_model(), path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    entries = header["__metadata__"]
    description = json.loads(entries["pyrobust"])
    description["layers"]["conv"]["activations"] = "int8"
    entries["pyrobust"] = json.dumps(description)
    sums = next(key for key in entries if key not in ("format", "pyrobust"))
    entries[sums] = str(zlib.crc32(entries["pyrobust"].encode()))
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    with pytest.raises(ValueError, match="layer 'conv' is described in two ways"):
        pyrobust.load(path, Mixed().eval())


def test_foreign_files_are_refused(path, tmp_path):
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="it is a foreign one"):
        pyrobust.load(path, Mixed())
    path.write_bytes(b"PK\x03\x04" + bytes(500))
    with pytest.raises(ValueError, match="foreign"):
        pyrobust.load(path, Mixed())
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match="path must be a file"):
            pyrobust.load(missing, Mixed())


def test_files_of_a_newer_version_are_refused(path, monkeypatch):
    monkeypatch.setattr(pyrobust.io, "FORMAT_VERSION", 2)
    pyrobust.save(trained(), path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"format version 1 to 1; got 2 .a newer pyrobust"):
        pyrobust.load(path, Mixed())


def test_what_cannot_be_saved_is_refused(path):
    with pytest.raises(TypeError, match="'a' must be a tensor of an ordinary dtype; got list"):
        pyrobust.save({"a": [1]}, path)
    with pytest.raises(TypeError, match=r"got torch.complex64"):
        pyrobust.save({"a": torch.zeros(1, dtype=torch.cfloat)}, path)
    with pytest.raises(ValueError, match="'weight' must hold dense data; it is on the meta"):
        pyrobust.save(nn.Linear(2, 2, device="meta"), path)
    with pytest.raises(TypeError, match=r"must be a .*Mapping; got int"):
        pyrobust.save(3, path)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        pyrobust.load(path, {})
    assert not path.exists()


def test_the_description_in_the_file_is_readable_json(path):
    pyrobust.save(packed_model(), path)
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["pyrobust"])
    assert description["version"] == 1
    assert description["layers"]["conv"] == {
        "type": "PackedConv2d",
        "bits": 3,
        "group_size": 8,
        "group_dim": 1,
        "symmetric": False,
        "activations": None,
        "weight_shape": [4, 1, 3, 3],
    }
    assert description["tied"]["head.codes"] == "table.codes"


def test_scalars_and_empty_tensors_are_written(path):
    state = {"empty": torch.zeros(0, 3), "nothing": torch.zeros(0), "one": torch.tensor(3)}
    pyrobust.save(state, path)
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, state[name])
    assert set(_safetensors.DTYPES) >= {tensor.dtype for tensor in state.values()}
