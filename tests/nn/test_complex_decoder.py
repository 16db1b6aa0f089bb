"""The complex transformer: parts against complex arithmetic, the whole against published code."""

import pytest
import torch

from pyrobust.nn import (
    ComplexAttention,
    ComplexDecoderConfig,
    ComplexDecoderLM,
    ComplexReLUSquared,
    ComplexRMSNorm,
    ComplexRotaryEmbedding,
)


def small(**options):
    sizes = {"vocab_size": 19, "hidden_size": 12, "mlp_size": 20, "layers": 2, "heads": 3}
    return ComplexDecoderLM(ComplexDecoderConfig(**{**sizes, **options})).eval()


def waves_(model):
    """The same weights everywhere: waves with a phase of their own for each sorted name."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(sorted(model.named_parameters())):
            steps = torch.arange(parameter.numel(), dtype=torch.float64)
            wave = torch.sin(steps * (0.7 + 0.01 * i) + i).reshape(parameter.shape)
            parameter.copy_(1 + 0.2 * wave if "norm" in name else 0.3 * wave)
    return model


def test_logits_are_those_of_the_published_model_code():
    tokens = (torch.arange(14).reshape(2, 7) * 5) % 19
    with torch.no_grad():
        logits = waves_(small())(tokens)
    # obtained once by running the published code (2025-08) on the same weights
    first = [0.49257808923721313, -0.24286654591560364, -0.051945123821496964, 0.33711057901382446]
    last = [0.37709736824035645, -0.3468356728553772, 0.25216713547706604, -0.11067138612270355]
    torch.testing.assert_close(logits[0, 0, :4], torch.tensor(first), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[1, 6, -4:], torch.tensor(last), rtol=0, atol=1e-5)
    assert float(logits.norm()) == pytest.approx(5.5690, abs=1e-3)


def test_parameters_carry_the_published_names():
    names = set(small().state_dict())
    assert {
        "token_embeddings_real.weight",
        "token_embeddings_imag.weight",
        "layer.1.self_attn.k_proj.weight_imag",
        "layer.0.self_attn.attn_layernorm.weight_real",
        "layer.0.mlp.ffn_layernorm.weight_imag",
        "layer.0.pre_layernorm.weight_real",
        "layer.0.post_layernorm.weight_real",
        "final_norm.weight_real",
        "lm_head.weight",
    } <= names
    assert len(names) == 2 + 2 * (2 * 7 + 2 * 4) + 2 + 1


def test_rotation_depends_on_the_distance_only_and_keeps_lengths():
    rotary = ComplexRotaryEmbedding(8)
    q, k = torch.randn(2, 2, 1, 8).double()

    def score(m, n):
        q_real, q_imag = rotary(q[0], q[1], torch.tensor([m]))
        k_real, k_imag = rotary(k[0], k[1], torch.tensor([n]))
        return float((q_real * k_real + q_imag * k_imag).sum())

    assert score(5, 2) == pytest.approx(score(103, 100), abs=1e-4)
    assert score(5, 2) == pytest.approx(score(3, 0), abs=1e-5)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)
    turned = torch.cat(rotary(q[0], q[1], torch.tensor([77])))
    assert float(turned.norm()) == pytest.approx(float(q.norm()), rel=1e-5)


def test_rotation_is_a_complex_product():
    rotary = ComplexRotaryEmbedding(6, base=100.0)
    x = torch.randn(2, 5, 6, dtype=torch.complex128)
    positions = torch.arange(3, 8)
    angle = positions[:, None] * 100.0 ** (-torch.arange(6) / 6)
    expected = x * torch.polar(torch.ones_like(angle), angle)
    real, imag = rotary(x.real, x.imag, positions)
    torch.testing.assert_close(torch.complex(real, imag), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_attention_is_the_complex_formula(kv_heads):
    layer = ComplexAttention(12, 3, kv_heads=kv_heads, weight_bits=None, act_bits=None)
    x = torch.randn(2, 5, 12, dtype=torch.complex64)

    def project(linear, value):
        weight = torch.complex(linear.weight_real, linear.weight_imag)
        return value.conj() @ weight.T

    def heads(value):
        return value.unflatten(-1, (-1, 4)).transpose(1, 2)

    turns = torch.arange(5)[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    turn = torch.polar(torch.ones_like(turns), turns)
    q = heads(project(layer.q_proj, x)) * turn
    k = heads(project(layer.k_proj, x)) * turn
    v = heads(project(layer.v_proj, x))
    k, v = (value.expand(2, 3, 5, 4) for value in (k, v))
    scores = torch.einsum("bhqd,bhkd->bhqk", q.conj(), k).real / 2
    weights = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
    mixed = torch.einsum("bhqk,bhkd->bhqd", weights.to(v.dtype), v).transpose(1, 2).flatten(2)
    root = (mixed.abs().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    expected = project(layer.o_proj, mixed * root)
    real, imag = layer(x.real.contiguous(), x.imag.contiguous())
    torch.testing.assert_close(torch.complex(real, imag), expected, rtol=0, atol=1e-5)


def test_norm_and_activation_by_hand():
    norm = ComplexRMSNorm(3, eps=1e-6)
    with torch.no_grad():
        norm.weight_imag.mul_(2)
    x = torch.randn(4, 3, dtype=torch.complex64)
    unit = x / (x.abs().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    real, imag = norm(x.real, x.imag)
    torch.testing.assert_close(real, unit.real)
    torch.testing.assert_close(imag, 2 * unit.imag)
    parts = torch.tensor([-1.0, -1.0, 2.0, 2.0]), torch.tensor([-3.0, 3.0, -3.0, 3.0])
    real, imag = ComplexReLUSquared()(*parts)
    assert real.tolist() == [0.0, 1.0, 4.0, 4.0]
    assert imag.tolist() == [0.0, 9.0, 9.0, 9.0]


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_decoding_with_a_cache_equals_the_whole_pass(kv_heads):
    model = waves_(small(kv_heads=kv_heads, weight_bits=None, act_bits=None))
    tokens = torch.randint(0, 19, (2, 9))
    with torch.no_grad():
        whole = model(tokens)
        cache = model.new_cache()
        parts = [model(tokens[:, a:b], cache=cache) for a, b in [(0, 4), (4, 5), (5, 8), (8, 9)]]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    assert cache[0].length == 9


def test_the_quantized_model_decodes_alike_where_no_code_is_on_an_edge():
    model = waves_(small())
    tokens = torch.randint(0, 19, (1, 6))
    with torch.no_grad():
        whole = model(tokens)
        cache = model.new_cache()
        parts = [model(tokens[:, i : i + 1], cache=cache) for i in range(6)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_later_tokens_do_not_change_earlier_logits():
    model = waves_(small())
    tokens = torch.randint(0, 19, (1, 8))
    other = tokens.clone()
    other[0, 5:] = (other[0, 5:] + 1) % 19
    with torch.no_grad():
        assert torch.equal(model(tokens)[:, :5], model(other)[:, :5])


def test_refusals():
    with pytest.raises(ValueError, match="heads must divide hidden_size = 12; got 5"):
        small(heads=5)
    with pytest.raises(ValueError, match="kv_heads must divide heads = 3; got 2"):
        small(kv_heads=2)
    with pytest.raises(ValueError, match="weight_bits must be one of 2, None"):
        small(weight_bits=4)
    model = small()
    with pytest.raises(ValueError, match=r"shape \(B, T\); got \(3,\)"):
        model(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="one entry a layer"):
        model(torch.zeros(1, 3, dtype=torch.int64), cache=[])
