"""Ranges of a network of any shape with its ReLUs fixed, for propagation tightness.

Hooks replace what each ``nn.ReLU`` puts out by its input times a mask, the same in two runs: one at
a point, whose gradients give true ranges, and one on a box, whose width interval propagation gives.
The network between is affine then; that is checked, since a ReLU called as a function has no hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyrobust.certify.bound import bound
from pyrobust.interval import Interval

__all__ = ["LayerRange", "graph_ranges", "has_branches"]

_TOLERANCE = 1e-3  # relative; float32 sums of a deep network stay far below


@dataclass(frozen=True)
class LayerRange:
    """A layer's output at the point, with its graph, and the radius of its box.

    Attributes:
        name: of the layer; empty for the whole network.
        output: ``(N, ...)``.
        radius: same shape (of the specified values for the whole network), for the input radius.
    """

    name: str
    output: Tensor
    radius: Tensor


def has_branches(layers: list[tuple[str, nn.Module]]) -> bool:
    """Whether a layer of a chain is itself made of layers."""
    return any(next(layer.children(), None) is not None for _, layer in layers)


def graph_ranges(
    subject: str,
    model: nn.Module,
    point: Tensor,
    radius: Tensor,
    relu: str,
    spec: Tensor | None,
    watched: tuple[type[nn.Module], ...] = (),
) -> list[LayerRange]:
    """Ranges of the layers of the types ``watched``, in the order they run, and of the output.

    Args:
        subject: who asks, for error messages.
        model: in evaluation mode.
        point: ``(N, ...)`` where ReLUs are fixed; requires a gradient.
        radius: ``(N, ...)`` of the box.
        relu: ``"local"`` or ``"center"`` (fixed as they are at ``point``), or ``"identity"``.
        spec: ``(N, S, K)`` combinations of the outputs, folded into a last linear layer; or None.
        watched: types of the layers.

    Raises:
        NotImplementedError: an operation has no interval rule or is not affine.
    """
    masks: list[Tensor] = []

    def record(value: Tensor) -> Tensor:
        mask = torch.ones_like(value) if relu == "identity" else (value > 0).to(value.dtype)
        masks.append(mask.detach())
        return mask.detach()

    with torch.enable_grad(), _hooked(model, record, watched) as seen:
        output = model(point)
    # The network is affine, so a box of radius about 1 around 0 keeps what rounding leaves of it.
    scale = 1 / radius.max() if bool(radius.max() > 0) else torch.ones((), device=radius.device)
    _check_affine(subject, model, point.detach(), 10 * radius, masks)
    _check_affine(subject, model, torch.zeros_like(radius), radius * scale, masks)
    box = Interval(-radius * scale, radius * scale, rounding="nearest")
    with torch.no_grad(), _hooked(model, _replay(masks), watched) as boxes:
        whole = bound(model, box, spec)
    ranges = [
        LayerRange(name, value, _radius(inside) / scale)
        for (name, value), (_, inside) in zip(seen, boxes, strict=True)
    ]
    return [*ranges, LayerRange("", output, _radius(whole) / scale)]


def _radius(box: Interval) -> Tensor:
    return (box.upper - box.lower) / 2


def _check_affine(
    subject: str, model: nn.Module, centre: Tensor, radius: Tensor, masks: list[Tensor]
) -> None:
    """Raise unless two opposite steps from the centre cancel out."""
    signs = torch.linspace(0, 37, centre.numel(), device=centre.device).sin().view_as(centre)
    step = radius * torch.where(signs > 0, 1.0, -1.0).to(centre)
    values = []
    for points in (centre, centre + step, centre - step):
        with torch.no_grad(), _hooked(model, _replay(masks), ()):
            values.append(model(points))
    middle, above, below = values
    curve = float((above + below - 2 * middle).abs().max())
    size = max(float((above - middle).abs().max()), float(middle.abs().max()), 1e-30)
    if curve > _TOLERANCE * size:
        raise NotImplementedError(
            f"{subject}: the model must be affine once its nn.ReLU modules are fixed; it has "
            "another nonlinear operation (use nn.ReLU modules instead of functions)."
        )


def _replay(masks: list[Tensor]) -> Callable[[Any], Tensor]:
    """The recorded masks in their order."""
    left = iter(masks)
    return lambda value: next(left)


@contextmanager
def _hooked(
    model: nn.Module, mask_of: Callable[[Any], Tensor], watched: tuple[type[nn.Module], ...]
) -> Iterator[list[tuple[str, Any]]]:
    """Fix the ReLUs and collect the outputs of watched layers inside."""
    seen: list[tuple[str, Any]] = []
    handles, in_place = [], []

    def fix(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return inputs[0] * mask_of(inputs[0])

    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU):
            in_place.append((module, module.inplace))
            module.inplace = False
            handles.append(module.register_forward_hook(fix))
        elif isinstance(module, watched):
            handles.append(
                module.register_forward_hook(
                    lambda module, inputs, output, name=name: seen.append((name, output))
                )
            )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for relu, before in in_place:
            relu.inplace = before
