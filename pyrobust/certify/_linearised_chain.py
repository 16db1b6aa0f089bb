"""A sequential network with its ReLUs fixed at a point, and how each layer widens a radius."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust.nn.packed_conv import PackedConv
from pyrobust.nn.packed_linear import PackedLinear
from pyrobust.nn.packed_sequential import PackedSequential

_PACKED = (PackedLinear, PackedConv)
_CONVS = {3: F.conv1d, 4: F.conv2d}  # by the dimensions of their weights
_PLAIN = (
    nn.Flatten,
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
)


def linearisation_point(
    x: Tensor, eps: float, relu: str, clamp: tuple[float, float] | None
) -> tuple[Tensor, Tensor]:
    """The point at which ReLUs are fixed, ready for gradients, and the radius of the box."""
    low, high = x.detach() - eps, x.detach() + eps
    if clamp is not None:
        low, high = low.clamp(*clamp), high.clamp(*clamp)
    point = (low + high) / 2 if relu == "center" else x.detach().clone()
    return point.requires_grad_(), (high - low) / 2


@dataclass(frozen=True)
class Step:
    """One layer and how it widens a radius, its ReLU fixed."""

    layer: nn.Module
    widen: Callable[[Tensor], Tensor]


def linearised_chain(
    subject: str,
    model: nn.Module,
    x: Tensor,
    eps: float,
    relu: str,
    clamp: tuple[float, float] | None,
) -> tuple[list[Step], Tensor, Tensor, Tensor]:
    """Steps, input radius, input point and the output of the linearised network at it."""
    point, radius = linearisation_point(x, eps, relu, clamp)
    steps, value = [], point
    with torch.enable_grad():
        for name, layer in layer_chain(subject, model):
            if isinstance(layer, nn.ReLU):
                active = (value.detach() > 0).to(x.dtype)
                mask = torch.ones_like(active) if relu == "identity" else active
                value = value * mask
                steps.append(Step(layer, mask.mul))
            else:
                value = layer(value)
                steps.append(Step(layer, _widening(subject, name, layer)))
    return steps, radius, point, value


def layer_chain(subject: str, model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The layers of a nested ``nn.Sequential``, packed or not, with their names."""
    if type(model) not in (nn.Sequential, PackedSequential):
        return [(prefix or type(model).__name__, model)]
    layers = []
    for name, child in model.named_children():
        layers += layer_chain(subject, child, f"{prefix}.{name}" if prefix else name)
    if not layers:
        raise ValueError(f"{subject}: the model must hold a layer; got an empty nn.Sequential.")
    return layers


def _widening(subject: str, name: str, layer: nn.Module) -> Callable[[Tensor], Tensor]:
    if isinstance(layer, _PACKED) and layer.activations is not None:
        raise NotImplementedError(
            f"{subject}: layer '{name}' rounds its input (activations={layer.activations!r}), "
            "which is not affine."
        )
    if isinstance(layer, (nn.Linear, PackedLinear)):
        size = weight_of(layer).abs()
        return lambda radius: F.linear(radius, size.to(radius))
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, PackedConv)) and layer.padding_mode == "zeros":
        kernel, geometry = weight_of(layer).abs(), layer
        convolve = _CONVS[kernel.ndim]
        return lambda radius: convolve(
            radius,
            kernel.to(radius),
            None,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.groups,
        )
    if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) and layer.running_var is not None:
        factor = (layer.running_var + layer.eps).rsqrt()
        if layer.weight is not None:
            factor = factor * layer.weight.detach().abs()
        return lambda radius: radius * factor.reshape(1, -1, *[1] * (radius.ndim - 2))
    if isinstance(layer, _PLAIN):
        return layer
    raise NotImplementedError(
        f"{subject}: layer '{name}' of type {type(layer).__name__} is not supported."
    )


def weight_of(layer: nn.Module) -> Tensor:
    """The weight that a linear layer or a convolution multiplies with, without its graph."""
    if isinstance(layer, _PACKED):
        return layer.dequantize()
    weight: Tensor = layer.get_parameter("weight").detach()
    return weight
