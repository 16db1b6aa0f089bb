"""AdaDim and its two group directions: identities, the choice, and the measured claims."""

import copy

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust.nn import QuantizedLinear
from pyrobust.quantize import AdaDim, HessianAccumulator, gptq, quantize_groupwise, rtn

from .small_models import BlockNet, ConvNet

# -- groups in two directions --------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_per_ic_is_per_oc_of_the_transpose(bits, symmetric):
    w = torch.randn(40, 24)
    one = quantize_groupwise(w, bits, 16, "ic", symmetric)
    other = quantize_groupwise(w.t(), bits, 16, "oc", symmetric)
    assert torch.equal(one.dequantize(), other.dequantize().t())
    assert torch.equal(one.scale, other.scale.t())
    assert (one.shape, one.dim, one.group_dim) == ((40, 24), "ic", 0)
    assert (other.shape, other.dim, other.group_dim) == ((24, 40), "oc", 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", ["oc", "ic"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_quantizing_a_quantized_weight_changes_nothing(bits, dim, symmetric):
    # 2,500 groups: rounding scales up leaves one in about a hundred a level short
    w = torch.randn(400, 100) * torch.logspace(-2, 2, 100)
    once = quantize_groupwise(w, bits, 16, dim, symmetric)
    twice = quantize_groupwise(once.dequantize(), bits, 16, dim, symmetric)
    assert torch.equal(once.dequantize(), twice.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", ["oc", "ic"])
def test_groups_have_few_levels_and_keep_their_ends(bits, dim):
    w = torch.randn(32, 64)
    packed = quantize_groupwise(w, bits, 16, dim)
    values, scale = packed.dequantize(), packed.scale.float()
    if dim == "ic":
        w, values, scale = w.t(), values.t(), scale.t()
    for line in range(len(w)):
        for group in range(w.shape[1] // 16):
            part = slice(16 * group, 16 * group + 16)
            assert values[line, part].unique().numel() <= 2**bits
            for end in (torch.amin, torch.amax):
                moved = end(values[line, part], 0) - end(w[line, part], 0)
                assert moved.abs() <= scale[line, group] / 2 * (1 + 1e-5)


@pytest.mark.parametrize("dim", ["oc", "ic"])
def test_a_group_far_from_zero_is_not_clipped(dim):
    w = torch.rand(16, 16) + 100.0
    packed = quantize_groupwise(w, 4, 16, dim)
    step = packed.scale.float().repeat_interleave(16, 1 if dim == "oc" else 0)
    assert ((packed.dequantize() - w).abs() <= step / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", ["oc", "ic"])
@pytest.mark.parametrize("shape", [(48, 64), (37, 29)])
def test_the_packed_layer_multiplies_what_was_quantized(bits, dim, shape):
    linear = nn.Linear(shape[1], shape[0])
    packed = rtn(linear, bits, 16, dim)
    layer = QuantizedLinear.from_qtensor(packed, linear.bias)
    assert torch.equal(layer.dequantize(), packed.dequantize())
    x = torch.randn(5, shape[1])
    expected = nn.functional.linear(x.double(), packed.dequantize().double(), linear.bias.double())
    assert (layer(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    rounded = layer(x.bfloat16()).double()
    target = nn.functional.linear(
        x.bfloat16().double(), packed.dequantize().double(), linear.bias.double()
    )
    assert (rounded - target).norm() <= 4e-3 * target.norm()  # one rounding to bfloat16
    assert layer.nbytes_packed == packed.nbytes


def test_bits_and_directions_are_checked():
    w = torch.randn(4, 4)
    with pytest.raises(ValueError, match="bits must be one of 2, 3, 4, 8; got 9"):
        quantize_groupwise(w, 9)
    with pytest.raises(ValueError, match="dim must be one of oc, ic; got 'rows'"):
        quantize_groupwise(w, 4, 2, "rows")
    with pytest.raises(ValueError, match="group_size must be at least 1; got 0"):
        quantize_groupwise(w, 4, 0)
    with pytest.raises(ValueError, match="weight must be finite"):
        quantize_groupwise(w * torch.inf, 4)
    with pytest.raises(TypeError, match=r"linear must be a torch.nn.*Linear; got Conv2d"):
        rtn(nn.Conv2d(1, 1, 1), 4)


# -- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_smaller_loss_wins_and_is_what_the_unit_shows(method):
    torch.manual_seed(3)
    model = BlockNet(depth=2).eval()
    original = copy.deepcopy(model)
    x = torch.randn(64, 6)
    report = AdaDim(method, bits=2, group_size=8).quantize_(model, [x])
    inner = [f"blocks.{i}.{n}" for i in range(2) for n in ("gate", "up", "down")]
    assert list(report) == inner
    assert type(model.stem) is nn.Linear
    assert type(model.head) is nn.Linear
    for name, choice in report.items():
        best = min(choice.loss_oc, choice.loss_ic)
        assert best == {"oc": choice.loss_oc, "ic": choice.loss_ic}[choice.dim]
        assert model.get_submodule(name).group_dim == {"oc": 1, "ic": 0}[choice.dim]
        assert choice.unit == (name if name.endswith("down") else name.rpartition(".")[0])

    # By hand for block 0: gate, then up with the chosen gate in place, by the block's output.
    with torch.no_grad():
        hidden, shift = original.stem(x), 0.1 * x.mean(-1, keepdim=True)
        block = original.blocks[0]
        for name in ("gate", "up"):
            layer, before = block.get_submodule(name), block(hidden, shift)[0]
            weight = layer.weight.data
            for dim, loss in (
                ("oc", report[f"blocks.0.{name}"].loss_oc),
                ("ic", report[f"blocks.0.{name}"].loss_ic),
            ):
                layer.weight.data = quantize_groupwise(weight, 2, 8, dim).dequantize()
                change = (block(hidden, shift)[0] - before).square().mean()
                torch.testing.assert_close(float(change), loss, rtol=1e-4, atol=0)
            layer.weight.data = model.blocks[0].get_submodule(name).dequantize()


def test_equal_losses_keep_the_first_candidate():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval()
    latin = (torch.arange(16)[:, None] + torch.arange(16)) % 16  # every line spans the grid
    model[0].weight.data = latin.float() - 8
    for candidates in (("oc", "ic"), ("ic", "oc")):
        report = AdaDim(bits=4, group_size=16, candidates=candidates).quantize_(
            copy.deepcopy(model), [torch.randn(9, 16)]
        )
        assert report["0"].loss_oc == report["0"].loss_ic == 0.0
        assert report["0"].dim == candidates[0]


def test_one_candidate_is_plain_quantization_in_that_direction():
    model = BlockNet().eval()
    report = AdaDim(bits=3, group_size=8, candidates=("ic",)).quantize_(model, [torch.ones(5, 6)])
    assert all(choice.dim == "ic" and choice.loss_oc is None for choice in report.values())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("propagate", ["float", "quantized"])
@pytest.mark.parametrize("make", [BlockNet, ConvNet])
def test_through_pack_with_a_report(method, propagate, make):
    torch.manual_seed(0)
    model = make().eval()
    data = [torch.randn(16, 1, 8, 8) if make is ConvNet else torch.randn(64, 6)]
    quantizer = AdaDim(method, propagate=propagate)
    packed = pyrobust.pack(model, bits=2, group_size=16, quantizer=quantizer, calibration=data)
    rows = pyrobust.pack_report(packed).packed
    assert set(quantizer.choices) == {row.name for row in rows}
    for row in rows:
        assert row.group_dim == {"oc": 1, "ic": 0}[quantizer.choices[row.name].dim]
        assert row.output_error > 0
        assert row.output_error_nearest > 0
    assert packed(data[0]).isfinite().all()


def test_the_file_is_as_large_as_the_bits_that_are_counted(tmp_path):
    model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(3)]).eval()
    model[1].weight.data *= torch.exp(torch.randn(512))  # asks for groups along outputs
    file = tmp_path / "model.safetensors"
    for method in ("rtn", "gptq"):
        packed = pyrobust.pack(
            model,
            bits=3,
            quantizer=AdaDim(method),
            calibration=[torch.randn(600, 512)],
        )
        assert {layer.group_dim for layer in packed} == {0, 1}
        rows = pyrobust.pack_report(packed).packed
        counted = sum(row.bytes_after for row in rows)
        assert counted == 3 * (512 * 512 * 3 // 8 + 512 * 4 * (2 + 1))  # codes, scales, zeros
        pyrobust.save(packed, file)
        assert abs(file.stat().st_size - counted) <= 0.01 * counted


def test_judging_the_method_compares_what_it_would_install():
    torch.manual_seed(0)
    x = torch.randn(600, 24) @ torch.randn(24, 24)
    model = nn.Sequential(nn.Linear(24, 20), nn.ReLU()).eval()
    accumulator = HessianAccumulator(24)
    accumulator.add(x)
    losses = {}
    for dim in ("oc", "ic"):
        packed = gptq(model[0], accumulator.hessian(), 2, 8, dim)
        change = x @ (packed.dequantize() - model[0].weight.detach()).t()
        losses[dim] = float(change.square().mean())
    quantizer = AdaDim("gptq", bits=2, group_size=8, judge="method")
    choice = quantizer.quantize_(model, [x])["0"]
    assert choice.loss_oc == pytest.approx(losses["oc"], rel=1e-3)
    assert choice.loss_ic == pytest.approx(losses["ic"], rel=1e-3)
    assert choice.dim == min(losses, key=losses.get)


def test_an_interrupted_conversion_restores_the_model(monkeypatch):
    model = BlockNet().eval()
    before = copy.deepcopy(model.state_dict())
    calls = []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*args, **options)

    import pyrobust.quantize.adadim as module

    original = module.round_to_nearest
    monkeypatch.setattr(module, "round_to_nearest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        AdaDim().quantize_(model, [torch.randn(9, 6)])
    assert type(model.blocks[0].gate) is nn.Linear
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"method": "obq"}, "method must be one of rtn, gptq"),
        ({"bits": 1}, "bits must be one of 2, 3, 4, 8"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"candidates": ()}, "candidates must name at least one direction"),
        ({"candidates": ("row",)}, "candidates must be one of oc, ic"),
        ({"judge": "both"}, "judge must be one of rtn, method"),
        ({"propagate": "x"}, "propagate must be one of quantized, float"),
    ],
)
def test_bad_options_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        AdaDim(**option)


def test_bad_calibration_is_refused():
    with pytest.raises(ValueError, match="calibration must hold at least one batch"):
        AdaDim().quantize_(BlockNet().eval(), [])
    with pytest.raises(ValueError, match="in training mode"):
        AdaDim().quantize_(BlockNet().train(), [torch.ones(2, 6)])


# -- the published mechanism, at 256 x 256, 3 bits, groups of 128 ----------------------------------


def relative_error(packed, weight, x):
    return float((x @ (packed.dequantize() - weight).t()).norm() / (x @ weight.t()).norm())


def errors_of(weight, x):
    """Relative output error of both methods in both directions, and what AdaDim takes."""
    linear = nn.Linear(256, 256, bias=False)
    linear.weight.data = weight
    accumulator = HessianAccumulator(256)
    accumulator.add(x)
    found = {}
    for dim in ("oc", "ic"):
        found["rtn", dim] = relative_error(rtn(linear, 3, 128, dim), weight, x)
        packed = gptq(linear, accumulator.hessian(), 3, 128, dim)
        found["gptq", dim] = relative_error(packed, weight, x)
    for method in ("rtn", "gptq"):
        model = nn.Sequential(copy.deepcopy(linear), nn.Identity()).eval()
        AdaDim(method, bits=3).quantize_(model, [x])
        found[method, "ada"] = relative_error(model[0], weight, x)
    return found


def aligned_case():
    """Weights and inputs along the same few directions, as in trained networks."""
    directions = torch.randn(16, 256) / 4
    x = torch.randn(2048, 16) @ directions + torch.randn(2048, 256)
    return torch.randn(256, 16) @ directions + 0.3 * torch.randn(256, 256), x


@pytest.mark.parametrize("seed", [0, 1])
def test_columns_of_different_size_ask_for_groups_per_input(seed):
    torch.manual_seed(seed)
    c = torch.exp(0.7 * torch.randn(256))
    weight, x = aligned_case()
    found = errors_of(weight * c, x / c)
    assert found["rtn", "ic"] <= found["rtn", "oc"] / 3
    assert found["gptq", "ic"] <= 0.4 * found["gptq", "oc"]
    assert found["gptq", "ic"] <= 0.8 * found["rtn", "ic"]
    for method in ("rtn", "gptq"):
        assert found[method, "ada"] == found[method, "ic"]


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_of_different_size_ask_for_groups_per_output(seed):
    torch.manual_seed(seed)
    r = torch.exp(0.7 * torch.randn(256))
    weight, x = aligned_case()
    found = errors_of(weight * r[:, None], x)
    assert found["rtn", "oc"] <= 0.7 * found["rtn", "ic"]
    assert found["gptq", "oc"] <= 0.7 * found["gptq", "ic"]
    for method in ("rtn", "gptq"):
        assert found[method, "ada"] == found[method, "oc"]


def test_outliers_in_columns_of_large_weights_do_not_imply_groups_per_input():
    torch.manual_seed(0)
    weight, x = torch.randn(256, 256), torch.randn(2048, 256)
    weight[:, [5, 77, 130, 201]] *= 6.0
    x[:, [5, 77, 130, 201]] *= 100.0
    found = errors_of(weight, x)
    assert found["rtn", "oc"] < found["rtn", "ic"]
    assert found["rtn", "ada"] == found["rtn", "oc"]


def test_units_may_return_mappings():
    class Body(nn.Module):
        """Two layers, one after the other, in a module that returns what Hugging Face's do."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return {"last_hidden_state": self.second(torch.relu(self.first(x))), "more": None}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Body()

        def forward(self, x):
            return self.body(x)["last_hidden_state"]

    torch.manual_seed(0)
    quantizer = AdaDim("rtn")
    pyrobust.pack(Net().eval(), quantizer=quantizer, calibration=[torch.randn(16, 8)], group_size=4)
    first = quantizer.choices["body.first"]
    assert first.unit == "body"
    assert first.loss_oc > 0 < first.loss_ic
