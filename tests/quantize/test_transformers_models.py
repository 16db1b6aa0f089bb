"""Hugging Face models, built here from small configurations, convert with one call."""

import copy

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust.nn.packed_module import PackedModule
from pyrobust.quantize import GPTQ, HessianAccumulator

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def language_models():
    """One of each kind: how the hidden state, masks and positions reach a block differs."""
    t = transformers
    sliding = {"sliding_window": 8, "head_dim": 8, "num_key_value_heads": 2}
    return {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, num_key_value_heads=2)),
        "qwen3": lambda: t.Qwen3ForCausalLM(
            t.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)
        ),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**SIZES, **sliding)),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(**{**SIZES, "ffn_dim": 48}, word_embed_proj_dim=32)
        ),
        "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES)),
    }


def vit(classes=10):
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_labels=classes,
    )
    return transformers.ViTForImageClassification(config)


KINDS = ["llama", "qwen3", "gemma3", "opt", "gpt_neox", "vit"]


def case_of(kind):
    torch.manual_seed(0)
    if kind == "vit":
        return vit().eval(), [torch.rand(5, 1, 8, 8) for _ in range(2)]
    tokens = [torch.randint(0, 64, (3, length)) for length in (16, 12)]
    return language_models()[kind]().eval(), [{"input_ids": each} for each in tokens]


def run(model, batch):
    with torch.no_grad():
        return (model(**batch) if isinstance(batch, dict) else model(batch)).logits


class FakeQuantized(nn.Module):
    """Computes in float32 with the weight that a packed layer stands for."""

    def __init__(self, packed, layer):
        super().__init__()
        self.layer = copy.deepcopy(layer).float()
        self.layer.weight.data = packed.dequantize()

    @property
    def weight(self):  # some models ask for its dtype
        return self.layer.weight

    def forward(self, x):
        y = self.layer(x.float() if x.is_floating_point() else x)
        return y.to(x.dtype) if x.is_floating_point() else y


def fake_quantized(model, packed):
    fake = copy.deepcopy(model)
    for name, module in packed.named_modules():
        if isinstance(module, PackedModule):
            parent, _, leaf = name.rpartition(".")
            layer = fake.get_submodule(name)
            setattr(fake.get_submodule(parent), leaf, FakeQuantized(module, layer))
    return fake


@pytest.mark.parametrize("kind", KINDS)
def test_converts_block_by_block_and_computes_what_was_quantized(kind, tmp_path):
    model, data = case_of(kind)
    before = copy.deepcopy(model.state_dict())
    blocks = []

    class Watching(GPTQ):
        def quantize_block(self, block):
            blocks.append((block.name, len(block.layers), len(block.groups())))
            super().quantize_block(block)

    skip = [] if kind == "vit" else ["*embed*"]
    options = {"bits": 4, "group_size": 16, "calibration": data, "skip": skip}
    packed = pyrobust.pack(model, quantizer=Watching(), **options)
    inner = [each for each in blocks if each[0].rpartition(".")[2] in ("0", "1", "2")]
    assert len(inner) == 3
    assert len({each[1:] for each in inner}) == 1
    assert inner[0][1] == {"llama": 7, "qwen3": 7, "gemma3": 7}.get(kind, inner[0][1])
    assert inner[0][2] == {"llama": 4, "qwen3": 4, "gemma3": 4}.get(kind, inner[0][2])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    rows = pyrobust.pack_report(packed).packed
    assert all(row.output_error is not None for row in rows if row.type == "Linear")

    fake = fake_quantized(model, packed)
    for batch in data:
        exact = run(fake, batch)
        assert (run(packed, batch) - exact).norm() <= 1e-5 * exact.norm()

    with pytest.raises(ZeroDivisionError):
        pyrobust.pack(model, quantizer=Stopping(), resume=tmp_path, **options)
    resumed = pyrobust.pack(model, quantizer=GPTQ(), resume=tmp_path, **options)
    for (name, one), other in zip(
        packed.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


class Stopping(GPTQ):
    def quantize_block(self, block):
        if block.name.endswith("2"):
            raise ZeroDivisionError
        super().quantize_block(block)


Stopping.__module__, Stopping.__qualname__ = GPTQ.__module__, GPTQ.__qualname__


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_in_bfloat16_it_computes_what_was_quantized(kind):
    model, data = case_of(kind)
    packed = pyrobust.pack(model, bits=4, group_size=16, quantizer="gptq", calibration=data)
    fake = fake_quantized(model.bfloat16(), packed).bfloat16()
    packed = packed.bfloat16()
    for module in fake.modules():
        if isinstance(module, FakeQuantized):
            module.layer.float()
    layers = dict(packed.named_modules())
    for name, module in fake.named_modules():
        if isinstance(module, FakeQuantized) and not isinstance(module.layer, nn.Embedding):
            layer = module.layer
            shape = (64, layer.in_features) if isinstance(layer, nn.Linear) else (64, 1, 8, 8)
            x = torch.randn(shape).bfloat16()
            layer.weight.data = layers[name].dequantize()
            exact = module(x).float()
            assert (layers[name](x).float() - exact).norm() <= 1e-3 * exact.norm(), name


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_inputs_of_a_block_are_those_of_the_model_quantized_so_far(kind):
    model, data = case_of(kind)
    seen = {}

    class Watching(GPTQ):
        def quantize_block(self, block):
            for group in block.groups():
                seen.update(block.hessians(group))
                for name in group:
                    super_install(block, name)

    def super_install(block, name):
        packed = pyrobust.quantize.round_to_nearest(block.weight(name), **block.formats[name])
        block.install(name, packed)

    packed = pyrobust.pack(
        model, bits=3, group_size=16, quantizer=Watching(), calibration=data, skip=["*embed*"]
    )
    name = "model.layers.2.self_attn.q_proj"
    accumulator = HessianAccumulator(32)
    layer = packed.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, args: accumulator.add(args[0]))
    for batch in data:
        run(packed, batch)
    handle.remove()
    torch.testing.assert_close(seen[name], accumulator.hessian(), rtol=1e-3, atol=1e-4)
