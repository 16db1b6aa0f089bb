"""Which float layer has which packed twin, and how twins take the places of layers in a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from pyrobust.nn.packed_conv import PackedConv2d
from pyrobust.nn.packed_embedding import PackedEmbedding
from pyrobust.nn.packed_linear import PackedLinear
from pyrobust.nn.packed_module import PackedModule

__all__ = ["TWINS", "leave_fused_paths", "replace_layers"]

TWINS: dict[type[nn.Module], type[PackedModule]] = {
    nn.Linear: PackedLinear,
    nn.Conv2d: PackedConv2d,
    nn.Embedding: PackedEmbedding,
}
"""Exact types: a subclass may compute something else."""


def replace_layers(model: nn.Module, twins: Mapping[nn.Module, nn.Module]) -> None:
    """Put each twin where its layer stands, under every name that the layer has."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in twins:
                parent._modules[name] = twins[child]


def leave_fused_paths(model: nn.Module) -> None:
    """Make torch's transformer encoders call their packed layers.

    In evaluation their fast path hands raw weights to one fused kernel, which would bypass the
    packed product (and the rounding of activations that a certificate accounts for).
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _has_packed(module):
            module.activation_relu_or_gelu = 0  # how the layer itself says "not fusable"
        elif isinstance(module, nn.TransformerEncoder) and _has_packed(module):
            module.use_nested_tensor = False


def _has_packed(module: nn.Module) -> bool:
    return any(isinstance(child, PackedModule) for child in module.modules())
