"""RoundedInput: a packed layer behind the learned rounding of its input."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn

from pyrobust.nn.affine_rounding import AffineRounding

__all__ = ["RoundedInput", "behind", "rounded_as_stored"]

_BUFFERS = ("step", "low", "levels")


class RoundedInput(nn.Module):
    """``layer(activation(x))``: what a trained quantized layer becomes when it is packed.

    Args:
        activation: maps the input to its rounded form.
        layer: the packed layer.
    """

    def __init__(self, activation: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        result: Tensor = self.layer(self.activation(x))
        return result

    @property
    def weight(self) -> Tensor:
        """The weight of the layer: for foreign code that reads weights."""
        return cast(Tensor, self.layer.weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer."""
        return cast("Tensor | None", self.layer.bias)


def behind(layer: nn.Module, activation: nn.Module | None) -> nn.Module:
    """``layer`` behind the rounding of its input, if there is one."""
    if activation is None:
        return layer
    return RoundedInput(activation, layer).train(layer.training)


@contextmanager
def rounded_as_stored(
    model: nn.Module, layers: Collection[str], tensors: Collection[str]
) -> Iterator[None]:
    """Put float layers that a file holds behind :class:`AffineRounding` there; undone by an error.

    Args:
        model: searched below itself.
        layers: names of the packed layers of the file.
        tensors: names of its tensors.
    """
    modules, tensors = dict(model.named_modules()), set(tensors)
    places = [name.removesuffix(".layer") for name in layers if name.endswith(".layer")]
    wrapped = {
        modules[place]: RoundedInput(AffineRounding(), modules[place])
        for place in places
        if isinstance(modules.get(place), nn.Linear | nn.Conv1d | nn.Conv2d)
        and all(f"{place}.activation.{name}" in tensors for name in _BUFFERS)
    }
    _replace(model, dict(wrapped))
    try:
        yield
    except BaseException:
        _replace(model, {new: old for old, new in wrapped.items()})
        raise


def _replace(model: nn.Module, others: dict[nn.Module, nn.Module]) -> None:
    for parent in [each for each in model.modules() if each not in others.values()]:
        for name, child in parent._modules.items():
            if child is not None and child in others:
                parent._modules[name] = others[child]
