"""The packed operators in torch's own operations, for programs that run without pyrobust.

``torch.export`` keeps an operator as one node. ``program.run_decompositions(decompositions())``
replaces it by what it computes, and ``torch.onnx.export`` gets that at once. Codes stay packed in
the program and are decoded by arithmetic in float32, where every step is exact: the weight is the
stored one to the bit. Products are torch's float32 products, in whatever order a runtime sums them:
an evaluation that bounds with ``rounding="deployed"`` contain. ``activations="int8"`` rounds as the
kernels do, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrobust.ops._conv_window import output_size
from pyrobust.ops._library import onnx_exporting
from pyrobust.ops.formats import code_multiplier, levels_of, symmetric_zero

__all__ = ["decompositions", "operator", "unpacked"]

_EXACT_COLUMNS = 2**24 // 127  # of 8-bit integers whose sums float32 holds


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What replaces each operator, for ``torch.export.ExportedProgram.run_decompositions``.

    Returns:
        A table from operators to functions in torch's own operations.

    Example:
        >>> from pyrobust.nn import PackedLinear
        >>> layer = PackedLinear(4, 2)
        >>> program = torch.export.export(layer, (torch.ones(1, 4),))
        >>> plain = program.run_decompositions(decompositions())
        >>> any("pyrobust" in str(node.target) for node in plain.graph.nodes)
        False
    """
    return {getattr(torch.ops.pyrobust, name).default: by for name, by in _DECOMPOSED.items()}


def operator(name: str) -> Callable[..., Any]:
    """The operator of that name; while torch writes an ONNX file, what replaces it."""
    chosen: Callable[..., Any] = (
        _DECOMPOSED[name] if onnx_exporting() else getattr(torch.ops.pyrobust, name)
    )
    return chosen


# -- the weight --------------------------------------------------------------------------------


def unpacked(codes: Tensor, columns: int, bits: float) -> Tensor:
    """Codes one to an element, as float32: ``(rows, row_bytes)`` to ``(rows, columns)``."""
    rows = codes.shape[0]
    if bits == 8:
        return codes.float()
    if bits == 3:  # a code may cross a byte border
        ones = _digits(codes, 2, 8).reshape(rows, -1)[:, : 3 * columns].reshape(rows, columns, 3)
        return ones[..., 0] + 2 * ones[..., 1] + 4 * ones[..., 2]
    count = 5 if bits == 1.58 else 8 // int(bits)
    return _digits(codes, levels_of(bits), count).reshape(rows, -1)[:, :columns]


def _digits(codes: Tensor, base: int, count: int) -> Tensor:
    """The lowest ``count`` digits of each byte, the lowest first, on a new axis."""
    middle = codes.float() + 0.5  # half a unit away from every border that rounding could cross
    above = torch.stack([(middle / base**k).floor() for k in range(count + 1)], -1)
    return above[..., :-1] - base * above[..., 1:]


def _dense(
    integers: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: float,
    group_size: int,
    group_dim: int,
    codebook: Tensor | None,
) -> Tensor:
    """The weight of unpacked codes without row scales and remainder.

    Groups get an axis of their own: scales that were expanded instead would be constants as large
    as the weight, which an exporter may write into a file.
    """
    shift: float | Tensor = symmetric_zero(bits) if codebook is None else 128
    if codebook is not None:
        integers = codebook.float()[integers.long()]
    elif bits == 1:
        integers = code_multiplier(bits) * integers
    rows, columns = integers.shape
    missing = scale.shape[group_dim] * group_size - integers.shape[group_dim]
    if missing:
        integers = F.pad(integers, (0, missing) if group_dim == 1 else (0, 0, 0, missing))
    grouped = integers.unflatten(group_dim, (scale.shape[group_dim], group_size))
    if zero is not None:
        shift = zero.float().unsqueeze(group_dim + 1)
    weight: Tensor = (grouped - shift) * scale.float().unsqueeze(group_dim + 1)
    return weight.flatten(group_dim, group_dim + 1)[:rows, :columns]


def _dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    in_features: int,
    bits: float,
    group_size: int,
    group_dim: int,
    row_scale: Tensor | None = None,
    codebook: Tensor | None = None,
    values: Tensor | None = None,
    columns: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    integers = unpacked(codes, in_features, bits)
    weight = _dense(integers, scale, zero, bits, group_size, group_dim, codebook)
    if row_scale is not None:
        weight = weight * row_scale.unsqueeze(-1)
    if values is None or columns is None or offsets is None or not values.shape[0]:
        return weight
    # The row of an entry is the number of rows that end at or before it.
    ends = torch.zeros(values.shape[0] + 1, dtype=torch.int64, device=codes.device)
    ends = ends.scatter_add(0, offsets[1:], torch.ones_like(offsets[1:]))
    places = ends.cumsum(0)[:-1] * in_features + columns
    return weight.reshape(-1).scatter_add(0, places, values.float()).reshape(weight.shape)


# -- operators ---------------------------------------------------------------------------------


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``x`` as 8-bit integers in float32, and their steps (core/activation_int8.h)."""
    wide = x.double()
    step = wide.abs().amax(-1, keepdim=True) / 127
    nonzero = torch.where(step > 0, step, 1.0)
    return (wide / nonzero).round().float(), step.float()


def _product(x: Tensor, weight: Tensor, int8: bool) -> Tensor:
    """``x W^T`` in float32, for ``(..., K)`` and ``(..., N, K)``."""
    if not int8:
        return x.float() @ weight.transpose(-1, -2)
    codes, step = _rounded(x)
    return (codes @ weight.transpose(-1, -2)) * step


def _linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    bits: float,
    group_size: int,
    group_dim: int,
    int8: bool,
    *extras: Tensor | None,
) -> Tensor:
    form = (in_features, bits, group_size, group_dim)
    product = _product(x, _dequantize(codes, scale, zero, *form, *extras), int8)
    return (product if bias is None else product + bias.float()).to(x.dtype)


def _conv2d(
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
    channels = x.shape[1] // groups
    columns = channels * kernel[0] * kernel[1]
    weight = _dequantize(codes, scale, zero, columns, bits, group_size, group_dim, *extras)
    shift = None if bias is None else bias.float()
    padded = F.pad(x, tuple(pad)) if any(pad) else x
    if activations is None:
        filters = weight.reshape(-1, channels, *kernel)
        out = F.conv2d(padded.float(), filters, shift, stride, 0, dilation, groups)
        return out.to(x.dtype)
    tall, wide = output_size(padded.shape, kernel, stride, dilation, (0, 0, 0, 0))
    patches = _patches(padded, kernel, stride, dilation, tall, wide)
    patches = patches.reshape(x.shape[0], groups, columns, tall * wide).transpose(2, 3)
    product = _product(patches, weight.reshape(groups, -1, columns), int8=True).transpose(2, 3)
    out = product.reshape(x.shape[0], codes.shape[0], tall, wide)
    return (out if shift is None else out + shift[:, None, None]).to(x.dtype)


def _patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    tall: int,
    wide: int,
) -> Tensor:
    """``(B, C, H, W)``, padded, to ``(B, C, kh * kw, H', W')``: one slice a place in the window."""
    places = []
    for i in range(kernel[0]):
        down = slice(i * dilation[0], i * dilation[0] + (tall - 1) * stride[0] + 1, stride[0])
        for j in range(kernel[1]):
            across = slice(j * dilation[1], j * dilation[1] + (wide - 1) * stride[1] + 1, stride[1])
            places.append(x[:, :, down, across])
    return torch.stack(places, 2)


def _embedding(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    embedding_dim: int,
    bits: float,
    group_size: int,
    group_dim: int,
    dtype: torch.dtype,
    row_scale: Tensor | None = None,
    codebook: Tensor | None = None,
    *remainder: Tensor | None,
) -> Tensor:
    flat = indices.reshape(-1).long()
    form = (embedding_dim, bits, group_size, group_dim)
    if any(part is not None for part in remainder):  # rare: the whole table is decoded
        rows = _dequantize(codes, scale, zero, *form, row_scale, codebook, *remainder)[flat]
        return rows.to(dtype).reshape(*indices.shape, embedding_dim)

    if group_dim == 0:  # each row found has scales of its own, one to a weight
        scale, zero = scale[flat // group_size], None if zero is None else zero[flat // group_size]
        group_size = 1
    else:
        scale, zero = scale[flat], None if zero is None else zero[flat]
    integers = unpacked(codes[flat], embedding_dim, bits)
    rows = _dense(integers, scale, zero, bits, group_size, 1, codebook)
    if row_scale is not None:
        rows = rows * row_scale[flat].unsqueeze(-1)
    return rows.to(dtype).reshape(*indices.shape, embedding_dim)


def _complex_sums(x_real: Tensor, x_imag: Tensor, codes: Tensor, in_features: int) -> Tensor:
    """The four sums, exact: in float32 where it holds them all, else in float64."""
    exact = torch.float32 if in_features <= _EXACT_COLUMNS else torch.float64
    phase = unpacked(codes, in_features, 2)
    odd = phase - 2 * (phase / 2).floor()
    sign = 1 - (phase - odd)
    u, v = ((1 - odd) * sign).to(exact).t(), (odd * sign).to(exact).t()
    a, b = x_real.to(exact), x_imag.to(exact)
    return torch.stack([a @ u, b @ v, a @ v, -(b @ u)])


def _complex_product(
    x_real: Tensor,
    x_imag: Tensor,
    codes: Tensor,
    scales: Tensor,
    step_real: Tensor,
    step_imag: Tensor,
    in_features: int,
) -> tuple[Tensor, Tensor]:
    a_re, b_re, a_im, b_im = _complex_sums(x_real, x_imag, codes, in_features).double()
    real, imag = scales.double()
    t, r = step_real.double().unsqueeze(-1), step_imag.double().unsqueeze(-1)
    y_real = (real * t) * a_re + (imag * r) * b_re
    y_imag = (imag * t) * a_im + (real * r) * b_im
    return y_real.float(), y_imag.float()


_DECOMPOSED: dict[str, Callable[..., Any]] = {
    "dequantize_codes": _dequantize,
    "packed_linear": _linear,
    "packed_conv2d": _conv2d,
    "packed_embedding": _embedding,
    "complex_2bit_sums": lambda *args: _complex_sums(*args).to(torch.int32),
    "complex_2bit_matmul": _complex_product,
}
