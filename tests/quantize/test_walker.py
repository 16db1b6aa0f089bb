"""The block-wise walk: every layer sees the inputs that the model as quantized so far gives it."""

import copy
import os
import signal
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust.quantize import (
    HessianAccumulator,
    quantize_by_layer,
    round_to_codebook,
    round_to_nearest,
)

from .small_models import BlockNet, ConvNet


@dataclass
class Recorder:
    """Rounds to nearest, and keeps the Hessians it was given."""

    propagate: str = "quantized"
    float_stream: bool = False
    _hessians: dict = field(default_factory=dict, repr=False)
    _blocks: list = field(default_factory=list, repr=False)
    _fail_at: int = -1

    def quantize_block(self, block):
        if block.index == self._fail_at:
            raise KeyboardInterrupt
        self._blocks.append((block.name, block.groups(), len(block.calls)))

        def one(name, hessian):
            self._hessians[name] = hessian
            return round_to_nearest(block.weight(name), **block.formats[name])

        quantize_by_layer(block, one)


def by_hand(model, batches, bits, *, order, propagate):
    """Hessians of the layers, each measured by running the whole model anew."""
    model = copy.deepcopy(model)
    layers = dict(model.named_modules())
    hessians, later = {}, {}
    for name in order:
        accumulator = HessianAccumulator.of(layers[name])
        handle = layers[name].register_forward_pre_hook(
            lambda layer, args, to=accumulator: to.add_inputs(layer, args[0])
        )
        with torch.no_grad():
            for batch in batches:
                model(batch)
        handle.remove()
        hessians[name] = accumulator.hessian()
        weight = layers[name].weight.detach().flatten(1)
        packed = round_to_nearest(weight, bits=bits, group_size=8).dequantize()
        if propagate == "quantized":
            layers[name].weight.data = packed.reshape(layers[name].weight.shape)
        else:
            later[name] = packed
    return hessians


def order_of(model):
    if isinstance(model, ConvNet):
        return ["first", "second", "third", "head"]
    if isinstance(model, nn.Sequential):
        return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    inner = [f"blocks.{i}.{n}" for i in range(3) for n in ("gate", "up", "down")]
    return ["stem", *inner, "head"]


def models():
    mlp = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    return {"blocks": BlockNet(), "mlp": mlp, "cnn": ConvNet()}


def batches_for(model):
    shape = (5, 1, 8, 8) if isinstance(model, ConvNet) else (7, 6)
    return [torch.randn(shape) for _ in range(3)]


@pytest.mark.parametrize("kind", ["blocks", "mlp", "cnn"])
def test_each_layer_sees_the_inputs_of_the_model_quantized_so_far(kind):
    model = models()[kind].eval()
    batches = batches_for(model)
    before = copy.deepcopy(model.state_dict())
    recorder = Recorder()
    packed = pyrobust.pack(
        model, bits=3, group_size=8, quantizer=recorder, calibration=[(b, None) for b in batches]
    )
    expected = by_hand(model, batches, 3, order=order_of(model), propagate="quantized")
    assert list(recorder._hessians) == order_of(model)
    for name, hessian in expected.items():
        if name.endswith("up"):  # shares the input of gate, which is measured first
            hessian = expected[name.replace("up", "gate")]
        torch.testing.assert_close(recorder._hessians[name], hessian, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    plain = pyrobust.pack(model, bits=3, group_size=8)
    for (name, one), other in zip(
        packed.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_blocks_are_found_and_layers_with_one_input_share_it():
    model = BlockNet().eval()
    recorder = Recorder()
    pyrobust.pack(model, bits=3, group_size=8, quantizer=recorder, calibration=batches_for(model))
    names = [name for name, _, _ in recorder._blocks]
    assert names == ["stem", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert recorder._blocks[1][1] == [("blocks.0.gate", "blocks.0.up"), ("blocks.0.down",)]
    assert recorder._blocks[1][2] == 3


def test_only_one_block_has_its_float_weights_twice():
    model = BlockNet().eval()
    home = {name: p.data_ptr() for name, p in model.named_parameters()}
    moved = []

    class Watching(Recorder):
        def quantize_block(self, block):
            super().quantize_block(block)
            away = [n for n, p in model.named_parameters() if p.data_ptr() != home[n]]
            moved.append({name.rpartition(".")[0] for name in away})

    pyrobust.pack(model, bits=3, group_size=8, quantizer=Watching(), calibration=batches_for(model))
    inside = [{f"blocks.{i}.{n}" for n in ("gate", "up", "down")} for i in range(3)]
    assert moved == [{"stem"}, *[{"stem", *names} for names in inside], {"stem", "head"}]


def test_float_propagation_gives_every_block_the_float_inputs():
    model = BlockNet().eval()
    batches = batches_for(model)
    recorder = Recorder(propagate="float")
    pyrobust.pack(model, bits=2, group_size=8, quantizer=recorder, calibration=batches)
    expected = by_hand(model, batches, 2, order=order_of(model), propagate="float")
    for name in ["stem", "blocks.2.gate", "head"]:
        torch.testing.assert_close(recorder._hessians[name], expected[name], atol=1e-5, rtol=1e-4)


def test_both_streams_are_offered_side_by_side():
    model = BlockNet().eval()
    batches = batches_for(model)
    outputs = {}

    @dataclass
    class Both(Recorder):
        float_stream: bool = True

        def quantize_block(self, block):
            super().quantize_block(block)
            for stream in ("calls", "float"):
                outputs[block.name, stream] = list(block.outputs(stream=stream))

    packed = pyrobust.pack(model, bits=2, group_size=8, quantizer=Both(), calibration=batches)
    with torch.no_grad():
        for i, batch in enumerate(batches):
            torch.testing.assert_close(outputs["head", "float"][i], model(batch))
            torch.testing.assert_close(outputs["head", "calls"][i], packed(batch))


def test_report_tells_bits_direction_errors_and_bytes():
    model = BlockNet().eval()
    packed = pyrobust.pack(
        model, bits=2, group_size=8, quantizer=Recorder(), calibration=batches_for(model)
    )
    for row in pyrobust.pack_report(packed).packed:
        assert (row.bits, row.group_dim) == (2, 1)
        assert 0 < row.output_error == row.output_error_nearest
        assert row.bytes_after == packed.get_submodule(row.name).nbytes_packed
    assert "output error" in pyrobust.pack_report(packed).summary()


@pytest.mark.parametrize("kind", ["blocks", "mlp", "cnn"])
def test_an_interrupted_conversion_leaves_the_model_and_resumes_to_the_same_bits(kind, tmp_path):
    model = models()[kind].eval()
    batches = batches_for(model)
    before = copy.deepcopy(model.state_dict())
    options = {"bits": 2, "group_size": 8, "calibration": batches}
    whole = pyrobust.pack(model, quantizer=Recorder(), **options)
    last = {"blocks": 3, "mlp": 2, "cnn": 0}[kind]
    with pytest.raises(KeyboardInterrupt):
        pyrobust.pack(model, quantizer=Recorder(_fail_at=last), resume=tmp_path, **options)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    again = Recorder()
    resumed = pyrobust.pack(model, quantizer=again, resume=tmp_path, **options)
    finished = len(list(tmp_path.glob("block-*.safetensors")))
    assert len(again._blocks) < finished or last == 0
    for (name, one), other in zip(
        whole.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert pyrobust.pack_report(whole) == pyrobust.pack_report(resumed)


@dataclass
class KeepsOutliers:
    """A codebook, a remainder, and then a crash."""

    propagate: str = "quantized"
    float_stream: bool = False
    _fail_at: int = -1

    def quantize_block(self, block):
        if block.index == self._fail_at:
            raise KeyboardInterrupt

        def one(name, hessian):
            weight = block.weight(name)
            packed = round_to_codebook(weight, **block.formats[name])
            return packed.with_remainder(weight, weight.abs() > 0.8 * weight.abs().max())

        quantize_by_layer(block, one)


def test_all_parts_of_a_weight_are_resumed(tmp_path):
    model = models()["blocks"].eval()
    options = {"bits": 4, "group_size": 8, "calibration": batches_for(model)}
    whole = pyrobust.pack(model, quantizer=KeepsOutliers(), **options)
    with pytest.raises(KeyboardInterrupt):
        pyrobust.pack(model, quantizer=KeepsOutliers(_fail_at=3), resume=tmp_path, **options)
    again = pyrobust.pack(model, quantizer=KeepsOutliers(), resume=tmp_path, **options)
    for (name, one), other in zip(
        whole.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert any("remainder_values" in name for name in whole.state_dict())


def test_a_killed_process_resumes_to_the_same_file(tmp_path):
    model = BlockNet().eval()
    options = {"bits": 2, "group_size": 8, "calibration": batches_for(model)}

    class Killed(Recorder):
        def quantize_block(self, block):
            if block.index == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            super().quantize_block(block)

    Killed.__module__, Killed.__qualname__ = Recorder.__module__, Recorder.__qualname__
    child = os.fork()
    if child == 0:
        pyrobust.pack(model, quantizer=Killed(), resume=tmp_path / "folder", **options)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(list((tmp_path / "folder").glob("block-*.safetensors"))) == 2
    resumed = Recorder()
    pyrobust.save(
        pyrobust.pack(model, quantizer=resumed, resume=tmp_path / "folder", **options),
        tmp_path / "resumed",
    )
    assert [name for name, _, _ in resumed._blocks] == ["blocks.1", "blocks.2", "head"]
    pyrobust.save(pyrobust.pack(model, quantizer=Recorder(), **options), tmp_path / "whole")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_another_conversion_is_not_resumed(tmp_path):
    model = BlockNet().eval()
    batches = batches_for(model)
    options = {"quantizer": Recorder(), "resume": tmp_path, "group_size": 8}
    pyrobust.pack(model, bits=2, calibration=batches, **options)
    with pytest.raises(ValueError, match="differs in formats"):
        pyrobust.pack(model, bits=3, calibration=batches, **options)
    with pytest.raises(ValueError, match="differs in calibration"):
        pyrobust.pack(model, bits=2, calibration=batches[:1], **options)
    with pytest.raises(ValueError, match="differs in weights"):
        pyrobust.pack(BlockNet().eval(), bits=2, calibration=batches, **options)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # sums run in another order
    try:
        with pytest.raises(ValueError, match="differs in threads"):
            pyrobust.pack(model, bits=2, calibration=batches, **options)
    finally:
        torch.set_num_threads(threads)
    file = tmp_path / "block-0001.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-3], content[:-1] + bytes([content[-1] ^ 1])):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            pyrobust.pack(model, bits=2, calibration=batches, **options)
    file.write_bytes(content)
    pyrobust.pack(model, bits=2, calibration=batches, **options)


def test_given_blocks_are_used_and_must_be_a_chain():
    model = BlockNet().eval()
    data = batches_for(model)
    recorder = Recorder()
    options = {"bits": 2, "group_size": 8, "quantizer": recorder, "calibration": data}
    pyrobust.pack(model, blocks="blocks", **options)
    assert [name for name, _, _ in recorder._blocks][1] == "blocks.0"
    with pytest.raises(ValueError, match="blocks must name modules of the model; got 'layers'"):
        pyrobust.pack(model, blocks="layers", **options)
    with pytest.raises(ValueError, match="blocks must be modules that each take the output"):
        pyrobust.pack(model, blocks=["blocks.1", "blocks.0"], **options)
    with pytest.raises(ValueError, match=r"'blocks\.0\.up' is not given what the one before"):
        pyrobust.pack(model, blocks=["blocks.0.gate", "blocks.0.up"], **options)


class NeverRuns(BlockNet):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(3, 3)


class Explodes(BlockNet):
    def forward(self, x):
        return super().forward(x * 1e38)


def training(model):
    model.blocks[1].train()
    return model


@pytest.mark.parametrize(
    ("make", "data", "message"),
    [
        (BlockNet, [], "calibration must hold at least one batch; got none"),
        (BlockNet, None, "calibration must be batches of inputs for Recorder; got None"),
        (BlockNet, [torch.zeros(0, 6)], "calibration batch 0 must not be empty"),
        (BlockNet, [torch.zeros(2, 6), torch.full((2, 6), torch.nan)], "batch 1 must be finite"),
        (BlockNet, [torch.zeros(2, 5)], "batch 0 must fit the model; 'stem' raised RuntimeError"),
        (BlockNet, [torch.zeros(2, 6), torch.zeros(2, 9)], "calibration batch 1 must fit"),
        (BlockNet, [{"y": torch.zeros(2, 6)}], "must fit the model; BlockNet raised TypeError"),
        (NeverRuns, [torch.zeros(2, 6)], "'unused' never runs"),
        (lambda: training(BlockNet()), [torch.zeros(2, 6)], "its module 'blocks.1' is in training"),
        (Explodes, [torch.full((2, 6), 10.0)], "input of 'stem' must be finite"),
    ],
)
def test_bad_calibration_is_refused_with_the_layers_name(make, data, message):
    model = make()
    if not any(module.training and name for name, module in model.named_modules()) or (
        "training" not in message
    ):
        model.eval()
    else:
        model.train(False)
        training(model)
    before = copy.deepcopy(model.state_dict())
    recorder = Recorder()
    with pytest.raises(ValueError, match=message):
        pyrobust.pack(model, bits=2, quantizer=recorder, calibration=data)
    assert not recorder._hessians
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_calibration_of_a_wrong_type_is_refused():
    with pytest.raises(TypeError, match="calibration must be an iterable of batches; got int"):
        pyrobust.pack(BlockNet().eval(), quantizer=Recorder(), calibration=3)
    with pytest.raises(TypeError, match="calibration batch 0 must be a tensor"):
        pyrobust.pack(BlockNet().eval(), quantizer=Recorder(), calibration=["text"])


def test_a_quantizer_that_leaves_a_layer_out_is_refused():
    class Lazy(Recorder):
        def quantize_block(self, block):
            pass

    with pytest.raises(ValueError, match="Lazy left out 'stem'"):
        pyrobust.pack(BlockNet().eval(), quantizer=Lazy(), calibration=[torch.zeros(2, 6)])


class Recurrent(nn.Module):
    """One layer runs three times in a batch."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        hidden = torch.zeros_like(x[:, 0])
        for step in range(3):
            hidden = torch.tanh(self.cell(hidden + x[:, step]))
        return self.head(hidden)


def test_every_run_of_a_layer_counts():
    class KeepsHessians(Recorder):
        def quantize_block(self, block):
            for group in block.groups():
                self.found = getattr(self, "found", {}) | block.hessians(group)
                for name in group:
                    weight = block.weight(name)
                    block.install(name, round_to_nearest(weight, **block.formats[name]))

    torch.manual_seed(0)
    model, x, inputs = Recurrent().eval(), torch.randn(5, 3, 6), []
    with model.cell.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach())):
        model(x)
    quantizer = KeepsHessians()
    pyrobust.pack(model, bits=8, group_size=6, quantizer=quantizer, calibration=[x])
    rows = torch.cat(inputs)
    assert len(rows) == 15
    torch.testing.assert_close(quantizer.found["cell"], 2 / 15 * rows.T @ rows)


def test_resume_must_be_a_folder(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"resume must be a folder; '.*file' is a file"):
        pyrobust.pack(
            BlockNet().eval(), quantizer=Recorder(), calibration=[torch.zeros(2, 6)], resume=path
        )
    assert path.read_text() == "mine"


@pytest.mark.parametrize("content", ["", "{", "[]", "[1]", "3"])
def test_a_damaged_description_is_told(tmp_path, content):
    options = {"quantizer": Recorder(), "calibration": [torch.zeros(2, 6)], "resume": tmp_path}
    (tmp_path / "conversion.json").write_text(content)
    with pytest.raises(ValueError, match=r"resume must (hold files as they were written|be a new)"):
        pyrobust.pack(BlockNet().eval(), **options)


def test_embeddings_need_not_run():
    class Unread(BlockNet):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 8)

    packed = pyrobust.pack(
        Unread().eval(), quantizer=Recorder(), calibration=[torch.zeros(2, 6)], group_size=8
    )
    assert type(packed.table).__name__ == "PackedEmbedding"


def test_options_of_the_walk_need_a_quantizer_that_walks(tmp_path):
    with pytest.raises(ValueError, match="resume must be None; round_to_nearest does not go"):
        pyrobust.pack(BlockNet(), resume=tmp_path)


def test_a_shared_weight_is_quantized_once():
    model = BlockNet()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    recorder = Recorder()
    packed = pyrobust.pack(
        model.eval(), bits=2, group_size=8, quantizer=recorder, calibration=batches_for(model)
    )
    assert "blocks.1.up" not in recorder._hessians
    assert packed.blocks[1].up.codes.data_ptr() == packed.blocks[0].up.codes.data_ptr()
