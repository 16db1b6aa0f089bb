"""The packed product, its transpose and the exact weight as torch operators.

Kernels for each kind of device, fake kernels, gradients, vmap rules. What is computed is told by
:mod:`pyrobust.ops.matmul`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust.ops import _cuda_matmul
from pyrobust.ops._library import define
from pyrobust.ops.formats import levels_of
from pyrobust.ops.packed_weight import (
    EXTRAS_SCHEMA,
    FORMAT_SCHEMA,
    WEIGHT_SCHEMA,
    native_extras,
    native_weight,
)

__all__ = ["linear_kernel", "transpose_kernel"]

# Rows of W that the gradient turns into floats at a time on a GPU: 128 x 4096 floats are 2 MiB.
_GRADIENT_ROWS = 128


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous, with the conjugate and negative bits resolved."""
    return tensor.resolve_conj().resolve_neg().contiguous()


def linear_kernel(
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
    rows: slice | None = None,
) -> Tensor:
    """The product; of some rows of W where ``rows`` names them."""
    if x.is_cuda or codes.is_cuda:
        form = (in_features, bits, group_size, group_dim)
        weight = _cuda_matmul.gpu_weight(codes, scale, zero, *form, *extras)
        return _cuda_matmul.product(weight, x, bias, int8, rows)
    first, count = (0, codes.shape[0]) if rows is None else (rows.start, rows.stop - rows.start)
    out = x.new_empty((*x.shape[:-1], count))
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.float()
    _native.packed_linear(
        _plain(x),
        *native_weight(codes, scale, zero),
        None if bias is None else bias.contiguous(),
        out,
        in_features,
        levels_of(bits),
        group_size,
        group_dim,
        int8,
        native_extras(extras),
        first,
        torch.get_num_threads(),
    )
    return out


def _linear_fake(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scale, zero, bias, *options = inputs
    ctx.save_for_backward(codes, scale, zero, *options[5:])
    ctx.options = tuple(options[:4])
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, scale, zero, *extras = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.pyrobust.packed_linear_transpose(
            grad, codes, scale, zero, *ctx.options, *extras
        )
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1])
        grad_bias = grad_bias.sum(0, dtype=torch.float32)
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return (grad_x, None, None, None, grad_bias, *[None] * 10)


def transpose_kernel(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    in_features: int,
    bits: float,
    group_size: int,
    group_dim: int,
    *extras: Tensor | None,
    rows: slice | None = None,
) -> Tensor:
    """``grad @ W``; of some rows of W where ``rows`` names them."""
    flat = _plain(grad).reshape(grad.shape[:-1].numel(), grad.shape[-1])
    form = (in_features, bits, group_size, group_dim)
    first, stop = (0, codes.shape[0]) if rows is None else (rows.start, rows.stop)
    if codes.is_cuda:
        total = _decoded_transpose(flat, codes, scale, zero, *form, *extras, rows=(first, stop))
        return total.reshape(*grad.shape[:-1], in_features)
    out = flat.new_empty((flat.shape[0], in_features))
    _native.packed_linear_transpose(
        flat,
        *native_weight(codes, scale, zero),
        out,
        in_features,
        levels_of(bits),
        group_size,
        group_dim,
        native_extras(extras),
        first,
        torch.get_num_threads(),
    )
    return out.reshape(*grad.shape[:-1], in_features)


def _decoded_transpose(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    in_features: int,
    bits: float,
    group_size: int,
    group_dim: int,
    *extras: Tensor | None,
    rows: tuple[int, int],
) -> Tensor:
    """The same by torch, with W turned into floats one block of rows at a time: on a GPU."""
    flat = grad.float()
    total = flat.new_zeros(flat.shape[0], in_features)
    first, stop = rows
    for begin in range(first, stop, _GRADIENT_ROWS):
        block = slice(begin, min(stop, begin + _GRADIENT_ROWS))
        part = flat[:, begin - first : block.stop - first]
        form = (in_features, bits, group_size, group_dim)
        # Unnamed, so that no block is held while the next one is decoded.
        total.addmm_(part, _dequantize_kernel(codes, scale, zero, *form, *extras, rows=block))
    return total.to(grad.dtype)


def _transpose_fake(
    grad: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, in_features: int, *_: Any
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _transpose_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scale, zero, *options = inputs
    ctx.save_for_backward(codes, scale, zero, *options[4:])
    ctx.options = tuple(options[:4])


def _transpose_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, scale, zero, *extras = ctx.saved_tensors
    result = torch.ops.pyrobust.packed_linear(
        grad, codes, scale, zero, None, *ctx.options, False, *extras
    )
    return (result, *[None] * 12)


def _dequantize_kernel(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    in_features: int,
    bits: float,
    group_size: int,
    group_dim: int,
    *extras: Tensor | None,
    rows: slice | None = None,
) -> Tensor:
    first, stop = (0, codes.shape[0]) if rows is None else (rows.start, rows.stop)
    if codes.is_cuda:
        form = (in_features, bits, group_size, group_dim)
        derived = _cuda_matmul.gpu_weight(codes, scale, zero, *form, *extras)
        return _cuda_matmul.dequantize(derived, first, stop, torch.float32)
    out = codes.new_empty((stop - first, in_features), dtype=torch.float32)
    _native.dequantize(
        *native_weight(codes, scale, zero),
        out,
        in_features,
        levels_of(bits),
        group_size,
        group_dim,
        native_extras(extras),
        first,
        torch.get_num_threads(),
    )
    return out


def _dequantize_fake(
    codes: Tensor, scale: Tensor, zero: Tensor | None, in_features: int, *_: Any
) -> Tensor:
    return codes.new_empty((codes.shape[0], in_features), dtype=torch.float32)


def _batched_rows(operator: str) -> Any:
    """Vmap rule: the mapped axis of the first argument becomes one more leading axis."""

    def rule(info: Any, dims: tuple[int | None, ...], first: Tensor, *rest: Any) -> Any:
        call = getattr(torch.ops.pyrobust, operator)
        if dims[0] is not None and all(dim is None for dim in dims[1:]):
            return call(first.movedim(dims[0], 0), *rest), 0
        results = []
        for i in range(info.batch_size):
            picked = [
                value if dim is None else value.select(dim, i)
                for value, dim in zip((first, *rest), dims, strict=True)
            ]
            results.append(call(*picked))
        return torch.stack(results), 0

    return rule


_OPTIONS = f"int in_features, {FORMAT_SCHEMA}"
define(
    f"packed_linear(Tensor x, {WEIGHT_SCHEMA}, Tensor? bias, {_OPTIONS}, bool int8, "
    f"{EXTRAS_SCHEMA}) -> Tensor",
    linear_kernel,
    _linear_fake,
    cuda=linear_kernel,
    backward=_linear_backward,
    setup_context=_linear_context,
    vmap=_batched_rows("packed_linear"),
)
define(
    f"packed_linear_transpose(Tensor grad, {WEIGHT_SCHEMA}, {_OPTIONS}, {EXTRAS_SCHEMA}) -> Tensor",
    transpose_kernel,
    _transpose_fake,
    cuda=transpose_kernel,
    backward=_transpose_backward,
    setup_context=_transpose_context,
    vmap=_batched_rows("packed_linear_transpose"),
)
define(
    f"dequantize_codes({WEIGHT_SCHEMA}, {_OPTIONS}, {EXTRAS_SCHEMA}) -> Tensor",
    _dequantize_kernel,
    _dequantize_fake,
    cuda=_dequantize_kernel,
)
