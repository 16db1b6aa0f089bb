"""TempBalance: learning rates layer by layer from the tail exponents of their spectra.

Source: Zhou et al., "Temperature Balancing, Layer-wise Weight Analysis, and Neural Network
Training", NeurIPS 2023, arXiv 2312.00359, in the form FARMS uses it (arXiv 2506.06280).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from pyrobust._checks import check_choice
from pyrobust.weights.farms import spectral_report

__all__ = ["TempBalance"]


class TempBalance:
    """Gives layers with a large exponent (less trained) a larger learning rate.

    Args:
        model: its linear and convolution layers are balanced; a norm layer follows the layer
            before it; everything else trains at the global rate.
        lr_min: ratio to the global rate at the smallest exponent, ``> 0``.
        lr_max: ratio at the largest, ``>= lr_min``.
        exclude: weight names that stay at the global rate, e.g. the first and last layer.
        estimator: ``"farms"`` or ``"full"``.
        rule: from exponent to ratio: ``"linear"`` between ``lr_min`` and ``lr_max``; ``"rank"``,
            equal steps between them in the order of the exponents; ``"sqrt"`` and ``"log2"`` of
            the exponent over its mean, without the two limits.

    Raises:
        ValueError: the ratios are not ``0 < lr_min <= lr_max``, or an option is not accepted.
    """

    def __init__(
        self,
        model: nn.Module,
        lr_min: float = 0.5,
        lr_max: float = 1.5,
        *,
        exclude: tuple[str, ...] = (),
        estimator: str = "farms",
        rule: str = "linear",
    ) -> None:
        check_choice("TempBalance", "rule", rule, ["linear", "rank", "sqrt", "log2"])
        if not 0 < lr_min <= lr_max:
            raise ValueError(f"TempBalance: need 0 < lr_min <= lr_max; got {lr_min}, {lr_max}.")
        self.model = model
        self.lr_min = lr_min
        self.lr_max = lr_max
        self.exclude = exclude
        self.estimator = estimator
        self.rule = rule

    def ratios(self) -> dict[str, float]:
        """Ratio to the global rate for each balanced weight, from its present spectrum."""
        alphas = {
            row.name: row.alpha
            for row in spectral_report(self.model, self.estimator)
            if math.isfinite(row.alpha) and row.name not in self.exclude
        }
        if not alphas:
            return {}
        low, high = min(alphas.values()), max(alphas.values())
        if high == low:
            return dict.fromkeys(alphas, 1.0)
        if self.rule in ("sqrt", "log2"):
            scale = math.sqrt if self.rule == "sqrt" else math.log2
            scaled = {name: scale(alpha) for name, alpha in alphas.items()}  # exponents exceed 1
            mean = sum(scaled.values()) / len(scaled)
            return {name: value / mean for name, value in scaled.items()}
        if self.rule == "rank":
            step = (self.lr_max - self.lr_min) / (len(alphas) - 1)
            order = sorted(alphas, key=lambda name: alphas[name])
            return {name: self.lr_min + step * i for i, name in enumerate(order)}
        slope = (self.lr_max - self.lr_min) / (high - low)
        return {name: self.lr_min + slope * (alpha - low) for name, alpha in alphas.items()}

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """One group per parameterised layer, with its name and rate, for any torch optimizer."""
        ratios, last, groups = self.ratios(), 1.0, []
        for name, module in self.model.named_modules():
            params = list(module.parameters(recurse=False))
            if not params:
                continue
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)):
                ratio = last
            else:
                ratio = last = ratios.get(f"{name}.weight" if name else "weight", 1.0)
            groups.append({"params": params, "lr": lr * ratio, "layer": name})
        return groups

    def step(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        """Set the rates of groups made by :meth:`param_groups` anew; momentum stays as it is."""
        rates = {group["layer"]: group["lr"] for group in self.param_groups(lr)}
        for group in optimizer.param_groups:
            group["lr"] = rates.get(group.get("layer"), lr)
