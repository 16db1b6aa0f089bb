"""PackedComplexLinear: equal to the layer that trained, in integers, in files, in whole models."""

import copy

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust.nn import ComplexDecoderConfig, ComplexDecoderLM, PackedComplexLinear
from pyrobust.ops import complex_2bit_sums
from pyrobust.quantize import (
    ComplexLinear,
    PhaseTensor,
    dequantize,
    pack_codes_2bit,
    phase_quantize,
    quantize_activation,
)


def relative(result, expected):
    result, expected = torch.stack(result).double(), torch.stack(expected).double()
    return float((result - expected).norm() / expected.norm())


def run(layer, *pair):
    with torch.no_grad():
        return layer(*pair)


@pytest.mark.parametrize("size", [(1, 4), (5, 3), (33, 7), (64, 300), (129, 5)])
@pytest.mark.parametrize("shape", [(), (1,), (17,), (2, 3)])
@pytest.mark.parametrize("act_bits", [8, None])
def test_the_packed_layer_is_the_simulated_one(isa, size, shape, act_bits):
    layer = ComplexLinear(*size, act_bits=act_bits)
    packed = layer.pack()
    pair = torch.randn(2, *shape, size[0])
    if act_bits is None:
        assert relative(run(packed, *pair), run(layer, *pair)) < 1e-5
    else:  # integers below, so that no order of summing makes a difference
        for one, other in zip(run(packed, *pair), run(layer, *pair), strict=True):
            assert torch.equal(one, other)
    real = ComplexLinear(*size, act_bits=act_bits, output="real")
    real.load_state_dict(layer.state_dict())
    assert torch.equal(run(real.pack(), *pair), run(packed, *pair)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_too(dtype):
    layer = ComplexLinear(96, 40).to(dtype)
    pair = torch.randn(2, 33, 96, dtype=dtype)
    outputs = run(layer.pack(), *pair)
    assert outputs[0].dtype == dtype
    assert relative(outputs, run(layer, *pair)) < 1e-3


@pytest.mark.parametrize("columns", [1, 3, 4, 63, 64, 65, 1000])
def test_the_integer_sums_are_exact(isa, columns):
    codes = torch.randint(0, 4, (13, columns), dtype=torch.uint8)
    a, b = torch.randint(-127, 128, (2, 9, columns), dtype=torch.int8)
    sums = complex_2bit_sums(a, b, pack_codes_2bit(codes), in_features=columns)
    u = ((codes == 0).int() - (codes == 2).int()).T
    v = ((codes == 1).int() - (codes == 3).int()).T
    a, b = a.int(), b.int()
    assert torch.equal(sums, torch.stack([a @ u, b @ v, a @ v, -(b @ u)]))


def test_sums_and_steps_give_the_output():
    layer = ComplexLinear(50, 12)
    packed = layer.pack()
    pair = torch.randn(2, 7, 50)
    (a, step_a), (b, step_b) = (quantize_activation(part) for part in pair)
    sums = complex_2bit_sums(a, b, packed.codes, in_features=50).double()
    s_real, s_imag = packed.scale.double()
    real = s_real * step_a * sums[0] + s_imag * step_b * sums[1]
    imag = s_imag * step_a * sums[2] + s_real * step_b * sums[3]
    assert relative(run(packed, *pair), (real, imag)) < 1e-6


def test_empty_batches_and_two_bits_a_weight():
    packed = ComplexLinear(37, 11).pack()
    assert packed.codes.numel() == 11 * 10
    assert ComplexLinear(64, 32).pack().nbytes_packed == 64 * 32 // 4 + 8
    for part in run(packed, *torch.zeros(2, 0, 37)):
        assert part.shape == (0, 11)
    for part in run(packed, *torch.zeros(2, 3, 37)):
        assert torch.equal(part, torch.zeros(3, 11))


@pytest.mark.parametrize("act_bits", [8, None])
def test_gradients_reach_the_inputs(act_bits):
    layer = ComplexLinear(20, 9, act_bits=act_bits)
    targets = torch.randn(2, 4, 9)
    grads = []
    start = torch.randn(2, 4, 20)
    for module in (layer, layer.pack()):
        pair = start.clone().requires_grad_()
        real, imag = module(*pair)
        (real * targets[0] + imag * targets[1]).sum().backward()
        grads.append(pair.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)


def test_the_weight_is_what_the_codes_say():
    layer = ComplexLinear(10, 6)
    packed = layer.pack()
    expected = torch.complex(*dequantize(phase_quantize(layer.weight_real, layer.weight_imag)))
    assert torch.equal(packed.dequantize(), expected)
    with pytest.raises(NotImplementedError, match="complex; use phases"):
        _ = packed.qtensor


def test_a_change_of_dtype_keeps_codes_and_scales():
    packed = ComplexLinear(10, 6).pack()
    before = packed.dequantize()
    moved = copy.deepcopy(packed).to(torch.bfloat16)
    assert moved.scale.dtype == torch.float32
    assert torch.equal(moved.dequantize(), before)
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    other = PackedComplexLinear(10, 6)
    assert not torch.equal(other.dequantize(), before)
    other.load_state_dict(state)
    assert torch.equal(other.dequantize(), before)
    with pytest.raises(RuntimeError, match="packed with"):
        PackedComplexLinear(9, 6).load_state_dict(state)


def test_it_compiles():
    torch._dynamo.reset()
    packed = ComplexLinear(10, 6).pack()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    pair = torch.randn(2, 5, 10)
    for one, other in zip(run(compiled, *pair), run(packed, *pair), strict=True):
        assert torch.equal(one, other)


SIZES = {"vocab_size": 40, "hidden_size": 32, "mlp_size": 48, "layers": 2, "heads": 4}
FLOAT = ("lm_head", "token_embeddings_*")


def test_a_trained_model_packs_to_what_it_simulated_and_survives_a_file(tmp_path):
    config = ComplexDecoderConfig(**SIZES)
    model = ComplexDecoderLM(config)
    tokens = torch.randint(0, 40, (8, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    model.eval()
    packed = pyrobust.pack(model, skip=FLOAT)
    kinds = [m for m in packed.modules() if isinstance(m, PackedComplexLinear)]
    assert len(kinds) == 2 * 7
    assert type(packed.lm_head) is nn.Linear
    with torch.no_grad():
        expected = model(tokens)
        logits = packed(tokens)
    assert torch.equal(logits, expected)  # a single last bit could flip an activation further on
    rows = [row for row in pyrobust.pack_report(packed).packed if row.type == "ComplexLinear"]
    assert len(rows) == 2 * 7
    assert rows[0].bytes_after == 32 * 32 // 4 + 8
    assert 0 < rows[0].error < 1

    path = tmp_path / "model.safetensors"
    pyrobust.save(packed, path)
    loaded = pyrobust.load(path, ComplexDecoderLM(config))
    with torch.no_grad():
        assert torch.equal(loaded(tokens), logits)
        cache = loaded.new_cache()
        steps = [loaded(tokens[:, i : i + 1], cache=cache) for i in range(12)]
    torch.testing.assert_close(torch.cat(steps, 1), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_models_agree_to_the_last_bit(isa, dtype):
    """Many activations and layers: rounding differences of 1e-7 used to flip int8 codes here."""
    for seed in range(3):
        torch.manual_seed(seed)
        config = ComplexDecoderConfig(**{**SIZES, "layers": 4})
        model = ComplexDecoderLM(config).eval().to(dtype)
        packed = pyrobust.pack(model, skip=FLOAT)
        tokens = torch.randint(0, 40, (8, 32))
        with torch.no_grad():
            assert torch.equal(packed(tokens), model(tokens))


def test_the_file_has_the_counted_size(tmp_path):
    layer = ComplexLinear(1024, 1024)
    path = tmp_path / "layer.safetensors"
    pyrobust.save(nn.Sequential(layer.pack()), path)
    assert path.stat().st_size == pytest.approx(1024 * 1024 * 2 / 8 + 8, rel=0.01)


def test_packing_without_training_needs_consent():
    layer = ComplexLinear(8, 4, weight_bits=None)
    with pytest.raises(ValueError, match="weight_bits must be 2, so that training saw the phases"):
        layer.pack()
    with pytest.raises(ValueError, match="weight_bits must be 2"):
        pyrobust.pack(nn.Sequential(layer))
    with pytest.warns(UserWarning, match="destructive"):
        packed = layer.pack(post_training=True)
    assert isinstance(packed, pyrobust.quantize.PackedComplexLinear)
    with torch.no_grad():
        layer.weight_imag[0, 0] = torch.nan
    with (
        pytest.raises(ValueError, match="w_imag must be finite"),
        pytest.warns(UserWarning, match="destructive"),
    ):
        layer.pack(post_training=True)


def test_refusals():
    packed = PackedComplexLinear(6, 3)
    x = torch.randn(2, 6)
    with pytest.raises(ValueError, match="one shape"):
        packed(x, x[:1])
    with pytest.raises(TypeError, match=r"pass x\.real and x\.imag"):
        packed(torch.complex(x, x), x)
    with pytest.raises(ValueError, match="in_features = 6"):
        packed(x[:, :5], x[:, :5])
    with pytest.raises(TypeError, match=r"float32, float16 or bfloat16; got torch\.float64"):
        packed(x.double(), x.double())
    with pytest.raises(ValueError, match=r"phases must have shape \(3, 6\)"):
        packed.adopt_phases(PhaseTensor.of(x, x))
    with pytest.raises(ValueError, match="output must be one of"):
        PackedComplexLinear(6, 3, output="imag")
    with pytest.raises(ValueError, match="scale must be finite and positive"):
        PhaseTensor(packed.codes, torch.zeros(2), (3, 6))
    with pytest.raises(TypeError, match="codes must have dtype"):
        PhaseTensor(packed.codes.int(), packed.scale, (3, 6))
