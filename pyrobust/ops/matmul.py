"""Packed low-bit matmul as torch operators: the product, the exact weight, packing of codes.

The contract (what is computed, in which order, with which error) is ``csrc/matmul/matmul.h``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, get_num_threads, is_grad_enabled
from torch.overrides import has_torch_function

from pyrobust import _native
from pyrobust._checks import check_choice, check_integer, check_shape
from pyrobust.ops._decompositions import operator
from pyrobust.ops._library import (
    autocasting,
    call_override,
    dispatcher_needed,
    dispatcher_watched,
    function_modes,
    refuse_forward_mode,
)
from pyrobust.ops._matmul_operators import linear_kernel
from pyrobust.ops.formats import check_bits, levels_of, row_bytes
from pyrobust.ops.packed_weight import (
    NO_EXTRAS,
    WeightExtras,
    check_bytes,
    check_float,
    check_weight,
)

__all__ = [
    "dequantize_codes",
    "pack_codes",
    "packed_linear",
    "unpack_codes",
]


def packed_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    in_features: int,
    bits: float,
    group_size: int,
    group_dim: int = 1,
    activations: str | None = None,
    extras: WeightExtras | None = None,
) -> Tensor:
    """Multiply ``x`` with a packed weight: ``y = x W^T + bias``.

    A row of the result depends on its row of ``x`` alone, to the bit, whatever else the batch
    holds.
    Differentiable in ``x`` (through the packed weight, also row by row; the rounding of
    ``activations="int8"`` counts as the identity) and in ``bias``; forward-mode differentiation
    raises.

    Args:
        x: ``(..., in_features)`` float32, bfloat16 or float16. float64, which no kernel takes, is
            multiplied by torch with the decoded weight (for ``"int8"``: rounded to float32 first).
        codes: ``(out_features, row_bytes)`` uint8, the canonical layout of
            :class:`~pyrobust.quantize.QTensor`.
        scale: ``(out_features, ceil(in_features / group_size))`` for ``group_dim=1``, else
            ``(ceil(out_features / group_size), in_features)``; float32, float16 or bfloat16, at
            most 15 significant bits.
        zero: uint8 of the shape of ``scale``, or None for a symmetric weight.
        bias: ``(out_features,)`` float, added before the final rounding.
        in_features: columns of the weight.
        bits: 1, 1.58, 2, 3, 4 or 8.
        group_size: weights that share a scale; the last group may be shorter.
        group_dim: 1, groups along ``in_features``; 0, along ``out_features``.
        activations: None multiplies in float: the error is at most ``1e-6 * (|x| |W|^T + |bias|)``
            before the final rounding to the type of ``x``. (With AVX-512, bfloat16 and float16 may
            be rounded to 16 bits first, by steps of 2**-15 of the largest magnitude that meets a
            group of the weight, and rows of float32 to 24 or 32 bits, where that keeps the bound
            but for weights that vanish wherever ``x`` is large.) ``"int8"`` rounds each row of
            ``x`` to 8 bits first (step: its largest magnitude / 127) and is then exact up to double
            rounding: the same bits on every instruction set and thread count. A row of ``x`` with a
            NaN or an infinity gives a row of NaN where 8 or 16 bits are rounded to.
        extras: row scales, codebook and sparse remainder, where the weight has them.

    Returns:
        ``(..., out_features)`` of the dtype of ``x``.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: a shape, ``bits``, ``group_size``, ``group_dim`` or ``activations`` is wrong.
        NotImplementedError: ``x`` or ``bias`` carries a forward-mode tangent.
    """
    overridden = has_torch_function((x,))
    if not (dispatcher_watched() or (overridden and (function_modes() or autocasting()))):
        # an Interval; or a plain tensor
        native = _native.box_packed_linear if overridden else _native.eager_linear
        eager: Any = native(
            x, codes, scale, zero, bias, in_features, bits, group_size, group_dim, activations,
            extras, get_num_threads(), is_grad_enabled(),
        )  # fmt: skip
        if eager is not None:
            product: Tensor = eager
            return product
    options: dict[str, Any] = {
        "in_features": in_features,
        "bits": bits,
        "group_size": group_size,
        "group_dim": group_dim,
        "activations": activations,
        "extras": extras,
    }
    if has_torch_function((x, codes, scale, zero, bias)):
        relevant = (x, codes, scale, zero, bias)
        result: Tensor = call_override(packed_linear, relevant, options)
        return result
    _check_product(x, codes, scale, zero, bias, **options)
    if x.dtype == torch.float64:
        return _double_product(x, codes, scale, zero, bias, options)
    refuse_forward_mode("packed_linear", x, scale, bias)
    needed = dispatcher_needed(x, codes, scale, zero, bias)
    run = operator("packed_linear") if needed else linear_kernel
    product = run(
        x, codes, scale, zero, bias, in_features, bits, group_size, group_dim,
        _INT8[activations], *(extras or NO_EXTRAS),
    )  # fmt: skip
    return product


def dequantize_codes(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    in_features: int,
    bits: float,
    group_size: int,
    group_dim: int = 1,
    extras: WeightExtras | None = None,
) -> Tensor:
    """The weight that packed codes stand for, exact in float32.

    Args:
        codes: as for :func:`packed_linear`.
        scale: as for :func:`packed_linear`.
        zero: as for :func:`packed_linear`.
        in_features: columns of the weight.
        bits: 1, 1.58, 2, 3, 4 or 8.
        group_size: weights that share a scale.
        group_dim: 1 or 0.
        extras: as for :func:`packed_linear`.

    Returns:
        ``(out_features, in_features)`` float32, without rounding.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: a shape or option is wrong.
    """
    extras = extras or NO_EXTRAS
    check_weight(
        "dequantize_codes", codes, scale, zero, in_features, bits, group_size, group_dim, extras
    )
    weight: Tensor = operator("dequantize_codes")(
        codes, scale, zero, in_features, bits, group_size, group_dim, *extras
    )
    return weight


def pack_codes(codes: Tensor, *, bits: float) -> Tensor:
    """Pack one code a byte into the canonical layout.

    Args:
        codes: ``(rows, columns)`` uint8, each below the number of levels of ``bits``.
        bits: 1, 1.58, 2, 3, 4 or 8.

    Returns:
        ``(rows, row_bytes)`` uint8.

    Raises:
        TypeError: ``codes`` is not uint8.
        ValueError: ``codes`` is not two-dimensional or holds a value that the width cannot hold.

    Example:
        >>> pack_codes(torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8), bits=4)
        tensor([[33, 67]], dtype=torch.uint8)
    """
    check_bits("pack_codes", bits)
    check_bytes("pack_codes", "codes", codes)
    check_shape("pack_codes", "codes", codes, (None, None))
    packed = codes.new_empty(codes.shape[0], row_bytes(codes.shape[1], bits))
    _native.pack_codes(codes.contiguous(), packed, levels_of(bits), torch.get_num_threads())
    return packed


def unpack_codes(packed: Tensor, *, in_features: int, bits: float) -> Tensor:
    """Undo :func:`pack_codes`.

    Args:
        packed: ``(rows, row_bytes)`` uint8.
        in_features: columns of the result.
        bits: 1, 1.58, 2, 3, 4 or 8.

    Returns:
        ``(rows, in_features)`` uint8.

    Raises:
        TypeError: ``packed`` is not uint8.
        ValueError: the number of bytes in a row disagrees with ``in_features`` and ``bits``.
    """
    check_bits("unpack_codes", bits)
    check_integer("unpack_codes", "in_features", in_features, 0)
    check_bytes("unpack_codes", "packed", packed)
    check_shape("unpack_codes", "packed", packed, (None, row_bytes(in_features, bits)))
    codes = packed.new_empty(packed.shape[0], in_features)
    _native.unpack_codes(packed.contiguous(), codes, levels_of(bits), torch.get_num_threads())
    return codes


# --- checks -----------------------------------------------------------------------------------

_INT8 = {None: False, "int8": True}


def _check_product(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    *,
    in_features: int,
    bits: float,
    group_size: int,
    group_dim: int,
    activations: str | None,
    extras: WeightExtras | None,
) -> None:
    subject = "packed_linear"
    check_float(subject, "x", x, wide=True)
    check_choice(subject, "activations", activations, _INT8)
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"{subject}: x must have in_features = {in_features} values on its last axis; "
            f"got shape {tuple(x.shape)}."
        )
    extras = extras or NO_EXTRAS
    check_weight(subject, codes, scale, zero, in_features, bits, group_size, group_dim, extras)
    if bias is not None:
        check_float(subject, "bias", bias, wide=x.dtype == torch.float64)
        check_shape(subject, "bias", bias, (codes.shape[0],))


def _double_product(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    if options["activations"] == "int8":
        shift = None if bias is None else bias.float()
        return packed_linear(x.float(), codes, scale, zero, shift, **options).double()
    form = {name: value for name, value in options.items() if name != "activations"}
    weight = dequantize_codes(codes, scale, zero, **form).double()
    return F.linear(x, weight, None if bias is None else bias.double())
