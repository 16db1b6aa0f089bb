"""The window of a convolution: its arguments as torch takes them, checked, and what they imply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyrobust._checks import check_choice, check_float_tensor, check_integer

__all__ = ["Sizes", "Window", "check_input", "input_rows", "output_size", "window_of"]

_FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_AXES = {1: "L", 2: "H, W"}
Sizes = int | Sequence[int]
Window = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # kernel, stride, dilation
Sides = tuple[int, int, int, int]  # left, right, top, bottom


def _numbers(subject: str, name: str, value: Sizes, axes: int, least: int) -> tuple[int, ...]:
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes:
        accepted = "one integer" if axes == 1 else "one or two integers"
        raise ValueError(f"{subject}: {name} must be {accepted}; got {value}.")
    for entry in values:
        check_integer(subject, name, entry, least)
    return values


def window_of(
    subject: str,
    axes: int,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Sizes | str,
    dilation: Sizes,
) -> tuple[Window, Sides]:
    """Window and zeros around an image; those of a line (``axes`` 1) as an image of height 1."""
    kernel = _numbers(subject, "kernel_size", kernel_size, axes, 1)
    step = _numbers(subject, "stride", stride, axes, 1)
    gap = _numbers(subject, "dilation", dilation, axes, 1)
    zeros = _zeros(subject, padding, kernel, step, gap)
    if axes == 1:
        kernel, step, gap, zeros = (1, *kernel), (1, *step), (1, *gap), [(0, 0), *zeros]
    window = ((kernel[0], kernel[1]), (step[0], step[1]), (gap[0], gap[1]))
    return window, (*zeros[1], *zeros[0])


def _zeros(
    subject: str,
    padding: Sizes | str,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> list[tuple[int, int]]:
    """Zeros before and after, along each axis."""
    if not isinstance(padding, str):
        return [(n, n) for n in _numbers(subject, "padding", padding, len(kernel), 0)]
    check_choice(subject, "padding", padding, ("same", "valid"))
    if padding == "valid":
        return [(0, 0) for _ in kernel]
    if max(stride) != 1:
        raise ValueError(f"{subject}: padding 'same' needs stride 1; got {stride}.")
    reach = [gap * (size - 1) for size, gap in zip(kernel, dilation, strict=True)]
    return [(total // 2, total - total // 2) for total in reach]


def check_input(
    subject: str,
    axes: int,
    x: Any,
    in_channels: int,
    groups: int,
    rows: int,
    window: Window,
    pad: Sides,
) -> None:
    """Raise unless ``x`` is a batch, or one, of images or lines that the window fits into."""
    check_float_tensor(subject, "x", x)
    check_choice(subject, "dtype of x", x.dtype, _FLOAT_TYPES)
    check_integer(subject, "groups", groups, 1)
    if x.ndim not in (axes + 1, axes + 2) or x.shape[-1 - axes] != in_channels:
        single = f"{in_channels}, {_AXES[axes]}"
        raise ValueError(
            f"{subject}: x must have shape (B, {single}) or ({single}); got {tuple(x.shape)}."
        )
    if in_channels % groups or rows % groups:
        raise ValueError(
            f"{subject}: groups must divide {in_channels} and {rows} channels; got {groups}."
        )
    kernel, _, dilation = window
    for axis in range(-axes, 0):
        size = x.shape[axis] + sum(pad[:2] if axis == -1 else pad[2:])
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        if size < reach:
            raise ValueError(
                f"{subject}: the padded input must be at least as large as the window; got "
                f"{size} and {reach} along axis {axis}."
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
