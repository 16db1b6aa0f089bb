"""timm's vision transformers convert with the one call; a local model of that structure always."""

import pytest
import torch

import pyrobust
from pyrobust.quantize import LearnedRounding

from .timm_structure import VisionTransformer


def local_model():
    torch.manual_seed(0)
    return VisionTransformer().eval()


def timm_model():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=16, depth=2, num_heads=2,
        mlp_ratio=2, init_values=0.5, drop_path_rate=0.1,
    ).eval()  # fmt: skip


QUANTIZERS = {
    "rtn": "rtn",
    "gptq": "gptq",
    "adadim": "adadim",
    "learned layers": LearnedRounding(iterations=10),
    "learned blocks": LearnedRounding(iterations=10, scope="block"),
    "learned inputs": LearnedRounding(iterations=10, scope="block", activation_bits=8),
}


def images(count=48, seed=1):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("make", [local_model, timm_model])
def test_vision_transformers_convert_block_by_block(make, name, tmp_path):
    model = make()
    calibration = None if name == "rtn" else [images(24), images(24, 2)]
    packed = pyrobust.pack(
        model, bits=4, group_size=16, quantizer=QUANTIZERS[name], calibration=calibration
    )
    rows = {row.name: row for row in pyrobust.pack_report(packed).packed}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    wanted = {"patch_embed.proj", "head", *(f"blocks.{i}.{part}" for i in (0, 1) for part in parts)}
    assert set(rows) == wanted
    if calibration is not None:
        assert all(row.output_error is not None for row in rows.values())
    x, simulated = images(16, 3), make()
    with torch.no_grad():
        if name != "learned inputs":
            modules = dict(packed.named_modules())
            for layer_name, layer in simulated.named_modules():
                if layer_name in rows:
                    layer.weight.copy_(modules[layer_name].dequantize().reshape(layer.weight.shape))
                    layer.bias.copy_(modules[layer_name].bias)
            expected = simulated(x)
            assert (packed(x) - expected).norm() <= 1e-5 * expected.norm()
        assert (packed(x) - model(x)).norm() < 0.35 * model(x).norm()
        pyrobust.save(packed, tmp_path / "vit.safetensors")
        assert torch.equal(pyrobust.load(tmp_path / "vit.safetensors", make())(x), packed(x))


@pytest.mark.parametrize("make", [local_model, timm_model])
def test_a_killed_conversion_resumes_to_the_same_bits(make, tmp_path):
    def run(resume=None, quantizer=LearnedRounding):
        return pyrobust.pack(
            make(), bits=3, group_size=16, quantizer=quantizer(iterations=5),
            calibration=[images()], resume=resume,
        )  # fmt: skip

    class Killed(LearnedRounding):
        def quantize_block(self, block):
            if block.name == "blocks.1":
                raise KeyboardInterrupt
            super().quantize_block(block)

    Killed.__module__, Killed.__qualname__ = LearnedRounding.__module__, "LearnedRounding"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Killed)
    first, second = run().state_dict(), run(tmp_path).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
