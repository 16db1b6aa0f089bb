"""Hugging Face models, built here from small configurations, convert with one call."""

import copy

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust.nn.packed_module import PackedModule
from pyrobust.quantize import GPTQ, GWQ, AdaDim, HessianAccumulator, LearnedRounding, gwq_quantize

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
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**SIZES, num_key_value_heads=2)),
        "tied llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, tie_word_embeddings=True)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=64, n_embd=32, n_inner=48, n_layer=3, n_head=4, n_positions=64)
        ),
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


KINDS = ["llama", "qwen3", "gemma3", "opt", "gpt_neox", "mistral", "tied llama", "gpt2", "vit"]
EMBEDDINGS = {"vit": [], "gpt2": ["*wte", "*wpe"]}
SEVEN = ("llama", "qwen3", "gemma3", "mistral", "tied llama")  # layers of a block, on four inputs


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
    """Computes in float32 with the weight that a packed layer stands for; rounds the output."""

    def __init__(self, packed, layer):
        super().__init__()
        self.layer = copy.deepcopy(layer).float()
        self.dtype = layer.weight.dtype
        weight = packed.dequantize()
        self.layer.weight.data = weight.t() if type(layer).__name__ == "Conv1D" else weight
        if packed.bias is not None:
            self.layer.bias.data = packed.bias.float()

    @property
    def weight(self):  # some models ask for its dtype
        return self.layer.weight.to(self.dtype)

    def forward(self, x):
        return self.layer(x.float() if x.is_floating_point() else x).to(self.dtype)


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

    skip = EMBEDDINGS.get(kind, ["*embed*"])
    options = {"bits": 4, "group_size": 16, "calibration": data, "skip": skip}
    packed = pyrobust.pack(model, quantizer=Watching(), **options)
    inner = [each for each in blocks if each[0].rpartition(".")[2] in ("0", "1", "2")]
    assert len(inner) == 3
    assert len({each[1:] for each in inner}) == 1
    if kind in SEVEN:
        assert inner[0][1:] == (7, 4)
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


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_the_whole_model_computes_what_was_quantized(kind):
    model, data = case_of(kind)
    packed = pyrobust.pack(model, bits=4, group_size=16, quantizer="gptq", calibration=data)
    packed = packed.bfloat16()
    fake = fake_quantized(model.bfloat16(), packed)
    for batch in data:
        batch = batch if isinstance(batch, dict) else batch.bfloat16()
        exact = run(fake, batch)
        assert exact.dtype == torch.bfloat16
        assert run(packed, batch).dtype == torch.bfloat16
        gap = (run(packed, batch).float() - exact.float()).norm()
        # Inputs rounded to 16 bits a group move a layer's result to a neighbour in bfloat16 now
        # and then: through a few layers that is what the type's own rounding costs either model.
        assert gap <= 2.0**-7 * exact.float().norm()


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


QUANTIZERS = {
    "gptq": lambda: "gptq",
    "adadim": lambda: "adadim",
    "learned_rounding": lambda: LearnedRounding(iterations=3, batch_size=2),
    "gwq": lambda: "gwq",
    "gwq of all layers": lambda: GWQ(ranking="global"),
}


@pytest.mark.parametrize("kind", ["gpt2", "tied llama"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_quantizer_converts_transposed_layers_and_tied_embeddings(kind, quantizer, tmp_path):
    model, data = case_of(kind)
    before = {name: (module, type(module)) for name, module in model.named_modules()}
    packed = pyrobust.pack(
        model,
        bits=3,
        group_size=16,
        quantizer=QUANTIZERS[quantizer](),
        calibration=data,
        resume=tmp_path / "folder",
    )
    assert before == {name: (module, type(module)) for name, module in model.named_modules()}
    assert not any(type(m).__name__ in ("Conv1D", "Linear") for m in packed.modules())
    head, table = packed.lm_head, packed.get_input_embeddings()
    assert head.codes.data_ptr() == table.codes.data_ptr()
    fake = fake_quantized(model, packed)
    exact = run(fake, data[0])
    assert (run(packed, data[0]) - exact).norm() <= 1e-5 * exact.norm()
    pyrobust.save(packed, tmp_path / "packed.safetensors")
    loaded = pyrobust.load(tmp_path / "packed.safetensors", case_of(kind)[0])
    assert torch.equal(run(loaded, data[0]), run(packed, data[0]))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adadim_compares_attention_and_mlp_as_a_whole_and_their_last_layers_alone(kind):
    model, data = case_of(kind)
    report = AdaDim(bits=3, group_size=16).quantize_(model, data)
    whole = {
        "llama": ("self_attn", ("q_proj", "k_proj", "v_proj"), "mlp", ("gate_proj", "up_proj")),
        "gpt2": ("attn", ("c_attn",), "mlp", ("c_fc",)),
    }[kind]
    last = {"llama": ("self_attn.o_proj", "mlp.down_proj"), "gpt2": ("attn.c_proj", "mlp.c_proj")}
    attention, its, mlp, of_mlp = whole
    wanted = {f"{attention}.{name}": attention for name in its}
    wanted |= {f"{mlp}.{name}": mlp for name in of_mlp}
    wanted |= {name: name for name in last[kind]}
    place = {"llama": "model.layers", "gpt2": "transformer.h"}[kind]
    assert {name: choice.unit for name, choice in report.items()} == {
        f"{place}.{i}.{name}": f"{place}.{i}.{unit}"
        for i in range(3)
        for name, unit in wanted.items()
    }
    packed = {name for name, m in model.named_modules() if isinstance(m, PackedModule)}
    assert packed == set(report)
    assert type(model.lm_head) is nn.Linear


def test_gwq_quantize_packs_transposed_layers_of_the_blocks():
    model, data = case_of("gpt2")
    packed = gwq_quantize(model, data)
    names = {n for n, m in packed.named_modules() if isinstance(m, pyrobust.nn.DenseSparseLinear)}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names == {f"transformer.h.{i}.{part}" for i in range(3) for part in parts}
    assert type(packed.lm_head) is nn.Linear
    exact = run(model, data[0])
    assert (run(packed, data[0]) - exact).norm() < 0.1 * exact.norm()


def test_transposed_layers_that_stay_in_float_stay_what_they_are(tmp_path):
    model, data = case_of("gpt2")
    packed = pyrobust.pack(model, bits=4, skip=["*mlp*"])
    assert type(packed.transformer.h[0].attn.c_attn) is pyrobust.nn.PackedLinear
    assert type(packed.transformer.h[0].mlp.c_fc) is type(model.transformer.h[0].mlp.c_fc)
    pyrobust.save(packed, tmp_path / "packed.safetensors")
    loaded = pyrobust.load(tmp_path / "packed.safetensors", case_of("gpt2")[0])
    assert torch.equal(run(loaded, data[0]), run(packed, data[0]))
    same = pyrobust.pack(model, bits=4, skip=["*mlp*"], inplace=True)
    assert same is model
    assert torch.equal(run(same, data[0]), run(packed, data[0]))
    assert type(model.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"


def test_models_with_encoder_and_decoder_convert_though_a_shared_table_never_runs():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    tokens = torch.randint(1, 64, (3, 9))
    batch = {"input_ids": tokens, "decoder_input_ids": tokens[:, :5]}
    packed = pyrobust.pack(model, bits=8, group_size=16, quantizer="gptq", calibration=[batch])
    assert not pyrobust.pack_report(packed).skipped
    expected = run(model, batch)
    assert (run(packed, batch) - expected).norm() <= 0.02 * expected.norm()
