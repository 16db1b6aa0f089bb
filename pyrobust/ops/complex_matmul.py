"""The complex product with weights in {1, i, -1, -i} as torch operators.

The contract is ``csrc/matmul/complex.h``. Weights are 2-bit codes of the canonical layout
(:func:`pyrobust.ops.pack_codes` at 2 bits): code c stands for ``i**c``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust._checks import check_integer, check_shape
from pyrobust.ops import _cuda_complex
from pyrobust.ops._decompositions import operator
from pyrobust.ops._library import define, dispatcher_needed
from pyrobust.ops.formats import row_bytes
from pyrobust.ops.packed_weight import check_bytes

__all__ = ["complex_2bit_matmul", "complex_2bit_sums"]

_MOST_COLUMNS = 1 << 23


def complex_2bit_sums(x_real: Tensor, x_imag: Tensor, codes: Tensor, *, in_features: int) -> Tensor:
    """The four integer sums of ``conj(x) W^T``, exact.

    With x = a + i b and a weight of code c: u is 1 for c = 0, -1 for c = 2, else 0; v is 1 for
    c = 1, -1 for c = 3, else 0. The sums run over ``in_features``.

    Args:
        x_real: ``(..., in_features)`` int8, a.
        x_imag: int8 of the same shape, b.
        codes: ``(out_features, ceil(in_features / 4))`` uint8.
        in_features: columns of the weight, at most ``2**23``.

    Returns:
        ``(4, ..., out_features)`` int32: sums of ``a u``, ``b v``, ``a v`` and ``-b u``.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes disagree.

    Example:
        >>> codes = torch.tensor([[0b11100100]], dtype=torch.uint8)  # 1, i, -1, -i
        >>> x = torch.tensor([[1, 2, 3, 5]], dtype=torch.int8)
        >>> complex_2bit_sums(x, torch.zeros_like(x), codes, in_features=4).flatten().tolist()
        [-2, 0, -3, 0]
    """
    _check("complex_2bit_sums", x_real, x_imag, codes, in_features)
    if not dispatcher_needed(x_real, x_imag, codes):
        return _sums_kernel(x_real, x_imag, codes, in_features)
    sums: Tensor = operator("complex_2bit_sums")(x_real, x_imag, codes, in_features)
    return sums


def complex_2bit_matmul(
    x_real: Tensor,
    x_imag: Tensor,
    codes: Tensor,
    scales: Tensor,
    step_real: Tensor,
    step_imag: Tensor,
    *,
    in_features: int,
) -> tuple[Tensor, Tensor]:
    """``conj(x) W^T`` for x in 8 bits and W in {1, i, -1, -i}, the same bits on every machine.

    The weight of code c is ``scales[0] * i**c`` for even c and ``scales[1] * i**c`` for odd c. A
    row of x stands for ``step_real * x_real + i * step_imag * x_imag``.

    Args:
        x_real: ``(..., in_features)`` int8.
        x_imag: int8 of the same shape.
        codes: ``(out_features, ceil(in_features / 4))`` uint8.
        scales: ``(2,)`` float32: of the weights 1 and -1, and of i and -i.
        step_real: ``(...)`` float32, one per row of x.
        step_imag: the same for the imaginary parts.
        in_features: columns of the weight, at most ``2**23``.

    Returns:
        Real and imaginary part, each ``(..., out_features)`` float32, rounded once from double.
        Not differentiable: x is integer.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes disagree.
    """
    subject = "complex_2bit_matmul"
    _check(subject, x_real, x_imag, codes, in_features)
    for name, value, shape in (
        ("scales", scales, (2,)),
        ("step_real", step_real, tuple(x_real.shape[:-1])),
        ("step_imag", step_imag, tuple(x_real.shape[:-1])),
    ):
        if value.dtype != torch.float32:
            raise TypeError(f"{subject}: {name} must have dtype torch.float32; got {value.dtype}.")
        check_shape(subject, name, value, shape)
    tensors = (x_real, x_imag, codes, scales, step_real, step_imag)
    if not dispatcher_needed(*tensors):
        return _product_kernel(*tensors, in_features)
    product: tuple[Tensor, Tensor] = operator("complex_2bit_matmul")(*tensors, in_features)
    return product


def _check(subject: str, x_real: Tensor, x_imag: Tensor, codes: Tensor, in_features: int) -> None:
    check_integer(subject, "in_features", in_features, 0)
    if in_features > _MOST_COLUMNS:
        raise ValueError(f"{subject}: in_features must be at most 2**23; got {in_features}.")
    for name, value in (("x_real", x_real), ("x_imag", x_imag)):
        if value.dtype != torch.int8:
            raise TypeError(f"{subject}: {name} must have dtype torch.int8; got {value.dtype}.")
    if x_real.ndim == 0 or x_real.shape[-1] != in_features:
        raise ValueError(
            f"{subject}: x_real must have in_features = {in_features} values on its last axis; "
            f"got shape {tuple(x_real.shape)}."
        )
    check_shape(subject, "x_imag", x_imag, tuple(x_real.shape))
    check_bytes(subject, "codes", codes)
    check_shape(subject, "codes", codes, (None, row_bytes(in_features, 2)))


def _flat(x: Tensor, in_features: int) -> Tensor:
    rows = x.numel() // in_features if in_features else x.shape[:-1].numel()
    return x.contiguous().reshape(rows, in_features)


def _sums_kernel(x_real: Tensor, x_imag: Tensor, codes: Tensor, in_features: int) -> Tensor:
    real, imag = _flat(x_real, in_features), _flat(x_imag, in_features)
    if codes.is_cuda:
        sums = _cuda_complex.complex_sums(real, imag, codes, in_features)
        return sums.reshape(4, *x_real.shape[:-1], codes.shape[0])
    out = codes.new_empty((4, real.shape[0], codes.shape[0]), dtype=torch.int32)
    threads = torch.get_num_threads()
    _native.complex_sums(real, imag, codes.contiguous(), out, in_features, threads)
    return out.reshape(4, *x_real.shape[:-1], codes.shape[0])


def _sums_fake(x_real: Tensor, x_imag: Tensor, codes: Tensor, in_features: int) -> Tensor:
    return codes.new_empty((4, *x_real.shape[:-1], codes.shape[0]), dtype=torch.int32)


def _product_kernel(
    x_real: Tensor,
    x_imag: Tensor,
    codes: Tensor,
    scales: Tensor,
    step_real: Tensor,
    step_imag: Tensor,
    in_features: int,
) -> tuple[Tensor, Tensor]:
    if codes.is_cuda:
        sums = _sums_kernel(x_real, x_imag, codes, in_features)
        return complex_results(sums, scales, step_real, step_imag)
    real, imag = _flat(x_real, in_features), _flat(x_imag, in_features)
    y_real = codes.new_empty((real.shape[0], codes.shape[0]), dtype=torch.float32)
    y_imag = torch.empty_like(y_real)
    _native.complex_linear(
        real,
        imag,
        codes.contiguous(),
        float(scales[0]),
        float(scales[1]),
        step_real.reshape(-1).contiguous(),
        step_imag.reshape(-1).contiguous(),
        y_real,
        y_imag,
        in_features,
        torch.get_num_threads(),
    )
    shape = (*x_real.shape[:-1], codes.shape[0])
    return y_real.reshape(shape), y_imag.reshape(shape)


def complex_results(
    sums: Tensor, scales: Tensor, step_real: Tensor, step_imag: Tensor
) -> tuple[Tensor, Tensor]:
    """Real and imaginary part from the four sums, in double and rounded once (complex.h)."""
    a_re, b_re, a_im, b_im = sums.double()
    real, imag = scales.double()
    t, r = step_real.double().unsqueeze(-1), step_imag.double().unsqueeze(-1)
    y_real = (real * t) * a_re + (imag * r) * b_re
    y_imag = (imag * t) * a_im + (real * r) * b_im
    return y_real.float(), y_imag.float()


def _product_fake(x_real: Tensor, x_imag: Tensor, codes: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = codes.new_empty((*x_real.shape[:-1], codes.shape[0]), dtype=torch.float32)
    return out, torch.empty_like(out)


define(
    "complex_2bit_sums(Tensor x_real, Tensor x_imag, Tensor codes, int in_features) -> Tensor",
    _sums_kernel,
    _sums_fake,
    cuda=_sums_kernel,
)
define(
    "complex_2bit_matmul(Tensor x_real, Tensor x_imag, Tensor codes, Tensor scales, "
    "Tensor step_real, Tensor step_imag, int in_features) -> (Tensor, Tensor)",
    _product_kernel,
    _product_fake,
    cuda=_product_kernel,
)
