import copy
import io
import warnings

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust import nn as rnn
from pyrobust.quantize import LSQQuantizer, QuantConv2d, QuantLinear, StatsQuantizer


def batch(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def network(w_bits, a_bits, weights):
    torch.manual_seed(4)
    return nn.Sequential(
        QuantConv2d.from_float(nn.Conv2d(2, 6, 3, padding=1), 8, a_bits),
        nn.ReLU(),
        nn.Flatten(1),
        QuantLinear(6 * 5 * 5, 24, w_bits, a_bits, weights, signed=False),
        nn.ReLU(),
        QuantLinear(24, 10, w_bits, a_bits, weights, signed=False),
    )


def train_a_little(net, steps=5):
    x, y = batch(32, 2, 5, 5), torch.arange(32) % 10
    net(x)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def test_a_layer_multiplies_rounded_weight_and_rounded_input():
    layer = QuantLinear(6, 4, 2, 3)
    x = batch(5, 6)
    layer(x)
    expected = nn.functional.linear(
        layer.activation(x), StatsQuantizer(2)(layer.weight, storable=True), layer.bias
    )
    assert torch.equal(layer(x), expected)
    assert layer.weight_quantizer.bits == 2
    assert layer.activation.quantizer.bits == 3


def test_packing_warns_where_no_batch_has_set_a_scale():
    layer = QuantLinear(6, 4, 2, 3)
    with pytest.warns(UserWarning, match=r"'0\.activation\.quantizer' has no scale yet"):
        pyrobust.pack(nn.Sequential(layer))
    layer(batch(5, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pyrobust.pack(nn.Sequential(layer))
        plain = QuantLinear.from_float(nn.Linear(6, 4), 2, None, "lsq")
        pyrobust.pack(nn.Sequential(plain))


@pytest.mark.parametrize("name", ["bias", "activation.after", "weight"])
def test_parameters_that_are_not_finite_are_refused_by_name(name):
    layer = QuantLinear(6, 4, 2, 3)
    layer(batch(5, 6))
    with torch.no_grad():
        layer.get_parameter(name).flatten()[0] = torch.nan
    with pytest.raises(ValueError, match=rf"'0\.{name}' must be finite"):
        pyrobust.pack(nn.Sequential(layer))


def test_from_float_copies_weights_and_keeps_its_own():
    linear = nn.Linear(6, 4, bias=False)
    layer = QuantLinear.from_float(linear, 3)
    assert torch.equal(layer.weight, linear.weight)
    assert layer.bias is None
    with torch.no_grad():
        layer.weight.zero_()
    assert linear.weight.abs().sum() > 0


def assert_nearer_than_bfloat16(out, net, x):
    """A last bit may move an activation's code: packing may change less than bfloat16 itself."""
    simulated, exact = net(x.bfloat16()), copy.deepcopy(net).float()(x.bfloat16().float())
    rounding = relative(simulated, exact)
    assert relative(out, simulated) <= max(0.5 * rounding, 1e-3)
    assert relative(out, exact) <= 1.1 * rounding


@pytest.mark.parametrize("weights", ["statsq", "lsq"])
@pytest.mark.parametrize("w_bits", [1, 2, 3, 4, 6, 8])
def test_packed_model_computes_what_was_simulated(w_bits, weights):
    net = train_a_little(network(w_bits, 4, weights))
    packed = pyrobust.pack(net)
    x = batch(16, 2, 5, 5, seed=9)
    with torch.no_grad():
        assert relative(packed(x), net(x)) <= 1e-5
        out = packed(x.bfloat16())
        assert out.dtype == torch.bfloat16
        half = copy.deepcopy(net).bfloat16()
        assert_nearer_than_bfloat16(out, net, x)
        assert_nearer_than_bfloat16(pyrobust.pack(half)(x.bfloat16()), half, x)
    kinds = [type(m).__name__ for m in packed.modules() if type(m).__name__.startswith("Packed")]
    assert kinds == ["PackedConv2d", "PackedLinear", "PackedLinear"]
    assert not any(isinstance(m, QuantLinear) for m in packed.modules())


def test_weight_only_layers_pack_to_plain_packed_layers_that_load_into_the_float_model(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3))
    trained = nn.Sequential(QuantLinear.from_float(net[0], 2), net[1], net[2])
    packed = pyrobust.pack(trained, skip="2")
    assert type(packed[0]) is rnn.PackedLinear
    assert type(packed[2]) is nn.Linear
    pyrobust.save(packed, tmp_path / "net.safetensors")
    loaded = pyrobust.load(tmp_path / "net.safetensors", net)
    x = batch(4, 20)
    assert torch.equal(loaded(x), packed(x))


def test_packed_activations_go_through_a_file(tmp_path):
    packed = pyrobust.pack(train_a_little(network(2, 4, "statsq")))
    pyrobust.save(packed, tmp_path / "net.safetensors")
    other = pyrobust.pack(train_a_little(network(2, 4, "statsq"), steps=2))
    x = batch(4, 2, 5, 5)
    assert not torch.equal(other(x), packed(x))
    pyrobust.load(tmp_path / "net.safetensors", other)
    assert torch.equal(other(x), packed(x))


def test_report_names_every_weight_with_bits_and_bytes():
    net = train_a_little(network(3, 4, "lsq"))
    report = pyrobust.pack_report(pyrobust.pack(net))
    assert [row.name for row in report.packed] == ["0", "3", "5"]
    assert [row.bits for row in report.packed] == [8, 3, 3]
    first = report.packed[1]
    assert first.bytes_before == 4 * 24 * 150
    # 57 bytes of codes and one float32 scale a row
    assert first.bytes_after == 24 * (-(-150 * 3 // 8) + 4)
    assert 0 < first.error < 1
    report.summary()


def test_skip_leaves_a_layer_simulating_and_inplace_changes_the_model():
    net = train_a_little(network(2, None, "statsq"))
    packed = pyrobust.pack(net, skip="5")
    assert isinstance(packed[5], QuantLinear)
    assert isinstance(packed[3], rnn.PackedLinear)
    assert isinstance(net[3], QuantLinear)
    assert pyrobust.pack(net, inplace=True) is net
    assert isinstance(net[3], rnn.PackedLinear)
    single = QuantLinear(6, 4, 2)
    assert isinstance(pyrobust.pack(single), rnn.PackedLinear)
    with pytest.raises(ValueError, match="inplace must be False"):
        pyrobust.pack(single, inplace=True)


def test_state_dict_deepcopy_and_pickle_keep_the_function():
    net = train_a_little(network(2, 3, "lsq"))
    x = batch(3, 2, 5, 5)
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    fresh = network(2, 3, "lsq").eval()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(x), net(x))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="weight_quantizer must be one of statsq, lsq; got 'gptq'"):
        QuantLinear(4, 4, 2, weight_quantizer="gptq")
    with pytest.raises(ValueError, match="bits must be at most 8"):
        QuantLinear(4, 4, 9)
    with pytest.raises(ValueError, match="bits must be at least 1"):
        QuantLinear(4, 4, 2, 0)
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn"):
        QuantLinear.from_float(nn.Conv2d(1, 1, 1))
    broken = QuantLinear(4, 4, 2)
    with torch.no_grad():
        broken.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        pyrobust.pack(nn.Sequential(broken))


def test_a_quantizer_object_belongs_to_the_layer():
    quantizer = LSQQuantizer(3, per_channel=0)
    layer = QuantLinear(5, 4, weight_quantizer=quantizer)
    assert layer.weight_quantizer is quantizer
    assert layer.w_bits == 3


@pytest.mark.parametrize("options", [{}, {"groups": 2, "stride": 2}, {"padding_mode": "circular"}])
@pytest.mark.parametrize("a_bits", [None, 8])
def test_eight_bit_statsq_layers_pack_to_what_they_simulated(options, a_bits, tmp_path):
    torch.manual_seed(5)
    conv = nn.Conv2d(4, 6, 3, padding=1, **options)
    net = nn.Sequential(
        QuantConv2d.from_float(conv, 8, a_bits, "statsq"), nn.Flatten(), nn.LazyLinear(5)
    )
    x = batch(3, 4, 6, 6)
    net(x)
    net[2] = QuantLinear.from_float(net[2], 8, a_bits)
    net.eval()(x)
    packed = pyrobust.pack(net)
    with torch.no_grad():
        assert relative(packed(x), net(x)) <= 1e-5
        assert relative(packed(x.bfloat16()).float(), net(x.bfloat16()).float()) <= 1e-2
        pyrobust.save(packed, tmp_path / "packed.safetensors")
        expected = packed(x)
        again = pyrobust.load(tmp_path / "packed.safetensors", copy.deepcopy(packed))
        assert torch.equal(again(x), expected)
    assert [row.bits for row in pyrobust.pack_report(packed).packed] == [8, 8]
