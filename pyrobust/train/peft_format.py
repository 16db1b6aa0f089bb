"""Adapters in the files of the ``peft`` package: LoRA in both directions, SVFit as LoRA.

A trained SVFit update ``U diag(ds) V^T`` is a LoRA update with ``A = V^T``, ``B = U diag(ds)`` and
a scale of one, so it loads wherever LoRA does; read back it is a LoRA adapter.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyrobust._files import write_text
from pyrobust._safetensors import write_safetensors
from pyrobust.nn.lora import ConvLoRA2d, LoRALinear
from pyrobust.nn.svfit import SVFitConv2d, SVFitLinear
from pyrobust.train.adapters import LoRA, adapters, apply_adapter, read_tensors

__all__ = ["load_peft_lora", "save_peft_lora"]

_PREFIX = "base_model.model."


def _factors(name: str, adapter: nn.Module) -> tuple[Tensor, Tensor, float]:
    """``A``, ``B`` and ``alpha`` of ``(alpha / r) B A``, as matrices."""
    if isinstance(adapter, SVFitLinear | SVFitConv2d):
        return *adapter.low_rank_factors(), float(adapter.change.numel())
    if not isinstance(adapter, LoRALinear | ConvLoRA2d):
        raise ValueError(f"save_peft_lora: {name!r} is a {type(adapter).__name__}, not LoRA.")
    if adapter.groups != 1:
        raise ValueError(f"save_peft_lora: {name!r} adapts a grouped convolution.")
    if adapter.init != "zero":
        raise ValueError(
            f"save_peft_lora: {name!r} was started from singular triples (init={adapter.init!r}): "
            "its update is not to the weight of the plain model, which is what peft adds to."
        )
    return adapter.lora_A, adapter.lora_B, adapter.alpha


@torch.no_grad()
def save_peft_lora(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write LoRA and SVFit adapters as ``peft`` does: adapter_config.json and safetensors.

    Raises:
        ValueError: no adapter, another kind of adapter, a grouped convolution, or LoRA started from
            singular triples.
    """
    found = adapters(model)
    if not found:
        raise ValueError("save_peft_lora: the model has no LoRA adapter.")
    tensors, ranks, alphas = {}, {}, {}
    for name, adapter in found.items():
        a, b, alphas[name] = _factors(name, adapter)
        ranks[name] = r = a.shape[0]
        shape = adapter.base.weight.shape[1:]
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.reshape(r, *shape).contiguous()
        tail = [1] * (len(shape) - 1)
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.reshape(-1, r, *tail).contiguous()
    first = next(iter(found))
    config = {
        "peft_type": "LORA",
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {n: r for n, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alphas[first]},
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(found),
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    write_safetensors(target / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_text(target / "adapter_config.json", json.dumps(config, indent=2))


def _setting(config: dict[str, Any], pattern: str, default: str, name: str) -> float:
    """The value for a layer: patterns name layers by the ends of their names."""
    for end, value in (config.get(pattern) or {}).items():
        if name == end or name.endswith("." + end):
            return float(value)
    return float(config[default])


@torch.no_grad()
def load_peft_lora(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Apply a LoRA checkpoint of the ``peft`` package to a plain model, in place.

    Args:
        model: the base model without adapters.
        folder: holds adapter_config.json and adapter_model.safetensors.

    Returns:
        ``model`` with :class:`LoRALinear` / :class:`ConvLoRA2d` over the adapted layers.

    Raises:
        ValueError: not a plain LoRA checkpoint, its layers are not in the model, or its tensors
            do not fit them.
    """
    source = Path(folder)
    config = json.loads((source / "adapter_config.json").read_text())
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("use_rslora"):
        raise ValueError(f"load_peft_lora: {folder} is not a plain LoRA checkpoint.")
    tensors, _ = read_tensors(source / "adapter_model.safetensors")
    names = sorted({k.removeprefix(_PREFIX).split(".lora_")[0] for k in tensors})
    _check_layers(model, names, tensors)
    by_setting: dict[tuple[int, float], list[str]] = {}
    for name in names:
        rank = tensors[f"{_PREFIX}{name}.lora_A.weight"].shape[0]
        alpha = _setting(config, "alpha_pattern", "lora_alpha", name)
        by_setting.setdefault((rank, alpha), []).append(name)
    for (rank, alpha), group in by_setting.items():
        apply_adapter(model, LoRA(tuple(group), r=rank, alpha=alpha, full_rank=True))
    for name, adapter in adapters(model).items():
        for factor in ("lora_A", "lora_B"):
            own = adapter.get_parameter(factor).requires_grad_(True)
            own.copy_(tensors[f"{_PREFIX}{name}.{factor}.weight"].reshape(own.shape))
    return model


def _check_layers(model: nn.Module, names: list[str], tensors: dict[str, Tensor]) -> None:
    modules = dict(model.named_modules())
    missing = [name for name in names if name not in modules]
    if missing:
        raise ValueError(f"load_peft_lora: the model has no module {', '.join(missing)}.")
    if adapters(model):
        raise ValueError("load_peft_lora: the model has adapters already.")
    known = {f"{_PREFIX}{name}.lora_{factor}.weight" for name in names for factor in "AB"}
    if known != set(tensors):
        raise ValueError(
            "load_peft_lora: the file must hold lora_A and lora_B for each layer and no more; "
            f"differing keys: {', '.join(sorted(known ^ set(tensors)))}."
        )
    for name in names:
        weight = modules[name].weight
        a, b = (tensors[f"{_PREFIX}{name}.lora_{factor}.weight"] for factor in "AB")
        if a.shape[1:] != weight.shape[1:] or b.shape[:2] != (weight.shape[0], a.shape[0]):
            raise ValueError(
                f"load_peft_lora: {name!r} has a weight of shape {tuple(weight.shape)}; the file "
                f"holds factors {tuple(a.shape)} and {tuple(b.shape)}."
            )
