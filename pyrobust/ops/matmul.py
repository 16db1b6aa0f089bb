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
from pyrobust.ops import _cuda_matmul
from pyrobust.ops._library import (
    autocasting,
    call_override,
    define,
    dispatcher_needed,
    dispatcher_watched,
    function_modes,
    refuse_forward_mode,
)
from pyrobust.ops.formats import check_bits, levels_of, row_bytes
from pyrobust.ops.packed_weight import (
    EXTRAS_SCHEMA,
    NO_EXTRAS,
    WeightExtras,
    check_bytes,
    check_float,
    check_weight,
    native_extras,
)

__all__ = [
    "dequantize_codes",
    "linear_kernel",
    "pack_codes",
    "packed_linear",
    "transpose_kernel",
    "unpack_codes",
]

# Rows of W that the gradient turns into floats at a time on a GPU: 128 x 4096 floats are 2 MiB.
_GRADIENT_ROWS = 128


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
    run = torch.ops.pyrobust.packed_linear if needed else linear_kernel
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
    weight: Tensor = torch.ops.pyrobust.dequantize_codes(
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


# --- operators --------------------------------------------------------------------------------


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
        codes.contiguous(),
        scale.contiguous(),
        None if zero is None else zero.contiguous(),
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
        codes.contiguous(),
        scale.contiguous(),
        None if zero is None else zero.contiguous(),
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
        codes.contiguous(),
        scale.contiguous(),
        None if zero is None else zero.contiguous(),
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


_WEIGHT = "Tensor codes, Tensor scale, Tensor? zero"
_OPTIONS = "int in_features, float bits, int group_size, int group_dim"
define(
    f"packed_linear(Tensor x, {_WEIGHT}, Tensor? bias, {_OPTIONS}, bool int8, {EXTRAS_SCHEMA}) "
    "-> Tensor",
    linear_kernel,
    _linear_fake,
    cuda=linear_kernel,
    backward=_linear_backward,
    setup_context=_linear_context,
    vmap=_batched_rows("packed_linear"),
)
define(
    f"packed_linear_transpose(Tensor grad, {_WEIGHT}, {_OPTIONS}, {EXTRAS_SCHEMA}) -> Tensor",
    transpose_kernel,
    _transpose_fake,
    cuda=transpose_kernel,
    backward=_transpose_backward,
    setup_context=_transpose_context,
    vmap=_batched_rows("packed_linear_transpose"),
)
define(
    f"dequantize_codes({_WEIGHT}, {_OPTIONS}, {EXTRAS_SCHEMA}) -> Tensor",
    _dequantize_kernel,
    _dequantize_fake,
    cuda=_dequantize_kernel,
)
