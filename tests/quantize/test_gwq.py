"""GWQ: masks, exact outliers, ranges without them, and what the gradient finds."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyrobust
from pyrobust.nn import DenseSparseLinear
from pyrobust.quantize import (
    GWQ,
    gwq_quantize,
    outlier_columns,
    outlier_mask,
    quantize_with_outliers,
    round_to_nearest,
    sensitivity,
)

from .docstring_text import docstring_bytes, windows


def heavy(rows=24, columns=50):
    """A weight with a few large entries."""
    weight = torch.randn(rows, columns)
    weight[torch.rand(rows, columns) < 0.02] *= 10
    return weight


# -- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.29, 1.0])
def test_the_mask_is_the_top_of_the_scores(fraction):
    score = torch.rand(25, 40)
    mask = outlier_mask(score, score, fraction)
    count = math.floor(round(fraction * 1000, 6))
    assert int(mask.sum()) == count
    order = np.argpartition(-score.flatten().numpy(), max(count - 1, 0))[:count]
    expected = np.zeros(1000, dtype=bool)
    expected[order] = True
    assert np.array_equal(mask.flatten().numpy(), expected)


def test_ties_go_to_the_first():
    mask = outlier_mask(torch.zeros(6), torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0, 1.0]), 0.5)
    assert mask.tolist() == [True, True, True, False, False, False]


def test_columns_are_kept_whole_only_where_that_is_shorter():
    mask = torch.zeros(40, 30, dtype=torch.bool)
    mask[:30, 7] = True  # 30 of 40 rows
    mask[:3, 2] = True
    assert outlier_columns(mask).tolist() == [7]
    assert outlier_columns(mask, share=0.95).tolist() == []  # column 2 is mostly unmarked
    mask[:, 2] = True
    assert outlier_columns(mask).tolist() == [2, 7]
    assert outlier_columns(torch.rand(40, 30) < 0.01).tolist() == []
    assert outlier_columns(torch.zeros(4, 3, dtype=torch.bool)).tolist() == []


# -- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_kept_weights_are_exact_and_the_others_within_half_a_step(bits, group_dim, symmetric):
    weight = heavy()
    mask = weight.abs() > 4
    form = {"bits": bits, "group_size": 16, "group_dim": group_dim, "symmetric": symmetric}
    packed = quantize_with_outliers(weight, mask, **form)
    values = packed.dequantize()
    assert torch.equal(values[mask], weight.half().float()[mask])
    scale = packed.scale.float().repeat_interleave(16, group_dim)[:24, :50]
    inside = ~mask
    assert bool(((values - weight).abs() <= scale / 2 * 1.001 + 1e-6)[inside].all())
    zero = torch.full_like(packed.scale, 2 ** (bits - 1)) if symmetric else packed.zero
    neutral = zero.float().repeat_interleave(16, group_dim)[:24, :50]
    assert torch.equal(packed.unpack_codes()[mask].float(), neutral[mask])


def test_nothing_kept_is_plain_rounding_and_everything_kept_is_float16():
    weight = heavy()
    none, everything = torch.zeros(24, 50, dtype=torch.bool), torch.ones(24, 50, dtype=torch.bool)
    plain = round_to_nearest(weight, bits=3, group_size=16)
    packed = quantize_with_outliers(weight, none, bits=3, group_size=16)
    assert packed.remainder is None
    assert torch.equal(packed.codes, plain.codes)
    assert torch.equal(packed.scale, plain.scale)
    assert torch.equal(packed.zero, plain.zero)
    whole = quantize_with_outliers(weight, everything, bits=3, group_size=16)
    assert torch.equal(whole.dequantize(), weight.half().float())
    bfloat = weight.bfloat16()
    whole = quantize_with_outliers(bfloat, everything, bits=3)
    assert torch.equal(whole.dequantize(), bfloat.float())


def test_outliers_do_not_widen_the_range_of_their_group():
    weight = heavy()
    mask = outlier_mask(weight, weight.abs(), 0.03)
    with_mask = quantize_with_outliers(weight, mask, bits=4, group_size=8)
    without = round_to_nearest(weight, bits=4, group_size=8)
    assert bool((with_mask.scale <= without.scale).all())
    assert bool((with_mask.scale < without.scale).any())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_second_level_keeps_outliers_exact_and_errors_near(bits):
    weight = heavy(16, 300)
    mask = weight.abs() > 4
    one = quantize_with_outliers(weight, mask, bits=bits)
    two = quantize_with_outliers(weight, mask, bits=bits, second_level=True)
    assert torch.equal(two.dequantize()[mask], weight.half().float()[mask])
    first, second = ((p.dequantize() - weight).square().mean() for p in (one, two))
    assert float(second) < 1.15 * float(first)  # 1.08 at 4 bits, 1.01 at 2
    assert not torch.equal(one.scale, two.scale)


def test_weight_refusals():
    weight = heavy()
    mask = weight.abs() > 4
    for bits in (1, 1.58, 5, 9):
        with pytest.raises(ValueError, match="bits must be one of 2, 3, 4, 8"):
            quantize_with_outliers(weight, mask, bits=bits)
    with pytest.raises(ValueError, match="mask must have shape"):
        quantize_with_outliers(weight, mask[:2])
    with pytest.raises(ValueError, match="group_dim must be 1 with second_level"):
        quantize_with_outliers(weight, mask, group_dim=0, second_level=True)
    with pytest.raises(ValueError, match="values must be finite"):
        quantize_with_outliers(weight.sign() * 3.4e38, mask)  # rounds up beyond bfloat16
    with pytest.raises(ValueError, match=r"fraction must lie in the interval \[0, 1\]; got 1.5"):
        outlier_mask(weight, weight, 1.5)
    with pytest.raises(ValueError, match="score must be finite"):
        outlier_mask(weight, weight * torch.nan, 0.5)


# -- models --------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        parts = self.qkv(self.attention_norm(x)).chunk(3, -1)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class CharacterModel(nn.Module):
    def __init__(self, width=96, heads=4, layers=2, length=64):
        super().__init__()
        self.table, self.place = nn.Embedding(128, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128)

    def forward(self, tokens):
        x = self.table(tokens) + self.place(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


OUTSIDE = ("table", "place", "head")


@pytest.fixture
def model():
    return CharacterModel(width=32, length=16).eval()


@pytest.fixture
def tokens():
    return torch.randint(0, 128, (3, 17))


def linear_names(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"]


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("second_level", [False, True])
def test_a_packed_model_is_the_simulated_one(model, tokens, bits, second_level):
    quantizer = GWQ(0.02, second_level=second_level)
    options = {"bits": bits, "group_size": 8, "skip": OUTSIDE}
    packed = pyrobust.pack(model, quantizer=quantizer, calibration=tokens, **options)
    simulated = copy.deepcopy(model)
    scores = sensitivity(model, tokens, layers=linear_names(model))
    for name in linear_names(model):
        layer = simulated.get_submodule(name)
        mask = outlier_mask(layer.weight, scores[name], 0.02)
        mask[:, outlier_columns(mask)] = True
        form = {"bits": bits, "group_size": 8, "second_level": second_level}
        weight = quantize_with_outliers(layer.weight, mask, **form).dequantize()
        assert torch.equal(packed.get_submodule(name).dequantize(), weight)
        layer.weight.data = weight
    with torch.no_grad():
        expected = simulated(tokens[:, :-1])
        torch.testing.assert_close(packed(tokens[:, :-1]), expected, rtol=1e-5, atol=1e-5)
    for name in linear_names(model):
        layer, other = packed.get_submodule(name).bfloat16(), simulated.get_submodule(name)
        x = torch.randn(33, layer.in_features).bfloat16()
        with torch.no_grad():
            expected = F.linear(x.float(), other.weight, layer.bias.float()).bfloat16()
            gap = (layer(x) - expected).float().norm() / expected.float().norm()
        assert float(gap) < 1e-3


def test_gwq_is_a_name_of_pack(model, tokens):
    by_name = pyrobust.pack(model, quantizer="gwq", calibration=tokens, skip=OUTSIDE, bits=3)
    by_object = pyrobust.pack(model, quantizer=GWQ(), calibration=tokens, skip=OUTSIDE, bits=3)
    for name in linear_names(model):
        first, second = by_name.get_submodule(name), by_object.get_submodule(name)
        assert torch.equal(first.dequantize(), second.dequantize())
        assert first.qtensor.remainder.count >= math.floor(0.01 * first.dequantize().numel())


def test_global_ranking_keeps_the_best_of_all_layers(model, tokens):
    quantizer = GWQ(0.02, ranking="global", whole_columns=False)
    packed = pyrobust.pack(model, quantizer=quantizer, calibration=tokens, skip=OUTSIDE, bits=4)
    scores = sensitivity(model, tokens, layers=linear_names(model))
    everything = torch.cat([score.flatten() for score in scores.values()])
    mask = outlier_mask(everything, everything, 0.02)
    for (name, score), part in zip(
        scores.items(), mask.split([s.numel() for s in scores.values()]), strict=True
    ):
        remainder = packed.get_submodule(name).qtensor.remainder
        kept = torch.zeros_like(score, dtype=torch.bool)
        if remainder is not None:
            kept[remainder.rows, remainder.columns.long()] = True
        assert torch.equal(kept, part.reshape(score.shape))


@pytest.mark.parametrize("score", ["grad*weight", "fisher", "hessian-diag", "magnitude", "random"])
def test_every_score_packs(model, tokens, score):
    quantizer = GWQ(0.01, score=score)
    packed = pyrobust.pack(model, quantizer=quantizer, calibration=tokens, skip=OUTSIDE)
    again = pyrobust.pack(model, quantizer=quantizer, calibration=tokens, skip=OUTSIDE)
    for name in linear_names(model):
        first, second = packed.get_submodule(name), again.get_submodule(name)
        assert torch.equal(first.dequantize(), second.dequantize())


def test_embeddings_and_convolutions(tokens):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.conv = nn.Embedding(128, 8), nn.Conv2d(8, 6, 3, padding=1)
            self.head = nn.Linear(6, 128)

        def forward(self, batch):
            x = self.table(batch)[:, None].movedim(-1, 1)
            return self.head(self.conv(x)[:, :, 0].movedim(1, -1))

    model = Net().eval()
    packed = pyrobust.pack(model, quantizer=GWQ(0.1), calibration=tokens, group_size=4)
    plain = round_to_nearest(model.table.weight, bits=4, group_size=4)
    assert torch.equal(packed.table.dequantize(), plain.dequantize())
    score = sensitivity(model, tokens, layers=["conv"])["conv"]
    mask = outlier_mask(score, score, 0.1)
    assert torch.equal(packed.conv.dequantize()[mask], model.conv.weight.half().float()[mask])


def test_a_shared_weight_is_scored_over_all_uses_and_packed_once(model, tokens):
    model.blocks[1].up = model.blocks[0].up
    packed = pyrobust.pack(model, quantizer=GWQ(0.02), calibration=tokens, skip=OUTSIDE)
    assert packed.blocks[0].up.codes is packed.blocks[1].up.codes


def test_a_saved_model_loads_and_its_file_has_the_counted_size(model, tokens, tmp_path):
    wide = CharacterModel(width=320, layers=1, length=16).eval()
    packed = pyrobust.pack(wide, quantizer=GWQ(), calibration=tokens, group_size=32, skip=OUTSIDE)
    path = tmp_path / "model.safetensors"
    pyrobust.save(packed, path)
    loaded = pyrobust.load(path, CharacterModel(width=320, layers=1, length=16).eval())
    with torch.no_grad():
        assert torch.equal(loaded(tokens[:, :-1]), packed(tokens[:, :-1]))
    weights = [packed.get_submodule(name).qtensor for name in linear_names(wide)]
    bits = sum(w.bits_per_weight * w.shape[0] * w.shape[1] for w in weights)
    rest = sum(p.numel() * p.element_size() for p in packed.parameters())
    assert path.stat().st_size == pytest.approx(bits / 8 + rest, rel=0.01)


@pytest.mark.parametrize("second_level", [False, True])
def test_gwq_quantize_packs_the_blocks_and_saves_compactly(tokens, tmp_path, second_level):
    model = CharacterModel(width=320, layers=1, length=16).eval()
    packed = gwq_quantize(model, tokens, second_level=second_level)
    names = linear_names(model)
    for name in names:
        assert isinstance(packed.get_submodule(name), DenseSparseLinear)
    assert type(packed.head) is nn.Linear
    assert type(model.blocks[0].up) is nn.Linear
    quantizer = GWQ(second_level=second_level)
    options = {"calibration": tokens, "group_size": 16, "skip": OUTSIDE}
    plain = pyrobust.pack(model, quantizer=quantizer, **options)
    with torch.no_grad():
        logits = packed(tokens[:, :-1])
        assert torch.equal(logits, plain(tokens[:, :-1]))
    path = tmp_path / "model.safetensors"
    pyrobust.save(packed, path)
    loaded = pyrobust.load(path, CharacterModel(width=320, layers=1, length=16).eval())
    with torch.no_grad():
        assert torch.equal(loaded(tokens[:, :-1]), logits)
    layers = [packed.get_submodule(name) for name in names]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    bits = sum(layer.bits_per_weight * layer.in_features * layer.out_features for layer in layers)
    nominal = 4 + (6 / 16 + 48 / 256 if second_level else 20 / 16) + 0.32
    assert bits / weights == pytest.approx(nominal, rel=0.03)  # 20 groups are 2 super-groups
    rest = sum(p.numel() * p.element_size() for p in packed.parameters())
    assert path.stat().st_size == pytest.approx(bits / 8 + rest, rel=0.01)
    report = pyrobust.pack_report(packed)
    assert sum(row.bytes_after for row in report.packed) == bits / 8
    assert report.bytes_after == bits / 8 + rest


def test_gwq_quantize_keeps_shared_weights_shared(model, tokens, tmp_path):
    model.blocks[1].up = copy.copy(model.blocks[0].up)  # another layer, the same weight
    packed = gwq_quantize(model, tokens, outlier_fraction=0.02)
    first, second = packed.blocks[0].up, packed.blocks[1].up
    assert first is not second
    assert first.codes is second.codes
    assert first.outlier_values is second.outlier_values


def test_gwq_quantize_takes_named_layers(model, tokens):
    packed = gwq_quantize(model, tokens, layers=["head", "blocks.0.up"])
    kinds = {n for n, m in packed.named_modules() if isinstance(m, DenseSparseLinear)}
    assert kinds == {"head", "blocks.0.up"}
    with pytest.raises(ValueError, match=r"layers must name torch\.nn\.Linear layers .* 'table'"):
        gwq_quantize(model, tokens, layers=["table"])


def test_a_hugging_face_model_converts_with_the_same_call(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 64, (2, 20))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    packed = gwq_quantize(model, [batch])
    assert sum(isinstance(m, DenseSparseLinear) for m in packed.modules()) == 2 * 7
    assert type(packed.lm_head) is nn.Linear
    path = tmp_path / "model.safetensors"
    pyrobust.save(packed, path)
    loaded = pyrobust.load(path, transformers.LlamaForCausalLM(config).eval())
    with torch.no_grad():
        logits = packed(tokens).logits
        assert torch.equal(loaded(tokens).logits, logits)
        expected = model(tokens).logits
    assert float((logits - expected).norm() / expected.norm()) < 0.1


def test_model_refusals(model, tokens):
    def pack(quantizer=None, calibration=tokens, target=model, **options):
        options = {"skip": OUTSIDE, **options}
        return pyrobust.pack(
            target, quantizer=quantizer or GWQ(), calibration=calibration, **options
        )

    with pytest.raises(ValueError, match="outlier_fraction must be below 1"):
        GWQ(1)
    with pytest.raises(ValueError, match="outlier_fraction must lie in"):
        GWQ(-0.1)
    with pytest.raises(ValueError, match="score must be one of"):
        GWQ(score="hessian")
    with pytest.raises(ValueError, match="ranking must be one of"):
        GWQ(ranking="model")
    with pytest.raises(ValueError, match="bits must be one of 2, 3, 4, 8; got 1"):
        pack(bits=1)
    with pytest.raises(ValueError, match="at least one batch"):
        pack(calibration=[])
    with pytest.raises(ValueError, match="evaluation mode"):
        pack(target=CharacterModel(width=32, length=16))
    with pytest.raises(ValueError, match="frozen"):
        pack(target=copy.deepcopy(model).requires_grad_(False))
    packed = pack()
    with pytest.raises(ValueError, match="already packed"):
        pack(target=packed)


# -- what a small language model shows -------------------------------------------------------------


def trained_model(text, steps=500):
    torch.manual_seed(0)
    model = CharacterModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                3e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
            )
        rows = windows(text, 65, 24, generator)
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def perplexity(model, text):
    rows = text[: 65 * 300].view(-1, 65)
    with torch.no_grad():
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    return math.exp(loss)


def inject_outliers_(model, factor=20):
    """One channel of each norm up, its column of the next layer down: the same function."""
    columns = {}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            for norm, layer in (("attention_norm", "qkv"), ("mlp_norm", "up")):
                channel = int(torch.randint(0, 96, (1,), generator=generator))
                getattr(block, norm).weight[channel] *= factor
                getattr(block, norm).bias[channel] *= factor
                getattr(block, layer).weight[:, channel] /= factor
                columns[f"blocks.{i}.{layer}"] = channel
    return columns


@pytest.mark.slow
def test_gradients_find_injected_outliers_and_win_at_four_bits():
    text = docstring_bytes()
    cut = len(text) * 9 // 10
    model = trained_model(text[:cut])
    calibration = text[: 8 * 65].view(8, 65)
    figures = {}

    def measure(label, bits, quantizer):
        options = {} if quantizer is None else {"quantizer": quantizer, "calibration": calibration}
        packed = pyrobust.pack(model, bits=bits, group_size=32, skip=OUTSIDE, **options)
        figures[label] = perplexity(packed, text[cut:])
        return figures[label]

    for score in ("grad", "magnitude"):
        measure(f"2 bits, no outliers, {score}", 2, GWQ(score=score, whole_columns=False))
    measure("2 bits, no outliers, nearest", 2, None)

    before = perplexity(model, text[cut:])
    columns = inject_outliers_(model)
    assert perplexity(model, text[cut:]) == pytest.approx(before, rel=1e-5)
    scores = sensitivity(model, calibration, layers=list(columns))
    for name, channel in columns.items():
        mask = outlier_mask(scores[name], scores[name], 0.01)
        share = float(mask[:, channel].sum() / mask.sum())
        figures[f"share in the column, {name}"] = share
        assert share >= 0.5

    for bits in (4, 3):
        measure(f"{bits} bits, nearest", bits, None)
        for score in ("random", "magnitude", "grad", "hessian-diag"):
            measure(f"{bits} bits, {score}", bits, GWQ(score=score, whole_columns=False))
    fractions = (0.001, 0.005, 0.01, 0.02, 0.05)
    curve = [measure(f"3 bits, {f}", 3, GWQ(f, whole_columns=False)) for f in fractions]
    measure("4 bits, grad, whole columns", 4, GWQ())
    measure("4 bits, grad, whole columns, second level", 4, GWQ(second_level=True))
    print({name: round(value, 3) for name, value in {"float": before, **figures}.items()})

    gap = figures["4 bits, nearest"] - before
    assert figures["4 bits, nearest"] - figures["4 bits, grad"] >= 0.4 * gap
    assert figures["4 bits, grad"] < min(figures["4 bits, random"], figures["4 bits, magnitude"])
    assert figures["3 bits, grad"] < min(figures["3 bits, random"], figures["3 bits, magnitude"])
    assert all(later < earlier for earlier, later in itertools.pairwise(curve))


@pytest.mark.parametrize(
    ("fraction", "size", "count"), [(0.29, 100, 29), (0.57, 100, 57), (0.015, 100, 1), (1.0, 7, 7)]
)
def test_the_share_kept_is_the_decimal_that_was_written(fraction, size, count):
    score = torch.randperm(size, generator=torch.Generator().manual_seed(0)).float()
    assert int(outlier_mask(score, score, fraction).sum()) == count


@pytest.mark.parametrize(
    ("size", "dtype"), [(1e-7, torch.bfloat16), (1.0, torch.float16), (1e6, torch.bfloat16)]
)
def test_kept_weights_of_any_size_keep_their_digits(size, dtype):
    weight = size * torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    mask = weight.abs() > 1.5 * size
    packed = quantize_with_outliers(weight, mask)
    assert packed.remainder.values.dtype == dtype
    torch.testing.assert_close(packed.dequantize()[mask], weight[mask], rtol=2.0**-8, atol=0)
    layer = DenseSparseLinear.from_qtensor(packed)
    again = DenseSparseLinear.from_qtensor(quantize_with_outliers(torch.ones(8, 32), mask))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.dequantize(), packed.dequantize())
