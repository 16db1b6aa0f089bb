"""pyrobust.pack: what is converted, what is left and why, and that the float model is untouched."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust import nn as rnn
from pyrobust.quantize import round_to_nearest


class Tied(nn.Module):
    """A language model in miniature: the table of the input is the matrix of the output."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.body = nn.Linear(16, 16)
        self.again = self.body  # used twice
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, indices):
        return self.head(self.again(self.body(self.table(indices))))


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    ).eval()


def state_copy(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before, types):
    assert [type(module) for module in model.modules()] == types
    for name, tensor in model.state_dict().items():
        assert (
            torch.equal(
                tensor,
                before[name],
            )
            or torch.isnan(before[name]).any()
        )


@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 8])
def test_the_packed_model_computes_with_the_decoded_weights(bits):
    model = convolutional()
    packed = pyrobust.pack(model, bits=bits, group_size=9)
    assert isinstance(packed[0], rnn.PackedConv2d)
    assert isinstance(packed[4], rnn.PackedLinear)
    reference = copy.deepcopy(model)
    reference[0].weight.data = packed[0].dequantize()
    reference[4].weight.data = packed[4].dequantize()
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(packed(x), reference(x), atol=1e-5)


def test_a_copy_leaves_the_float_model_and_inplace_converts_it():
    model = convolutional()
    before, types = state_copy(model), [type(module) for module in model.modules()]
    packed = pyrobust.pack(model)
    assert_untouched(model, before, types)
    assert packed[1].running_mean.data_ptr() != model[1].running_mean.data_ptr()
    same = pyrobust.pack(model, inplace=True)
    assert same is model
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(packed(x), model(x))
    assert not packed.training
    assert not packed[0].training


def test_shared_weights_are_packed_once_and_stay_shared():
    calls = []

    def counting(weight, **options):
        calls.append(weight.shape)
        return round_to_nearest(weight, **options)

    model = Tied()
    packed = pyrobust.pack(model, bits=4, group_size=8, quantizer=counting)
    assert calls == [(20, 16), (16, 16)]
    assert packed.body is packed.again
    for other in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert other.table.codes is other.head.codes
        assert other.to(torch.bfloat16).table.scale is other.head.scale
    row = {row.name: row for row in pyrobust.pack_report(packed).layers}["head"]
    assert row.shared_with == "table"
    assert (row.bytes_before, row.bytes_after) == (0, 0)
    indices = torch.tensor([[1, 2]])
    weight = packed.table.dequantize()
    expected = packed.float().body(packed.body(weight[indices])) @ weight.T
    assert torch.allclose(packed(indices), expected, atol=1e-5)


def test_weights_that_share_memory_without_being_one_parameter_are_shared_too():
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    model[1].weight.data = model[0].weight.data
    packed = pyrobust.pack(model)
    assert packed[0].codes is packed[1].codes


def test_the_report_tells_bits_bytes_and_error():
    model = convolutional()
    packed = pyrobust.pack(model, bits=8, group_size=16)
    report = pyrobust.pack_report(packed)
    rows = {row.name: row for row in report.layers}
    assert list(rows) == ["0", "4"]
    change = (packed[4].dequantize() - model[4].weight).norm() / model[4].weight.norm()
    assert rows["4"].error == pytest.approx(change.item(), rel=1e-5)
    assert rows["4"].bytes_before == 4 * 1440
    assert rows["4"].bytes_after == packed[4].nbytes_packed == 1440 + 90 * 3
    tensors = (*packed.parameters(), *packed.buffers())
    assert report.bytes_after == sum(t.numel() * t.element_size() for t in tensors)
    assert json.loads(json.dumps(report.to_dict()))["layers"][1]["bits"] == 8
    assert "2 packed, 0 skipped" in report.summary()
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), torch.compile(packed)):
        assert pyrobust.pack_report(other) == report
    with pytest.raises(ValueError, match=r"a result of pyrobust\.pack"):
        pyrobust.pack_report(model)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def reasons(model, **options):
    report = pyrobust.pack_report(pyrobust.pack(model, **options))
    return {row.name: row.skipped for row in report.layers}


def test_layers_that_packing_would_change_are_skipped_with_the_reason():
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "subclass": Scaled(4, 4),
            "lazy": nn.LazyLinear(4),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "hooked": hooked,
            "patched": patched,
            "conv3d": nn.Conv3d(4, 4, 1),
            "transposed": nn.ConvTranspose1d(4, 4, 1),
            "attention": nn.MultiheadAttention(4, 2),
            "table": nn.Embedding(3, 4, max_norm=1.0),
            "complex": nn.Linear(4, 4, dtype=torch.cfloat),
            "norm": nn.LayerNorm(4),
        }
    )
    why = reasons(model)
    assert why.pop("plain") is None
    assert why["subclass"] == "Scaled is not exactly Linear"
    assert why["lazy"] == "LazyLinear is not exactly Linear"
    assert why["normed"] == "ParametrizedLinear is not exactly Linear"
    assert "hooks" in why["hooked"]
    assert "replaced" in why["patched"]
    assert why["conv3d"] == "no packed twin of Conv3d"
    assert why["transposed"] == "no packed twin of ConvTranspose1d"
    assert "raw weight" in why["attention"]
    assert "MultiheadAttention" in why["attention.out_proj"]
    assert "max_norm" in why["table"]
    assert "complex64" in why["complex"]
    assert "norm" not in why
    assert all(why.values())


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_layers_with_hooks_of_any_kind_are_skipped(register):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    getattr(model[0], register)(lambda *_: None)
    why = reasons(model)
    assert "hooks" in why["0"]
    assert why["1"] is None


def test_transformer_layers_of_torch_use_their_packed_layers_in_evaluation():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    packed = pyrobust.pack(model, bits=8, group_size=16, activations="int8")
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    calls = []
    for part in packed.layers:
        part.linear1.forward = counted(part.linear1.forward, calls)
    with torch.inference_mode():
        out = packed(x, src_key_padding_mask=padding)
    assert len(calls) == 2
    assert torch.allclose(out, model(x), atol=0.1)


def counted(function, calls):
    def call(*args):
        calls.append(1)
        return function(*args)

    return call


def test_skip_and_bits_for_choose_layers_by_name_and_pattern():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    assert reasons(model, skip=["1"]) == {"0": None, "1.0": "named in skip", "1.1": "named in skip"}
    assert reasons(model, skip="1.*")["1.0"] == "named in skip"
    mapped = pyrobust.pack(model, bits=4, bits_for={"1.1": 8, "1": None})
    assert (mapped[0].bits, mapped[1][1].bits) == (4, 8)
    assert isinstance(mapped[1][0], nn.Linear)
    called = pyrobust.pack(model, bits_for=lambda name, module: 2 if name == "0" else None)
    assert called[0].bits == 2
    assert isinstance(called[1][0], nn.Linear)


def test_names_with_brackets_are_names_as_well_as_patterns():
    model = nn.ModuleDict({"x[0]": nn.Sequential(nn.Linear(3, 3)), "y": nn.Linear(3, 3)})
    rows = pyrobust.pack_report(pyrobust.pack(model, skip="x[0]")).layers
    assert {row.name: row.skipped for row in rows} == {"x[0].0": "named in skip", "y": None}
    packed = pyrobust.pack(model, bits_for={"x[[]0]": 2})
    assert packed["x[0]"][0].bits == 2


def test_options_reach_the_layers():
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 4))
    options = {"bits": 3, "group_size": 4, "group_dim": 0, "symmetric": True}
    packed = pyrobust.pack(model, activations="int8", **options)
    for layer in packed:
        assert {name: getattr(layer, name) for name in options} == options
    assert packed[0].activations is None
    assert packed[1].activations == "int8"


def test_half_precision_models_keep_their_dtype():
    packed = pyrobust.pack(nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 4)).bfloat16())
    assert packed(torch.tensor([1])).dtype == torch.bfloat16


def test_a_single_layer_becomes_its_twin():
    assert isinstance(pyrobust.pack(nn.Linear(8, 4)), rnn.PackedLinear)
    with pytest.raises(ValueError, match="inplace must be False for a single layer"):
        pyrobust.pack(nn.Linear(8, 4), inplace=True)


def test_a_calibrated_quantizer_sees_all_layers_at_once():
    class Calibrated:
        def quantize_layers(self, model, layers, formats, calibration):
            assert calibration == "data"
            return {
                name: round_to_nearest(layer.weight.flatten(1), **formats[name])
                for name, layer in layers.items()
            }

    model = convolutional()
    packed = pyrobust.pack(model, bits=3, quantizer=Calibrated(), calibration="data")
    assert torch.equal(packed[4].codes, pyrobust.pack(model, bits=3, quantizer="rtn")[4].codes)
    with pytest.raises(ValueError, match="calibration must be None; round_to_nearest uses no"):
        pyrobust.pack(model, calibration="data")


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"bits": 5}, ValueError, "pack: bits must be one of 1, 1.58, 2, 3, 4, 8; got 5"),
        ({"group_size": 0}, ValueError, "pack: group_size must be at least 1; got 0"),
        ({"group_dim": 2}, ValueError, "pack: group_dim must be one of 0, 1; got 2"),
        ({"symmetric": "yes"}, ValueError, "pack: symmetric must be one of False, True; got 'yes'"),
        ({"skip": [0]}, TypeError, "pack: skip must hold names or patterns; got int 0"),
        ({"bits_for": ["0"]}, TypeError, "bits_for must be a function .* or a mapping.*; got list"),
        ({"activations": "int4"}, ValueError, "pack: activations must be one of None, int8"),
        ({"skip": ["heda"]}, ValueError, "pack: skip must name modules of the model; got 'heda'"),
        ({"bits_for": {"x": 2}}, ValueError, "pack: bits_for must name modules"),
        ({"bits_for": {"0": 7}}, ValueError, "bits_for, '0': bits must be one of .*; got 7"),
        ({"quantizer": "magic"}, ValueError, "pack: quantizer must be one of .*rtn.*; got 'magic'"),
        ({"quantizer": lambda w, **_: w}, TypeError, "result of quantizer must be a .*QTensor"),
        ({"skip": ["0", "4"]}, ValueError, "must have a Linear.*0: named in skip; 4: named in"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_bad_options_give_one_clear_error_and_change_nothing(options, error, sentence, inplace):
    model = convolutional()
    before, types = state_copy(model), [type(module) for module in model.modules()]
    with pytest.raises(error, match=sentence):
        pyrobust.pack(model, inplace=inplace, **options)
    assert_untouched(model, before, types)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    model = convolutional()
    model[4].weight.data[0, 0] = value
    with pytest.raises(ValueError, match="the weight of '4' must be finite"):
        pyrobust.pack(model, inplace=True)
    assert isinstance(model[0], nn.Conv2d)


def test_models_that_cannot_be_packed_are_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got dict"):
        pyrobust.pack({})
    with pytest.raises(ValueError, match="no layer with a weight"):
        pyrobust.pack(nn.ReLU())
    with pytest.raises(ValueError, match="0: already packed; 4: already packed"):
        pyrobust.pack(pyrobust.pack(convolutional()))
    with pytest.raises(ValueError, match="must not be compiled or scripted, but it is"):
        pyrobust.pack(torch.compile(convolutional()))
    with pytest.raises(ValueError, match="the weight of '0' must hold data"):
        pyrobust.pack(convolutional().to("meta"))


def test_float64_models_stay_float64_and_compute():
    model, x = convolutional().double(), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    packed = pyrobust.pack(model, bits=8)
    reference = copy.deepcopy(model)
    for i in (0, 4):
        reference[i].weight.data = packed[i].dequantize().double()
    torch.testing.assert_close(packed(x), reference(x), rtol=1e-12, atol=1e-12)
    model[4].weight.data[3, 5] = 1e39
    with pytest.raises(ValueError, match="the weight of '4', in float32, must be finite"):
        pyrobust.pack(model, inplace=True)
    assert isinstance(model[0], nn.Conv2d)


def test_models_wrapped_for_data_parallelism_are_refused(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    where = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(convolutional())
        with pytest.raises(ValueError, match="wrapped in DistributedDataParallel; pack the module"):
            pyrobust.pack(wrapped)
        x = torch.randn(2, 1, 8, 8)
        packed = pyrobust.pack(wrapped.module)
        assert torch.equal(nn.parallel.DistributedDataParallel(packed)(x), packed(x))
    finally:
        distributed.destroy_process_group()


def test_layers_that_share_a_weight_cannot_have_different_bits():
    with pytest.raises(ValueError, match="got 4 for 'table' and 8 for 'head'"):
        pyrobust.pack(Tied(), bits_for={"head": 8})
