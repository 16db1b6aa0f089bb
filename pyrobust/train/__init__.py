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
from pyrobust.train.ibp import IntervalTraining, interval_loss, worst_logits
from pyrobust.train.loop import GaussianCrossEntropy, Objective, fit
from pyrobust.train.schedules import linear_ramp, step_decay

__all__ = [
    "GaussianCrossEntropy",
    "IntervalTraining",
    "LoRA",
    "Objective",
    "SVFit",
    "adapter_param_groups",
    "adapters",
    "apply_adapter",
    "fit",
    "interval_loss",
    "linear_ramp",
    "load_adapter",
    "load_peft_lora",
    "merge_adapters",
    "save_adapter",
    "save_peft_lora",
    "step_decay",
    "unmerge_adapters",
    "worst_logits",
]
