import copy

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust import nn as rnn
from pyrobust.data import load_digits
from pyrobust.quantize import QKReparamAttention, QuantConv2d, QuantLinear, quantize_vit, train_ofq
from pyrobust.train import GaussianCrossEntropy, fit


class TinyViT(nn.Module):
    """Patches of 8 by 8 digits through torch's own encoder layers."""

    def __init__(self, dim=32, depth=2, heads=2, norm_first=True):
        super().__init__()
        self.patch_embed = nn.Conv2d(1, dim, 2, 2)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 16, dim))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, heads, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=norm_first
            )
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def tiny_vit(seed=0, **options):
    torch.manual_seed(seed)
    return TinyViT(**options).eval()


def images(count=6, seed=0):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_blocks_get_low_bits_and_the_ends_eight():
    net = quantize_vit(tiny_vit(), 2, 3, example=images())
    assert isinstance(net.patch_embed, QuantConv2d)
    assert (net.patch_embed.w_bits, net.patch_embed.a_bits) == (8, 8)
    assert (net.head.w_bits, net.head.a_bits) == (8, 8)
    block = net.blocks[0]
    attention = block.self_attn.attention
    assert isinstance(attention, QKReparamAttention)
    assert (attention.w_bits, attention.a_bits) == (2, 3)
    assert (block.linear1.w_bits, block.linear1.a_bits) == (2, 3)
    assert block.linear1.activation.quantizer.signed
    assert not block.linear2.activation.quantizer.signed
    assert isinstance(block.norm1, nn.LayerNorm)


def test_high_bits_keep_the_function_of_the_float_model():
    model = tiny_vit()
    options = {"weight_quantizer": "lsq", "reparametrize": False, "unsigned": ()}
    net = quantize_vit(model, 8, 8, example=images(64), **options)
    net.eval()
    with torch.no_grad():
        assert relative(net(images(seed=3)), model(images(seed=3))) < 0.2


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_torch_encoder_with_masks_keeps_its_function(batch_first, padded):
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    nn.init.normal_(encoder.layers[0].self_attn.in_proj_bias)
    net = quantize_vit(nn.Sequential(encoder), 4, None, skip=["*linear*"])
    for module in net.modules():  # float weights: only the path through the masks is compared
        if isinstance(module, QKReparamAttention):
            module.qk_quantizer = None
            for name in ("value", "proj"):
                quantized = getattr(module, name)
                linear = nn.Linear(16, 16)
                linear.weight, linear.bias = quantized.weight, quantized.bias
                setattr(module, name, linear)
    x = torch.randn(5, 7, 16) if batch_first else torch.randn(7, 5, 16)
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    padding = torch.zeros(5, 7, dtype=torch.bool)
    padding[1, 4:] = True
    options = {"mask": causal, "src_key_padding_mask": padding if padded else None}
    with torch.no_grad():
        out, expected = net[0](x, **options), encoder(x, **options)
    assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("per_token", [False, True])
def test_packed_model_computes_what_was_simulated(per_token):
    net = quantize_vit(tiny_vit(), 2, 4, example=images(), per_token=per_token).eval()
    packed = pyrobust.pack(net)
    x = images(seed=5)
    with torch.no_grad():
        assert relative(packed(x), net(x)) <= 1e-5
        half = copy.deepcopy(net).bfloat16()
        out = pyrobust.pack(half)(x.bfloat16())
        assert relative(out, half(x.bfloat16())) <= 1e-3
    kinds = [type(module) for module in packed.modules()]
    assert kinds.count(rnn.PackedQKAttention) == 2
    assert not any(kind in kinds for kind in (QuantLinear, QuantConv2d, QKReparamAttention))
    report = pyrobust.pack_report(packed)
    assert {row.name for row in report.packed} >= {"blocks.0.self_attn.attention.qk", "head"}
    assert [row.type for row in report.skipped] == ["TinyViT"]  # its position embedding


def test_a_saved_model_loads_into_a_freshly_packed_one(tmp_path):
    make = lambda seed: pyrobust.pack(quantize_vit(tiny_vit(seed), 2, 4, example=images()).eval())  # noqa: E731
    first, second = make(0), make(1)
    pyrobust.save(first, tmp_path / "vit.safetensors")
    pyrobust.load(tmp_path / "vit.safetensors", second)
    with torch.no_grad():
        assert torch.equal(first(images()), second(images()))


def test_original_is_untouched_unless_inplace_and_skipped_parts_stay():
    model = tiny_vit()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    net = quantize_vit(model, 2, None, skip=["head", "blocks.1"])
    assert type(model.head) is nn.Linear
    assert type(net.head) is nn.Linear
    assert type(net.blocks[1].linear1) is nn.Linear
    assert isinstance(net.blocks[0].linear1, QuantLinear)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert quantize_vit(model, 2, None, inplace=True) is model
    assert isinstance(model.head, QuantLinear)


def test_without_reparametrization_the_projections_are_plain_layers():
    module = pytest.importorskip("transformers")
    config = module.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=2, num_channels=1, num_labels=10,
    )  # fmt: skip
    torch.manual_seed(0)
    model = module.ViTForImageClassification(config).eval()
    net = quantize_vit(model, 4, 8, reparametrize=False, example=images())
    names = {name for name, m in net.named_modules() if isinstance(m, QuantLinear)}
    assert sum(name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")) for name in names) == 4


@pytest.mark.parametrize("family", ["ViT", "DeiT", "Swin"])
def test_transformers_models_convert_run_and_pack(family):
    transformers = pytest.importorskip("transformers")
    common = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    if family == "Swin":
        config = transformers.SwinConfig(
            embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=2, **common
        )
    else:
        config = getattr(transformers, f"{family}Config")(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            **common,
        )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForImageClassification")(config).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.3)
    attentions = [m for m in model.modules() if type(m).__name__ == f"{family}Attention"]
    exact = quantize_vit(model, 8, None, weight_quantizer="lsq", reparametrize=False)
    with torch.no_grad():
        x = images(4)
        assert relative(exact(x).logits, model(x).logits) < 0.05
        net = quantize_vit(model, 2, 4, example=x).eval()
        packed = pyrobust.pack(net)
        assert relative(packed(x).logits, net(x).logits) <= 1e-5
    found = [m for m in packed.modules() if isinstance(m, rnn.PackedQKAttention)]
    assert len(found) == len(attentions) > 0


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"w_bits must be at most 8; got 9"):
        quantize_vit(tiny_vit(), 9)
    with pytest.raises(ValueError, match="a_bits must be at least 1; got 0"):
        quantize_vit(tiny_vit(), 2, 0)
    with pytest.raises(ValueError, match="skip must name modules of the model; got 'neck'"):
        quantize_vit(tiny_vit(), 2, skip=["neck"])
    with pytest.raises(ValueError, match="must have attention blocks"):
        quantize_vit(nn.Sequential(nn.Linear(2, 2)), 2)
    with pytest.raises(TypeError, match="model must be a"):
        quantize_vit(None, 2)


def test_two_bit_vit_trains_on_digits_and_packs():
    data = load_digits()
    x, y = data.train_images, data.train_labels
    model = tiny_vit(depth=1)
    fit(
        model,
        x,
        y,
        objective=GaussianCrossEntropy(),
        epochs=10,
        generator=torch.Generator().manual_seed(0),
    )
    net = quantize_vit(model, 2, 4, example=x[:64])

    def accuracy(each):
        with torch.no_grad():
            return float((each(data.test_images).argmax(1) == data.test_labels).double().mean())

    untrained = accuracy(net.eval())
    options = {"learning_rate": 2e-3, "final_rate": 2e-4, "teacher": model}
    train_ofq(net, x, y, epochs=6, annealing_epochs=1, **options)
    reference, trained, packed = accuracy(model), accuracy(net), accuracy(pyrobust.pack(net))
    assert reference > 0.9
    assert trained > untrained + 0.2
    assert trained >= reference - 0.06
    assert abs(packed - trained) <= 1 / 360
