"""AffineRounding: activations on equal steps between two ends, learned after training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pyrobust._checks import check_float_tensor, check_integer
from pyrobust.quantize.straight_through import straight_through

__all__ = ["AffineRounding", "affine_round"]


def affine_round(x: Tensor, step: Tensor, low: Tensor, levels: Tensor | float) -> Tensor:
    """``low + step * round(clip((x - low) / step, 0, levels - 1))``, differentiable.

    Rounding passes gradients straight through and clipping stops them, which gives ``step`` the
    gradient of LSQ (``q - (x - low) / step`` inside, ``q`` outside) and ``low`` 0 inside and 1
    outside.

    Args:
        x: floating point, any shape.
        step: scalar, positive.
        low: scalar, the lowest level.
        levels: their number.
    """
    inside = ((x - low) / step).clamp(min=0).minimum(torch.as_tensor(levels - 1).to(x))
    return straight_through(torch.round(inside), inside) * step + low


class AffineRounding(nn.Module):
    """The rounding of a layer's input in front of a packed layer: frozen, all of it in buffers.

    So a file of :func:`pyrobust.save` says everything about it.

    Args:
        bits: 1 to 8.

    Attributes:
        step: float32 scalar.
        low: float32 scalar, the lowest level.
        levels: float32 scalar, ``2**bits``.

    Raises:
        ValueError: ``bits`` lies outside 1 to 8.

    Example:
        >>> rounding = AffineRounding(2).set(torch.tensor(0.5), torch.tensor(-0.5))
        >>> rounding(torch.tensor([-2.0, 0.1, 0.3, 9.0]))
        tensor([-0.5000,  0.0000,  0.5000,  1.0000])
    """

    step: Tensor
    low: Tensor
    levels: Tensor

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        check_integer("AffineRounding", "bits", bits, 1)
        if bits > 8:
            raise ValueError(f"AffineRounding: bits must be at most 8; got {bits}.")
        self.register_buffer("step", torch.ones(()))
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("levels", torch.tensor(float(2**bits)))

    def set(self, step: Tensor, low: Tensor) -> Self:
        """Take a step and a lowest level."""
        for buffer, value in ((self.step, step), (self.low, low)):
            buffer.copy_(value.detach())
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The rounded ``x``, of its shape and dtype; arithmetic in float32 or wider."""
        check_float_tensor("AffineRounding", "x", x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        step, low, levels = (each.to(wide.dtype) for each in (self.step, self.low, self.levels))
        return affine_round(wide, step, low, levels).to(x.dtype)

    @property
    def bits(self) -> int:
        """Of a code."""
        return round(float(self.levels.log2()))

    def extra_repr(self) -> str:
        """Bits."""
        return f"bits={self.bits}"
