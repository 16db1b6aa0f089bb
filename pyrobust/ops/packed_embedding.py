"""Embedding on a packed table: a gather that decodes the rows that are asked for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from pyrobust import _native
from pyrobust.ops import _cuda_matmul
from pyrobust.ops._decompositions import operator
from pyrobust.ops._library import define, dispatcher_needed
from pyrobust.ops.formats import levels_of
from pyrobust.ops.packed_weight import (
    EXTRAS_SCHEMA,
    FORMAT_SCHEMA,
    NO_EXTRAS,
    WEIGHT_SCHEMA,
    WeightExtras,
    check_weight,
    native_extras,
    native_weight,
)

__all__ = ["packed_embedding"]


def packed_embedding(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    embedding_dim: int,
    bits: float,
    group_size: int,
    group_dim: int = 1,
    dtype: torch.dtype = torch.float32,
    extras: WeightExtras | None = None,
) -> Tensor:
    """Rows of a packed table: only the rows that ``indices`` name are decoded.

    Args:
        indices: integer tensor of any shape, values in ``[0, rows)``.
        codes: packed codes, uint8 ``(rows, row_bytes)``.
        scale: scales of the groups.
        zero: zero-points, or None where symmetric.
        embedding_dim: columns of the table.
        bits: format of the codes: 1, 1.58, 2, 3, 4 or 8.
        group_size: weights that share a scale.
        group_dim: 1 groups along a row, 0 along a column.
        dtype: of the result; the decoded float32 value is rounded to it.
        extras: row scales, codebook and sparse remainder, where the table has them.

    Returns:
        ``(*indices.shape, embedding_dim)`` in ``dtype``.

    Raises:
        TypeError: ``indices`` is not an int32 or int64 tensor.
        IndexError: an index lies outside the table.
    """
    if has_torch_function_unary(indices):
        result: Tensor = handle_torch_function(
            packed_embedding,
            (indices,),
            indices,
            codes,
            scale,
            zero,
            embedding_dim=embedding_dim,
            bits=bits,
            group_size=group_size,
            group_dim=group_dim,
            dtype=dtype,
            extras=extras,
        )
        return result
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        seen = getattr(indices, "dtype", type(indices).__name__)
        raise TypeError(f"packed_embedding: indices must be an int32 or int64 tensor; got {seen}.")
    extras = extras or NO_EXTRAS
    options = (embedding_dim, bits, group_size, group_dim)  # Dynamo of torch 2.4: 4.0 is no key 4
    check_weight("packed_embedding", codes, scale, zero, *options, extras)
    tensors = (indices, codes, scale, zero)
    run = operator("packed_embedding") if dispatcher_needed(*tensors) else _embedding_kernel
    out: Tensor = run(*tensors, *options, dtype, *extras)
    return out


def _embedding_kernel(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    embedding_dim: int,
    bits: float,
    group_size: int,
    group_dim: int,
    dtype: torch.dtype,
    *extras: Tensor | None,
) -> Tensor:
    flat = indices.reshape(-1)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= codes.shape[0]):
        raise IndexError(
            f"packed_embedding: indices must lie in [0, {codes.shape[0]}); got values from "
            f"{int(flat.min())} to {int(flat.max())}."
        )
    if codes.is_cuda:
        form = (embedding_dim, bits, group_size, group_dim)
        table = _cuda_matmul.gpu_weight(codes, scale, zero, *form, *extras)
        picked = flat.long().contiguous()
        found = _cuda_matmul.dequantize(table, 0, flat.numel(), torch.float32, picked)
        return found.to(dtype).reshape(*indices.shape, embedding_dim)
    rows = codes.new_empty((flat.numel(), embedding_dim), dtype=torch.float32)
    _native.gather_rows(
        flat.long().contiguous(),
        *native_weight(codes, scale, zero),
        rows,
        embedding_dim,
        levels_of(bits),
        group_size,
        group_dim,
        native_extras(extras),
        torch.get_num_threads(),
    )
    return rows.to(dtype).reshape(*indices.shape, embedding_dim)


def _embedding_fake(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    embedding_dim: int,
    bits: float,
    group_size: int,
    group_dim: int,
    dtype: torch.dtype,
    *extras: Tensor | None,
) -> Tensor:
    return codes.new_empty((*indices.shape, embedding_dim), dtype=dtype)


define(
    f"packed_embedding(Tensor indices, {WEIGHT_SCHEMA}, int embedding_dim, {FORMAT_SCHEMA}, "
    f"ScalarType dtype, {EXTRAS_SCHEMA}) -> Tensor",
    _embedding_kernel,
    _embedding_fake,
    cuda=_embedding_kernel,
)
