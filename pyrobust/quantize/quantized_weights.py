"""The simulated low-bit weights of a model in training, found and told by name."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pyrobust.quantize.lsq import LSQQuantizer
from pyrobust.quantize.qk_reparam import QKReparamAttention
from pyrobust.quantize.quant_layers import QuantConv2d, QuantLinear
from pyrobust.quantize.stats_quantizer import StatsQuantizer

__all__ = ["quantized_layers", "quantized_weights"]


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantLinear | QuantConv2d]]:
    """The linear layers and convolutions with a simulated weight, by name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantConv2d):
            yield name, module


@torch.no_grad()
def quantized_weights(model: nn.Module) -> dict[str, Tensor]:
    """The present codes of every simulated weight, query-key matrices included, by name.

    Raises:
        ValueError: the model has none.
    """
    codes = {
        name: _codes(layer.weight_quantizer, layer.weight)
        for name, layer in quantized_layers(model)
    }
    for name, module in model.named_modules():
        if isinstance(module, QKReparamAttention) and module.qk_quantizer is not None:
            codes[f"{name}.qk"] = _codes(module.qk_quantizer, module.qk_matrix())
    if not codes:
        raise ValueError(
            f"quantized_weights: model must have simulated low-bit weights; got "
            f"{type(model).__name__} without."
        )
    return codes


def _codes(quantizer: StatsQuantizer | LSQQuantizer, weight: Tensor) -> Tensor:
    if isinstance(quantizer, StatsQuantizer):
        return quantizer.codes(weight, quantizer.scale(weight, storable=True))
    return quantizer.codes(weight, storable=True)
