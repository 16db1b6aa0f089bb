"""Low-rank adapters over packed layers: trained, saved, loaded and refused as promised."""

import copy

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust.nn import LoRALinear, PackedLinear
from pyrobust.train import (
    LoRA,
    apply_adapter,
    bake_adapters,
    load_adapter,
    load_peft_lora,
    merge_adapters,
    save_adapter,
    save_peft_lora,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(32, 24)
        self.out = nn.Linear(24, 32, bias=False)

    def forward(self, x):
        return x + self.out(torch.relu(self.q_proj(x)))


def packed_block(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return pyrobust.pack(Block().to(dtype), bits=4, group_size=16)


def fit(model, x, steps=20):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = (model(x) - x.flip(1)).float().square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_train_beside_packed_layers_that_stay(dtype):
    plain, x = packed_block(dtype=dtype), torch.randn(16, 32, dtype=dtype)
    model = apply_adapter(copy.deepcopy(plain), LoRA(("q_proj", "out"), r=4))
    assert type(model.q_proj.base) is PackedLinear
    assert torch.equal(model(x), plain(x))
    assert {p.dtype for p in model.parameters()} == {dtype}
    losses = fit(model, x)
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(model.q_proj.base.codes, plain.q_proj.codes)
    weight = model.q_proj.base.dequantize() + model.q_proj.delta_weight().float()
    expected = nn.functional.linear(x.float(), weight, plain.q_proj.bias.float())
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(model.q_proj(x).float(), expected, rtol=tolerance, atol=tolerance)


def test_adapters_are_saved_and_belong_to_one_packed_weight(tmp_path):
    x, config = torch.randn(8, 32), LoRA(("q_proj",), r=2)
    model = apply_adapter(packed_block(), config)
    fit(model, x)
    save_adapter(model, tmp_path / "a.safetensors")
    fresh = load_adapter(apply_adapter(packed_block(), config), tmp_path / "a.safetensors")
    assert torch.equal(fresh(x), model(x))
    with pytest.raises(ValueError, match="another base weight"):
        load_adapter(apply_adapter(packed_block(seed=1), config), tmp_path / "a.safetensors")
    save_peft_lora(model, tmp_path)
    assert torch.equal(load_peft_lora(packed_block(), tmp_path)(x), model(x))


def test_what_codes_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="'zero' over a packed layer"):
        LoRALinear(PackedLinear(8, 8), r=2, init="pissa")
    model = apply_adapter(packed_block(), LoRA(("q_proj",), r=2))
    for call in (merge_adapters, bake_adapters):
        with pytest.raises(TypeError, match="merge into the float model and pack"):
            call(model)
    with pytest.raises(ValueError, match="layers are q_proj, out"):
        apply_adapter(packed_block(), LoRA(("k_proj",)))
    with pytest.raises(TypeError, match=r"nn\.Linear or nn\.PackedLinear; got PackedConv2d"):
        LoRALinear(pyrobust.nn.PackedConv2d(2, 2, 1))


def test_boxes_pass_an_adapted_packed_model():
    x = torch.rand(4, 32)
    model = apply_adapter(packed_block(), LoRA(("q_proj", "out"), r=2))
    fit(model, x)
    with torch.no_grad():
        box = model(pyrobust.Interval.ball(x, 0.05))
        assert box.contains(model(x + 0.05 * (2 * torch.rand(4, 32) - 1))).all()


def test_peft_itself_adapts_packed_layers():
    peft = pytest.importorskip("peft")
    plain, x = packed_block(), torch.randn(8, 32)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "out"])
    config._register_custom_module({PackedLinear: peft.tuners.lora.Linear})
    model = peft.get_peft_model(copy.deepcopy(plain), config)
    assert torch.equal(model(x), plain(x))
    losses = fit(model, x)
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(model.base_model.model.q_proj.base_layer.codes, plain.q_proj.codes)
