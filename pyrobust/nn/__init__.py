"""Modules that mirror torch.nn: packed layers, SmoothedClassifier, methods that are layers."""

from pyrobust.nn.weight_compander import (
    WeightCompander,
    apply_weight_compander,
    compander_param_groups,
    fold_weight_compander,
    weight_compander,
    weight_statistics,
)

__all__ = [
    "WeightCompander",
    "apply_weight_compander",
    "compander_param_groups",
    "fold_weight_compander",
    "weight_compander",
    "weight_statistics",
]
