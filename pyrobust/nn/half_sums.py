"""HalfSums: the input of a packed layer whose 256 levels lie half a step beside those of a byte.

``(k + 1/2) x`` summed is ``k x`` summed and half of the sum of ``x``. So the packed weight holds
the integers ``k`` and, for every sum, one column more with the integer 1, and this module gives
that column its input.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pyrobust._checks import check_integer
from pyrobust.nn.packed_conv import PackedConv2d
from pyrobust.nn.packed_linear import PackedLinear
from pyrobust.nn.rounded_input import RoundedInput
from pyrobust.quantize.half_integer import HalfStepTensor
from pyrobust.quantize.qtensor import QTensor

__all__ = ["HalfSums", "packed_conv_of", "packed_linear_of"]


class HalfSums(nn.Module):
    """Appends half of the sum over channels to them, in each group.

    Args:
        axis: of the channels: -1 for ``(..., C)``, -3 for images ``(B, C, H, W)``.
        groups: parts of the channels with sums of their own.

    Raises:
        TypeError: ``groups`` is not an integer.
        ValueError: ``groups`` is below 1.

    Example:
        >>> HalfSums()(torch.tensor([[1.0, 2.0, 5.0]]))
        tensor([[1., 2., 5., 4.]])
    """

    def __init__(self, axis: int = -1, groups: int = 1) -> None:
        super().__init__()
        check_integer("HalfSums", "groups", groups, 1)
        self.axis, self.groups = axis, groups

    def forward(self, x: Tensor) -> Tensor:
        """``groups`` channels more than ``x`` has; same dtype, sums in float32 or wider."""
        parts = x.unflatten(self.axis, (self.groups, -1))
        wide = parts.to(torch.promote_types(x.dtype, torch.float32))
        half = wide.sum(self.axis, keepdim=True) / 2
        start = self.axis - 1
        return torch.cat([parts, half.to(x.dtype)], self.axis).flatten(start, self.axis)

    def extra_repr(self) -> str:
        """Axis and groups."""
        return f"axis={self.axis}, groups={self.groups}"


def packed_linear_of(
    stored: QTensor | HalfStepTensor, bias: Tensor | None
) -> PackedLinear | RoundedInput:
    """The packed layer of a weight, behind its half sums where it needs them."""
    if isinstance(stored, HalfStepTensor):
        return RoundedInput(HalfSums(), PackedLinear.from_qtensor(stored.integers, bias))
    return PackedLinear.from_qtensor(stored, bias)


def packed_conv_of(
    stored: QTensor | HalfStepTensor, conv: nn.Conv2d
) -> PackedConv2d | RoundedInput:
    """The packed twin of ``conv`` with another weight, behind its half sums where needed."""
    halves = isinstance(stored, HalfStepTensor)
    qtensor = stored.integers if isinstance(stored, HalfStepTensor) else stored
    shape = copy.copy(conv)  # only its numbers are read
    shape.in_channels += halves * conv.groups
    layer = PackedConv2d.like(
        shape,
        bits=qtensor.bits,
        group_size=qtensor.group_size,
        group_dim=1,
        symmetric=True,
        activations=None,
    )
    layer.extend(qtensor.layout).adopt(qtensor, conv.bias)
    return RoundedInput(HalfSums(-3, conv.groups), layer) if halves else layer
