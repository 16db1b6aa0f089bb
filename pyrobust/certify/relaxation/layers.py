"""Coefficients times the weights of a layer, and the products that their gradients take.

The coefficients of convolutions lie channels last: torch's convolutions of either direction are two
to four times faster so (26 ms against 6.5, 288 images of 16 x 28 x 28 on one core), since they
neither reorder nor map memory for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from pyrobust.certify.relaxation.convolution import pulled_convolution
from pyrobust.ops._dense_product import product

__all__ = ["Layer", "channels_last"]


def channels_last(tensor: Tensor) -> Tensor:
    """``(N, C, H, W)`` with the channels adjacent, also where there is one."""
    shape = tensor.shape
    strides = (shape[1:].numel(), 1, shape[3] * shape[1], shape[1])
    if tensor.stride() == strides:
        return tensor
    if tensor.is_contiguous(memory_format=torch.channels_last):  # sizes of 1 hide the order
        return tensor.as_strided(shape, strides)
    return torch.empty_like(tensor, memory_format=torch.channels_last).copy_(tensor)


@dataclass(frozen=True)
class Layer:
    """A linear layer, or a two-dimensional convolution, without its numbers.

    Attributes:
        options: stride, padding, dilation and groups of a convolution, else None.
        size: height and width of its input, empty for a linear layer.
        places: pixels of its result, 1 for a linear layer.
    """

    options: dict[str, Any] | None
    size: tuple[int, ...] = ()
    places: int = 1

    def rows(self, flat: Tensor, shape: torch.Size) -> Tensor:
        """``(R, N)`` coefficients of the result in the order of memory, shaped as the layer."""
        if self.options is None:
            return flat.view(-1, shape[-1])
        channels, height, width = shape
        return flat.view(-1, height, width, channels).movedim(3, 1)

    def flat(self, rows: Tensor) -> Tensor:
        """The other way round: the order of memory."""
        return rows if self.options is None else rows.movedim(1, 3)

    def everywhere(self, bias: Tensor | None) -> Tensor | None:
        """``(N,)``: the bias of each element of a value, in the order of memory."""
        return None if bias is None else bias.repeat(self.places)

    def of_biases(self, by_elements: Tensor, count: int) -> Tensor:
        """The gradient of the biases from that of :meth:`everywhere`."""
        return by_elements.view(-1, count).sum(0)

    def pull(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Coefficients of the input from those of the result."""
        if self.options is None:
            return product(rows, weight)
        flat, last = channels_last(rows), channels_last(weight)
        return pulled_convolution(flat, last, self.options, list(self.size))

    def by_rows(self, by_pulled: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the result's coefficients."""
        if self.options is None:
            return product(by_pulled, weight.t())
        return F.conv2d(channels_last(by_pulled), channels_last(weight), None, **self.options)

    def by_weight(self, by_pulled: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the weights."""
        if self.options is None:
            return product(rows.t(), by_pulled)
        shape = list(weight.shape)
        images, values = channels_last(by_pulled), channels_last(rows)
        gradient: Tensor = conv2d_weight(images, shape, values, **self.options)
        return gradient

    def sums(self, rows: Tensor) -> Tensor:
        """``(R, K)``: what each bias is multiplied by."""
        return rows if self.options is None else rows.sum((2, 3))

    def add_biases(self, by_rows: Tensor, by_value: Tensor, bias: Tensor) -> Tensor:
        """``by_value`` times the biases onto the gradient of the result's coefficients."""
        if self.options is None:
            return by_rows.addr_(by_value, bias)
        by_rows += torch.outer(by_value, bias)[:, :, None, None]
        return by_rows
