"""Convolutions on packed weights: the packed product of patches, unfolded in blocks.

A few output rows of a few images are unfolded at a time (:data:`COLUMN_BYTES`), so its scratch
memory does not grow with the batch or the image. A line is an image of height 1, and such an image
is laid on its side, so that a long one has rows to take a few of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from pyrobust._checks import check_choice
from pyrobust.ops._conv_window import (
    Sizes,
    Window,
    check_input,
    input_rows,
    output_size,
    window_of,
)
from pyrobust.ops._decompositions import operator
from pyrobust.ops._library import define, dispatcher_needed, refuse_forward_mode
from pyrobust.ops._matmul_operators import linear_kernel, transpose_kernel
from pyrobust.ops.matmul import dequantize_codes
from pyrobust.ops.packed_weight import (
    EXTRAS_SCHEMA,
    FORMAT_SCHEMA,
    NO_EXTRAS,
    WEIGHT_SCHEMA,
    WeightExtras,
    check_weight,
)

__all__ = ["COLUMN_BYTES", "packed_conv1d", "packed_conv2d"]

# Unfolded input held at a time; 1.8 times faster than 16 MiB (3 x 3, 32 channels).
COLUMN_BYTES = 1 << 20


def packed_conv1d(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    in_channels: int,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    bits: float,
    group_size: int,
    group_dim: int = 1,
    activations: str | None = None,
    extras: WeightExtras | None = None,
) -> Tensor:
    """One-dimensional convolution with a packed weight, as ``torch.nn.functional.conv1d``.

    The packed matrix is ``(O, in_channels / groups * k)`` in torch's order. All else is as in
    :func:`packed_conv2d`, of images of height 1.

    Args:
        x: ``(B, in_channels, L)`` or ``(in_channels, L)``, of a type that ``packed_conv2d`` takes.
        codes: packed codes, uint8 ``(O, row_bytes)``.
        scale: scales of the groups.
        zero: zero-points, or None where symmetric.
        bias: ``(O,)`` or None.
        in_channels: channels of ``x``.
        kernel_size: one number, like the next three, alone or in a tuple.
        stride: steps of the window, ``>= 1``.
        padding: zeros on both sides, ``"same"`` (stride 1 only) or ``"valid"``.
        dilation: steps inside the window, ``>= 1``.
        groups: divides ``in_channels`` and ``O``.
        bits: format of the codes: 1, 1.58, 2, 3, 4 or 8.
        group_size: weights that share a scale.
        group_dim: 1 groups along a row, 0 along a column.
        activations: None or ``"int8"``.
        extras: row scales, codebook and sparse remainder, where the weight has them.

    Returns:
        ``(B, O, L')`` in the dtype of ``x``; differentiable in ``x`` and ``bias``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: shapes disagree, or an option is out of range.
    """
    options: dict[str, Any] = {"in_channels": in_channels, "kernel_size": kernel_size}
    options |= {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    options |= {"bits": bits, "group_size": group_size, "group_dim": group_dim}
    options |= {"activations": activations, "extras": extras}
    return _packed_conv(packed_conv1d, 1, x, codes, scale, zero, bias, options)


def packed_conv2d(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    in_channels: int,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    bits: float,
    group_size: int,
    group_dim: int = 1,
    activations: str | None = None,
    extras: WeightExtras | None = None,
) -> Tensor:
    """Two-dimensional convolution with a packed weight, as ``torch.nn.functional.conv2d``.

    The weight is the packed matrix ``(O, in_channels / groups * kh * kw)`` in torch's order. With
    ``activations="int8"`` each unfolded patch is rounded with a scale of its own.

    Args:
        x: ``(B, in_channels, H, W)`` or ``(in_channels, H, W)``; float32, bfloat16 or float16.
            float64, which no kernel takes, meets the decoded weight in torch's own convolution
            (for ``"int8"``: rounded to float32 first).
        codes: packed codes, uint8 ``(O, row_bytes)``.
        scale: scales of the groups.
        zero: zero-points, or None where symmetric.
        bias: ``(O,)`` or None.
        in_channels: channels of ``x``.
        kernel_size: ``kh, kw`` or one number for both, like the next three.
        stride: steps of the window, ``>= 1``.
        padding: zeros on both sides, ``"same"`` (stride 1 only) or ``"valid"``.
        dilation: steps inside the window, ``>= 1``.
        groups: divides ``in_channels`` and ``O``.
        bits: format of the codes: 1, 1.58, 2, 3, 4 or 8.
        group_size: weights that share a scale.
        group_dim: 1 groups along a row, 0 along a column.
        activations: None or ``"int8"``.
        extras: row scales, codebook and sparse remainder, where the weight has them.

    Returns:
        ``(B, O, H', W')`` in the dtype of ``x``; differentiable in ``x`` and ``bias``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: shapes disagree, or an option is out of range.
    """
    options: dict[str, Any] = {"in_channels": in_channels, "kernel_size": kernel_size}
    options |= {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    options |= {"bits": bits, "group_size": group_size, "group_dim": group_dim}
    options |= {"activations": activations, "extras": extras}
    return _packed_conv(packed_conv2d, 2, x, codes, scale, zero, bias, options)


def _packed_conv(
    function: Any,
    axes: int,
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """The public ``function`` over 1 or 2 ``axes``, with its keyword arguments as ``options``."""
    if has_torch_function_unary(x):
        result: Tensor = handle_torch_function(
            function, (x,), x, codes, scale, zero, bias, **options
        )
        return result
    return _convolved(function.__name__, axes, x, codes, scale, zero, bias, **options)


def _convolved(
    subject: str,
    axes: int,
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    *,
    in_channels: int,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Sizes | str,
    dilation: Sizes,
    groups: int,
    bits: float,
    group_size: int,
    group_dim: int,
    activations: str | None,
    extras: WeightExtras | None,
) -> Tensor:
    window, pad = window_of(subject, axes, kernel_size, stride, padding, dilation)
    check_input(subject, axes, x, in_channels, groups, codes.shape[0], window, pad)
    check_choice(subject, "activations", activations, (None, "int8"))
    extras = extras or NO_EXTRAS
    terms = in_channels // groups * window[0][0] * window[0][1]
    check_weight(subject, codes, scale, zero, terms, bits, group_size, group_dim, extras)
    images = x if x.ndim == axes + 2 else x.unsqueeze(0)
    images = images if axes == 2 else images.unsqueeze(-2)
    if x.dtype == torch.float64 and activations is None:
        weight = dequantize_codes(
            codes,
            scale,
            zero,
            in_features=terms,
            bits=bits,
            group_size=group_size,
            group_dim=group_dim,
            extras=extras,
        )
        out = _double_convolution(images, weight, bias, window, pad, groups)
    else:
        refuse_forward_mode(subject, x, bias)
        kernel_type = torch.float32 if x.dtype == torch.float64 else x.dtype
        weight_format = (float(bits), group_size, group_dim)
        tensors = (images.to(kernel_type), codes, scale, zero, bias)
        run = operator("packed_conv2d") if dispatcher_needed(*tensors) else _conv_kernel
        out = run(*tensors, *window, pad, groups, *weight_format, activations, *extras).to(x.dtype)
    out = out if axes == 2 else out.squeeze(-2)
    return out if x.ndim == axes + 2 else out.squeeze(0)


# -- kernels -----------------------------------------------------------------------------------


def _double_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    pad: tuple[int, int, int, int],
    groups: int,
) -> Tensor:
    """The convolution of float64 images with a decoded weight ``(O, columns)``, by torch."""
    kernel, stride, dilation = window
    filters = weight.double().reshape(-1, x.shape[1] // groups, *kernel)
    shift = None if bias is None else bias.double()
    return F.conv2d(F.pad(x, pad), filters, shift, stride, 0, dilation, groups)


def _blocks(total: int, bytes_each: int) -> Iterator[slice]:
    """Slices of ``range(total)`` that hold at most COLUMN_BYTES of unfolded input, or one entry."""
    step = max(1, COLUMN_BYTES // max(1, bytes_each))
    for first in range(0, total, step):
        yield slice(first, min(total, first + step))


def _unfold(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Patches of padded images ``(B, C, H, W)`` as rows: ``(B, H', W', C * kh * kw)``.

    One copy for each place in the window: 2.5 times faster than one strided copy of all patches or
    ``F.unfold`` with a transpose (34 x 34 images, 32 channels, 3 x 3).
    """
    tall, wide = output_size(x.shape, kernel, stride, dilation, (0, 0, 0, 0))
    if tuple(kernel) == tuple(stride) == (1, 1):
        return x.permute(0, 2, 3, 1)
    patches = x.new_empty(x.shape[0], tall, wide, x.shape[1], *kernel)
    for i in range(kernel[0]):
        down = slice(i * dilation[0], i * dilation[0] + (tall - 1) * stride[0] + 1, stride[0])
        for j in range(kernel[1]):
            across = slice(j * dilation[1], j * dilation[1] + (wide - 1) * stride[1] + 1, stride[1])
            patches[..., i, j] = x[:, :, down, across].permute(0, 2, 3, 1)
    return patches.flatten(3)


def _lies(shape: Sequence[int], kernel: Sequence[int], pad: Sequence[int]) -> bool:
    """Whether images are of height 1 throughout, so that they have one row to unfold."""
    return (shape[2], kernel[0], pad[2], pad[3]) == (1, 1, 0, 0)


def _turned(
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], pad: Sequence[int]
) -> tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]:
    """The window for images whose height and width change places."""
    return kernel[::-1], stride[::-1], dilation[::-1], (*pad[2:], *pad[:2])


def _conv_kernel(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    pad: Sequence[int],
    *options: Any,
) -> Tensor:
    weight, window = (codes, scale, zero, bias), (kernel, stride, dilation, pad)
    if not _lies(x.shape, kernel, pad):
        return _by_rows(x, *weight, *window, *options)
    out = _by_rows(x.mT, *weight, *_turned(*window), *options)
    return out.view(out.shape[0], out.shape[1], 1, out.shape[2])


def _by_rows(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    pad: Sequence[int],
    groups: int,
    bits: float,
    group_size: int,
    group_dim: int,
    activations: str | None,
    *extras: Tensor | None,
) -> Tensor:
    tall, wide = output_size(x.shape, kernel, stride, dilation, pad)
    out = x.new_empty(x.shape[0], codes.shape[0], tall, wide)
    channels, outputs = x.shape[1] // groups, codes.shape[0] // groups
    columns = channels * kernel[0] * kernel[1]
    row_bytes = wide * columns * x.element_size()
    for images in _blocks(x.shape[0], row_bytes * tall):
        padded = F.pad(x[images], tuple(pad))
        for rows in _blocks(tall, row_bytes):
            reads = input_rows(rows, kernel[0], stride[0], dilation[0])
            for group in range(groups):
                part = padded[:, group * channels : (group + 1) * channels, reads]
                writes = slice(group * outputs, (group + 1) * outputs)
                product = linear_kernel(
                    _unfold(part, kernel, stride, dilation),
                    codes,
                    scale,
                    zero,
                    bias,
                    columns,
                    bits,
                    group_size,
                    group_dim,
                    activations == "int8",
                    *extras,
                    rows=writes,
                )
                out[images, writes, rows] = product.permute(0, 3, 1, 2)
    return out


def _conv_fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    pad: Sequence[int],
    *_: Any,
) -> Tensor:
    size = output_size(x.shape, kernel, stride, dilation, pad)
    return x.new_empty(x.shape[0], codes.shape[0], *size)


def _input_grad_kernel(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    pad: Sequence[int],
    *options: Any,
) -> Tensor:
    """Gradient to the input of the convolution, accumulated in float32."""
    weight, window = (codes, scale, zero), (kernel, stride, dilation, pad)
    if not _lies(shape, kernel, pad):
        return _input_grad_by_rows(grad, *weight, shape, *window, *options)
    turned = (*shape[:2], shape[3], shape[2])
    out = _input_grad_by_rows(grad.mT, *weight, turned, *_turned(*window), *options)
    return out.view(tuple(shape))


def _input_grad_by_rows(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    pad: Sequence[int],
    groups: int,
    bits: float,
    group_size: int,
    group_dim: int,
    *extras: Tensor | None,
) -> Tensor:
    left, right, top, bottom = pad
    out = grad.new_empty(tuple(shape))
    channels, outputs = shape[1] // groups, codes.shape[0] // groups
    columns = channels * kernel[0] * kernel[1]
    tall, wide = grad.shape[-2:]
    high, broad = shape[2] + top + bottom, shape[3] + left + right
    for images in _blocks(shape[0], 4 * tall * wide * columns):
        count = images.stop - images.start
        padded = grad.new_zeros(count, shape[1], high, broad, dtype=torch.float32)
        for rows in _blocks(tall, 4 * wide * columns):
            reads = input_rows(rows, kernel[0], stride[0], dilation[0])
            for group in range(groups):
                filters = slice(group * outputs, (group + 1) * outputs)
                unfolded = transpose_kernel(
                    grad[images, filters, rows].permute(0, 2, 3, 1).reshape(-1, outputs).float(),
                    codes,
                    scale,
                    zero,
                    columns,
                    bits,
                    group_size,
                    group_dim,
                    *extras,
                    rows=filters,
                )
                padded[:, group * channels : (group + 1) * channels, reads] += F.fold(
                    unfolded.reshape(count, -1, columns).transpose(1, 2),
                    (reads.stop - reads.start, broad),
                    tuple(kernel),
                    tuple(dilation),
                    0,
                    tuple(stride),
                )
        out[images] = padded[:, :, top : top + shape[2], left : left + shape[3]].to(out.dtype)
    return out


def _input_grad_fake(grad: Tensor, *arguments: Any) -> Tensor:
    return grad.new_empty(tuple(arguments[3]))


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, zero, bias, *options = inputs
    ctx.save_for_backward(codes, scale, zero, *options[9:])
    ctx.shape, ctx.options = x.shape, options[:8]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        codes, scale, zero, *extras = ctx.saved_tensors
        arguments = (codes, scale, zero, ctx.shape, *ctx.options, *extras)
        grad_x = torch.ops.pyrobust.packed_conv2d_input_grad(grad, *arguments)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
    return (grad_x, None, None, None, grad_bias, *[None] * 14)


def _input_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scale, zero, _, *options = inputs
    ctx.save_for_backward(codes, scale, zero, *options[8:])
    ctx.options = options[:8]


def _input_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The map is linear and its adjoint is the convolution itself."""
    codes, scale, zero, *extras = ctx.saved_tensors
    weight = (codes, scale, zero, None)
    again = torch.ops.pyrobust.packed_conv2d(grad, *weight, *ctx.options, None, *extras)
    return (again, *[None] * 17)


def _conv_vmap(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any
) -> tuple[Tensor, int]:
    """A mapped axis of ``x`` joins the batch."""
    if any(isinstance(dim, int) for dim in in_dims[1:]):
        raise NotImplementedError("packed_conv2d: vmap over the packed weight or the bias.")
    x = x.movedim(in_dims[0] or 0, 0)
    out = torch.ops.pyrobust.packed_conv2d(x.flatten(0, 1), *rest)
    return out.unflatten(0, x.shape[:2]), 0


_WINDOW = "int[] kernel, int[] stride, int[] dilation, int[] pad, int groups"

define(
    f"packed_conv2d(Tensor x, {WEIGHT_SCHEMA}, Tensor? bias, {_WINDOW}, {FORMAT_SCHEMA}, "
    f"str? activations, {EXTRAS_SCHEMA}) -> Tensor",
    _conv_kernel,
    _conv_fake,
    cuda=_conv_kernel,
    backward=_conv_backward,
    setup_context=_conv_setup,
    vmap=_conv_vmap,
)
define(
    f"packed_conv2d_input_grad(Tensor grad, {WEIGHT_SCHEMA}, SymInt[] shape, {_WINDOW}, "
    f"{FORMAT_SCHEMA}, {EXTRAS_SCHEMA}) -> Tensor",
    _input_grad_kernel,
    _input_grad_fake,
    cuda=_input_grad_kernel,
    backward=_input_grad_backward,
    setup_context=_input_grad_setup,
)
