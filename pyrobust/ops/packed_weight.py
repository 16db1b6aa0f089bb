"""The parts of a packed weight as the operators take them, and the checks that they share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyrobust._checks import check_choice, check_float_tensor, check_integer, check_shape
from pyrobust.ops.formats import check_bits, levels_of, row_bytes

__all__ = [
    "EXTRAS_SCHEMA",
    "FORMAT_SCHEMA",
    "NO_EXTRAS",
    "WEIGHT_SCHEMA",
    "WeightExtras",
    "check_bytes",
    "check_float",
    "check_weight",
    "native_extras",
    "native_weight",
]

_FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)

WEIGHT_SCHEMA = "Tensor codes, Tensor scale, Tensor? zero"
FORMAT_SCHEMA = "float bits, int group_size, int group_dim"
"""How operators declare the parts that every packed weight has, and its format."""

EXTRAS_SCHEMA = (
    "Tensor? row_scale=None, Tensor? codebook=None, Tensor? values=None, Tensor? columns=None, "
    "Tensor? offsets=None"
)
"""How operators declare :class:`WeightExtras`, in the order of its fields."""


class WeightExtras(NamedTuple):
    """The optional parts of a packed weight (see :class:`pyrobust.quantize.QTensor`).

    Attributes:
        row_scale: ``(out_features,)`` float32; with it, ``scale`` holds integers (uint8).
        codebook: ``(levels,)`` uint8 that codes index.
        values: ``(count,)`` float32, float16 or bfloat16: a sparse matrix that is added, in
            compressed rows. The next two belong to it.
        columns: ``(count,)`` int32, ascending in each row.
        offsets: ``(out_features + 1,)`` int64: row n holds entries ``offsets[n]`` to
            ``offsets[n + 1]``.
    """

    row_scale: Tensor | None = None
    codebook: Tensor | None = None
    values: Tensor | None = None
    columns: Tensor | None = None
    offsets: Tensor | None = None


NO_EXTRAS = WeightExtras()


def native_weight(
    codes: Tensor, scale: Tensor, zero: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zeros as the native entry points take them: contiguous."""
    return codes.contiguous(), scale.contiguous(), None if zero is None else zero.contiguous()


def native_extras(extras: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
    """What the native entry points take; None where every part is absent."""
    if extras is NO_EXTRAS or all(part is None for part in extras):
        return None
    # The dispatcher drops trailing arguments that have their default.
    missing = (None,) * (len(NO_EXTRAS) - len(extras))
    return (*(None if part is None else part.contiguous() for part in extras), *missing)


def check_bytes(subject: str, name: str, value: Tensor) -> None:
    """Raise TypeError unless ``value`` is uint8."""
    if value.dtype != torch.uint8:
        raise TypeError(f"{subject}: {name} must have dtype torch.uint8; got {value.dtype}.")


def check_float(subject: str, name: str, value: Tensor, *, wide: bool = False) -> None:
    """Raise TypeError unless ``value`` has a float type of the kernels (or, ``wide``, float64)."""
    check_float_tensor(subject, name, value)
    if value.dtype not in _FLOAT_TYPES and not (wide and value.dtype == torch.float64):
        accepted = (
            "float32, float16, bfloat16 or float64" if wide else "float32, float16 or bfloat16"
        )
        raise TypeError(f"{subject}: {name} must be {accepted}; got {value.dtype}.")


def check_weight(
    subject: str,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    in_features: int,
    bits: float,
    group_size: int,
    group_dim: int,
    extras: WeightExtras = NO_EXTRAS,
) -> None:
    """Raise TypeError or ValueError unless the parts fit each other."""
    check_bits(subject, bits)
    check_integer(subject, "group_size", group_size, 1)
    check_choice(subject, "group_dim", group_dim, (0, 1))
    check_bytes(subject, "codes", codes)
    check_shape(subject, "codes", codes, (None, row_bytes(in_features, bits)))
    rows = codes.shape[0]
    grouped = (rows, -(-in_features // group_size))
    if group_dim == 0:
        grouped = (-(-rows // group_size), in_features)
    if extras.row_scale is None:
        check_float(subject, "scale", scale)
    else:
        check_bytes(subject, "scale", scale)
    check_shape(subject, "scale", scale, grouped)
    if zero is not None:
        if bits in (1, 1.58) and extras.codebook is None:
            raise ValueError(f"{subject}: zero must be None at {bits} bits; got a tensor.")
        check_bytes(subject, "zero", zero)
        check_shape(subject, "zero", zero, grouped)
    if any(part is not None for part in extras):
        _check_extras(subject, rows, bits, extras)


def _check_extras(subject: str, rows: int, bits: float, extras: WeightExtras) -> None:
    if extras.row_scale is not None:
        _check_dtype(subject, "row_scale", extras.row_scale, torch.float32)
        check_shape(subject, "row_scale", extras.row_scale, (rows,))
    if extras.codebook is not None:
        if bits == 8:
            raise ValueError(
                f"{subject}: codebook must be None at 8 bits, whose codes are such integers "
                "themselves; got a tensor."
            )
        _check_dtype(subject, "codebook", extras.codebook, torch.uint8)
        check_shape(subject, "codebook", extras.codebook, (levels_of(bits),))
    sparse = (extras.values, extras.columns, extras.offsets)
    if all(part is None for part in sparse):
        return
    values, columns, offsets = sparse
    if values is None or columns is None or offsets is None:
        raise ValueError(f"{subject}: values, columns and offsets must be given together.")
    check_float(subject, "values", values)
    check_shape(subject, "values", values, (None,))
    _check_dtype(subject, "columns", columns, torch.int32)
    check_shape(subject, "columns", columns, tuple(values.shape))
    _check_dtype(subject, "offsets", offsets, torch.int64)
    check_shape(subject, "offsets", offsets, (rows + 1,))


def _check_dtype(subject: str, name: str, value: Tensor, expected: torch.dtype) -> None:
    if value.dtype != expected:
        raise TypeError(f"{subject}: {name} must have dtype {expected}; got {value.dtype}.")
