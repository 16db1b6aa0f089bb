import copy

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust import nn as rnn
from pyrobust.quantize import QKReparamAttention


def batch(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def multihead(dim=12, heads=3, bias=True, seed=1):
    torch.manual_seed(seed)
    mha = nn.MultiheadAttention(dim, heads, bias=bias, batch_first=True).eval()
    if bias:
        nn.init.normal_(mha.in_proj_bias)
        nn.init.normal_(mha.out_proj.bias)
    return mha


class Fused(nn.Module):
    """The form of timm, optionally with a relative position bias."""

    def __init__(self, dim=12, heads=3, window=None):
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        nn.init.normal_(self.qkv.bias)
        self.attn_drop = nn.Dropout(0.0)
        self.q_norm = self.k_norm = nn.Identity()
        if window is not None:
            self.relative_position_bias_table = nn.Parameter(torch.randn(2 * window - 1, heads))
            steps = torch.arange(window)
            index = steps[:, None] - steps + window - 1
            self.register_buffer("relative_position_index", index)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * self.scale
        if hasattr(self, "relative_position_bias_table"):
            table = self.relative_position_bias_table[self.relative_position_index]
            scores = scores + table.permute(2, 0, 1)
        if mask is not None:
            windows = mask.repeat(len(x) // len(mask), 1, 1)
            scores = scores + windows[:, None]
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_float_path_has_the_probabilities_of_torch_with_biases():
    mha, x = multihead(), batch(2, 7, 12)
    layer = QKReparamAttention.from_float(mha, None)
    with torch.no_grad():
        out, weights = mha(x, x, x, average_attn_weights=False)
        assert torch.allclose(layer.probabilities(x), weights, atol=1e-5, rtol=0)
        assert torch.allclose(layer(x), out, atol=1e-5, rtol=1e-5)
        exact = copy.deepcopy(layer).double().probabilities(x.double())
        same = copy.deepcopy(mha).double()(*[x.double()] * 3, average_attn_weights=False)[1]
    assert float((exact - same).abs().max()) < 1e-13


def test_dropping_the_bias_warns_and_changes_the_attention():
    mha, x = multihead(), batch(2, 7, 12)
    with pytest.warns(UserWarning, match="query bias is not zero and is dropped"):
        dropped = QKReparamAttention.from_float(mha, None, exact_bias=False)
    kept = QKReparamAttention.from_float(mha, None)
    with torch.no_grad():
        assert (dropped.probabilities(x) - kept.probabilities(x)).abs().max() > 1e-2
    QKReparamAttention.from_float(multihead(bias=False), None, exact_bias=False)  # nothing to warn


def test_key_bias_alone_changes_nothing():
    mha, x = multihead(), batch(2, 7, 12)
    layer = QKReparamAttention.from_float(mha, None)
    with torch.no_grad():
        mha.in_proj_bias[12:24] += 5.0
        assert torch.allclose(layer(x), mha(x, x, x)[0], atol=1e-5, rtol=1e-5)


def test_fused_form_with_relative_bias_and_window_masks():
    torch.manual_seed(3)
    module = Fused(window=6).eval()
    layer = QKReparamAttention.from_float(module, None)
    x, mask = batch(4, 6, 12), -100.0 * (batch(2, 6, 6, seed=5) > 1)
    with torch.no_grad():
        for given in (None, mask):
            assert torch.allclose(layer(x, given), module(x, given), atol=1e-5, rtol=1e-5)


def test_rounded_path_follows_the_equations():
    layer = QKReparamAttention.from_float(multihead(), 3, 4)
    x = batch(2, 7, 12)
    with torch.no_grad():
        layer(x)
        xq = layer.input_activation(x)
        matrix = layer.qk_quantizer(layer.qk_matrix(), storable=True).reshape(3, 12, 12)
        t = layer.qk_activation(torch.einsum("hij,bnj->bnhi", matrix, xq).flatten(2))
        t = t.reshape(2, 7, 3, 12)
        scores = torch.einsum("bni,bmhi->bhnm", xq, t)
        key, bias = layer.key.reshape(3, 4, 12), layer.query_bias.reshape(3, 4)
        scores = scores + torch.einsum("hed,he,bmd->bhm", key, bias, xq)[:, :, None]
        probabilities = layer.probability_activation((scores / 2).softmax(-1))
        v = layer.value_activation(layer.value(xq)).reshape(2, 7, 3, 4)
        expected = layer.proj(torch.einsum("bhnm,bmhe->bnhe", probabilities, v).flatten(2))
    assert torch.allclose(layer(x), expected, atol=1e-5)
    levels = probabilities / layer.probability_activation.scale
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert levels.min() >= 0


def test_gradient_reaches_both_factors_and_the_mask_acts():
    layer = QKReparamAttention.from_float(multihead(), 2).train()
    x = batch(2, 7, 12)
    captured = {}

    def backward(boundary):
        layer.zero_grad()
        layer.boundary = boundary
        matrix = layer.qk_matrix()
        matrix.register_hook(lambda g: captured.__setitem__("grad", g.clone()))
        layer.qk_matrix = lambda: matrix
        try:
            layer(x).square().sum().backward()
        finally:
            del layer.qk_matrix
        return captured["grad"]

    free = backward(None)
    assert (layer.query.grad != 0).any()
    assert (layer.key.grad != 0).any()
    masked = backward(0.02)
    near = layer.qk_quantizer.near_boundary(
        layer.qk_matrix(), 0.02, scale=layer.qk_quantizer.scale(layer.qk_matrix(), storable=True)
    )
    assert 0 < int(near.sum()) < near.numel()
    assert torch.equal(masked, torch.where(near, free, 0))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("w_bits", [1, 2, 4])
def test_packed_attention_computes_what_was_simulated(w_bits, per_token):
    torch.manual_seed(2)
    layer = QKReparamAttention.from_float(Fused(window=7).eval(), w_bits, 4, per_token=per_token)
    x = batch(3, 7, 12)
    with torch.no_grad():
        layer(x)
        packed = pyrobust.pack(nn.Sequential(layer))
        assert isinstance(packed[0], rnn.PackedQKAttention)
        expected = layer(x)
        assert float((packed(x) - expected).norm() / expected.norm()) <= 1e-5
        half = copy.deepcopy(layer).bfloat16()
        out = pyrobust.pack(nn.Sequential(half))(x.bfloat16()).float()
        assert float((out - half(x.bfloat16()).float()).norm() / out.norm()) <= 1e-3
    report = pyrobust.pack_report(packed)
    assert [row.name for row in report.packed] == ["0.qk", "0.value", "0.proj"]


def test_packed_attention_goes_through_a_file(tmp_path):
    def make(seed):
        layer = QKReparamAttention.from_float(multihead(seed=seed), 2, 4)
        layer(batch(2, 7, 12))
        return pyrobust.pack(nn.Sequential(layer))

    first, second, x = make(1), make(2), batch(2, 7, 12)
    pyrobust.save(first, tmp_path / "attention.safetensors")
    assert not torch.equal(first(x), second(x))
    pyrobust.load(tmp_path / "attention.safetensors", second)
    assert torch.equal(first(x), second(x))


def test_forms_that_one_matrix_cannot_express_are_refused():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.MultiheadAttention"):
        QKReparamAttention.from_float(nn.Linear(2, 2))
    normed = Fused()
    normed.q_norm = nn.LayerNorm(4)
    with pytest.raises(ValueError, match=r"must not normalise.*q_norm"):
        QKReparamAttention.from_float(normed)
    scaled = Fused()
    scaled.scale = 1.0
    with pytest.raises(ValueError, match=r"must scale its scores by 0\.5; got 1"):
        QKReparamAttention.from_float(scaled)
    with pytest.raises(ValueError, match="num_heads must divide dim = 10; got 3"):
        QKReparamAttention(10, 3)
    uneven = Fused()
    uneven.num_heads = 5
    with pytest.raises(ValueError, match="5 heads divide"):
        QKReparamAttention.from_float(uneven)
    with pytest.raises(ValueError, match="queries, keys and values of one width"):
        QKReparamAttention.from_float(nn.MultiheadAttention(8, 2, kdim=4, vdim=4))
    with pytest.raises(ValueError, match="bits must be at most 8"):
        QKReparamAttention.from_float(multihead(), 9)
    with pytest.raises(ValueError, match="w_bits must be set to pack"):
        pyrobust.pack(nn.Sequential(QKReparamAttention.from_float(multihead(), None)))
    with pytest.raises(ValueError, match=r"x must have shape \(\*, \*, 12\)"):
        QKReparamAttention.from_float(multihead(), 2)(batch(7, 12))
