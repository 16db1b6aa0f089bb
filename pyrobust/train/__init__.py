"""Losses and training procedures."""

from pyrobust.train.adapters import (
    LoRA,
    SVFit,
    adapter_param_groups,
    adapters,
    apply_adapter,
    load_adapter,
    load_peft_lora,
    merge_adapters,
    save_adapter,
    save_peft_lora,
    unmerge_adapters,
)

__all__ = [
    "LoRA",
    "SVFit",
    "adapter_param_groups",
    "adapters",
    "apply_adapter",
    "load_adapter",
    "load_peft_lora",
    "merge_adapters",
    "save_adapter",
    "save_peft_lora",
    "unmerge_adapters",
]
