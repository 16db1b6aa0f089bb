"""The window of a convolution: its arguments as torch takes them, checked, and what they imply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyrobust._checks import check_choice, check_float_tensor, check_integer

__all__ = ["Pair", "Window", "check_input", "four_sides", "input_rows", "output_size", "pair"]

_FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Pair = int | Sequence[int]
Window = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # kernel, stride, dilation


def pair(name: str, value: Pair) -> tuple[int, int]:
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) != 2:
        raise ValueError(f"packed_conv2d: {name} must be one or two integers; got {value}.")
    for entry in values:
        check_integer("packed_conv2d", name, entry, 1)
    return values


def four_sides(
    padding: Pair | str,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int, int, int]:
    """Zeros at the left, right, top and bottom."""
    if isinstance(padding, str):
        check_choice("packed_conv2d", "padding", padding, ("same", "valid"))
        if padding == "valid":
            return (0, 0, 0, 0)
        if stride != (1, 1):
            raise ValueError(f"packed_conv2d: padding 'same' needs stride 1; got {stride}.")
        tall, wide = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        return (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2)
    values = (padding, padding) if isinstance(padding, int) else tuple(padding)
    if len(values) != 2:
        raise ValueError(f"packed_conv2d: padding must be one or two integers; got {padding}.")
    for entry in values:
        check_integer("packed_conv2d", "padding", entry, 0)
    return (values[1], values[1], values[0], values[0])


def check_input(
    x: Any, in_channels: int, groups: int, rows: int, window: Window, pad: tuple[int, ...]
) -> None:
    check_float_tensor("packed_conv2d", "x", x)
    check_choice("packed_conv2d", "dtype of x", x.dtype, _FLOAT_TYPES)
    if x.ndim not in (3, 4) or x.shape[-3] != in_channels:
        raise ValueError(
            f"packed_conv2d: x must have shape (B, {in_channels}, H, W) or ({in_channels}, H, W); "
            f"got {tuple(x.shape)}."
        )
    if in_channels % groups or rows % groups:
        raise ValueError(
            f"packed_conv2d: groups must divide {in_channels} and {rows} channels; got {groups}."
        )
    kernel, _, dilation = window
    for axis, size, both in ((0, x.shape[-2], pad[2] + pad[3]), (1, x.shape[-1], pad[0] + pad[1])):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        if size + both < reach:
            raise ValueError(
                f"packed_conv2d: the padded input must be at least as large as the window; got "
                f"{size + both} and {reach} along axis {axis - 2}."
            )


def output_size(
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    pad: Sequence[int],
) -> tuple[int, int]:
    tall = shape[-2] + pad[2] + pad[3] - dilation[0] * (kernel[0] - 1) - 1
    wide = shape[-1] + pad[0] + pad[1] - dilation[1] * (kernel[1] - 1) - 1
    return tall // stride[0] + 1, wide // stride[1] + 1


def input_rows(rows: slice, kernel: int, stride: int, dilation: int) -> slice:
    """The padded input rows that a slice of output rows reads."""
    return slice(rows.start * stride, (rows.stop - 1) * stride + dilation * (kernel - 1) + 1)
