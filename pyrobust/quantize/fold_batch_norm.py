"""fold_batch_norm: batch normalisation absorbed by the linear layer or convolution before it.

In evaluation a batch normalisation is a scale and a shift per channel; a layer that is quantized
should have them in its weight and bias.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils import fusion

from pyrobust._checks import check_eval_mode

__all__ = ["fold_batch_norm"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy of ``model`` without the batch normalisations that directly follow a layer.

    Pairs are found by ``torch.fx``; where the model cannot be traced, within ``Sequential`` only. A
    ``BatchNorm1d`` behind a linear layer is taken to see ``(N, C)`` values, not ``(N, L, C)``.

    Args:
        model: in evaluation mode. It is returned itself where it has no batch normalisation.

    Raises:
        ValueError: the model has a batch normalisation and is in training mode.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
        >>> fold_batch_norm(net)[1]
        Identity()
    """
    if not any(isinstance(module, _NORMS) for module in model.modules()):
        return model
    check_eval_mode("fold_batch_norm", model)
    model = copy.deepcopy(model)
    for layer_name, norm_name in list(_pairs(model)):
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        _fold(layer, norm)
        parent, _, leaf = norm_name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Identity().eval())
    return model


def _pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of a layer and of the normalisation that alone takes its output."""
    try:
        graph = torch.fx.symbolic_trace(model).graph
    except Exception:  # models may do anything while they are traced
        yield from _sequential_pairs(model)
        return
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, torch.fx.Node) or before.op != "call_module":
            continue
        names = (str(before.target), str(node.target))
        alone = len(before.users) == 1 and all(calls.count(name) == 1 for name in names)
        if alone and _fits(model.get_submodule(names[0]), model.get_submodule(names[1])):
            yield names


def _sequential_pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        if type(module) is not nn.Sequential:
            continue
        children = list(module.named_children())
        for (first, layer), (second, norm) in pairwise(children):
            if _fits(layer, norm):
                prefix = f"{name}." if name else ""
                yield prefix + first, prefix + second


def _fits(layer: nn.Module, norm: nn.Module) -> bool:
    pairs = (
        (nn.Linear, nn.BatchNorm1d),
        (nn.Conv1d, nn.BatchNorm1d),
        (nn.Conv2d, nn.BatchNorm2d),
    )
    kinds = any(type(layer) is a and type(norm) is b for a, b in pairs)
    return kinds and getattr(norm, "running_mean", None) is not None


def _fold(layer: nn.Module, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    assert isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    linear = isinstance(layer, nn.Linear)
    fuse = fusion.fuse_linear_bn_weights if linear else fusion.fuse_conv_bn_weights
    layer.weight, layer.bias = fuse(layer.weight, layer.bias, *statistics)
