"""Which float layer has which packed twin, and how twins take the places of layers in a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from pyrobust.nn.dense_sparse_linear import DenseSparseLinear
from pyrobust.nn.packed_complex_linear import PackedComplexLinear
from pyrobust.nn.packed_conv import PackedConv1d, PackedConv2d
from pyrobust.nn.packed_embedding import PackedEmbedding
from pyrobust.nn.packed_linear import PackedLinear
from pyrobust.nn.packed_module import PackedModule
from pyrobust.quantize.ifairy import ComplexLinear

__all__ = ["TWINS", "VARIANTS", "leave_fused_paths", "replace_layers", "twin_named"]

TWINS: dict[type[nn.Module], type[PackedModule]] = {
    nn.Linear: PackedLinear,
    nn.Conv1d: PackedConv1d,
    nn.Conv2d: PackedConv2d,
    nn.Embedding: PackedEmbedding,
}
"""Exact types: a subclass may compute something else."""

VARIANTS: dict[type[PackedModule], type[nn.Module]] = {
    DenseSparseLinear: nn.Linear,
    PackedComplexLinear: ComplexLinear,
}
"""Other packed layers that a file may hold in the place of a float layer of that type."""


def twin_named(layer: nn.Module, name: object) -> type[PackedModule] | None:
    """The packed layer of that class name that can stand for ``layer``, or None."""
    found = TWINS.get(type(layer))
    if found is not None and found.__name__ == name:
        return found
    fitting = (twin for twin, kind in VARIANTS.items() if kind is type(layer))
    return next((twin for twin in fitting if twin.__name__ == name), None)


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
