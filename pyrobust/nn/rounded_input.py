"""RoundedInput: a packed layer behind the learned rounding of its input."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

__all__ = ["RoundedInput"]


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
