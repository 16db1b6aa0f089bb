"""QTensor: a two-dimensional weight as packed low-bit codes with grouped scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrobust._checks import (
    check_choice,
    check_finite,
    check_float_tensor,
    check_integer,
    check_shape,
)
from pyrobust.ops.formats import check_bits, row_bytes
from pyrobust.ops.matmul import dequantize_codes, pack_codes, unpack_codes

__all__ = ["QTensor", "round_scale"]

_SCALE_BITS = 15


@dataclass(frozen=True)
class QTensor:
    """A ``(rows, cols)`` weight in 1, 1.58, 2, 3, 4 or 8 bits.

    The value of an element is ``scale * (code - zero)``; without zero-points the zero is
    ``2**(bits - 1)``. At 1.58 bits it is ``scale * (code - 1)`` with codes 0, 1, 2, and at 1 bit
    ``scale * (2 * code - 1)``.

    A scale has at most 15 significant bits, so that every value is a float32 without rounding: the
    stored weight *is* what :meth:`dequantize` returns.

    Attributes:
        codes: ``(rows, row_bytes)`` uint8. Little-endian bit packing along the columns, every row
            from a byte border; at 1.58 bits five base-3 digits a byte, the first the lowest.
        scale: float32, float16 or bfloat16, ``(rows, ceil(cols / group_size))`` for
            ``group_dim=1``, ``(ceil(rows / group_size), cols)`` for ``group_dim=0``.
        zero: uint8 of the shape of ``scale``, or None for a symmetric weight.
        bits: 1, 1.58, 2, 3, 4 or 8.
        shape: ``(rows, cols)``.
        group_size: weights that share a scale, at least 1; the last group may be shorter.
        group_dim: 1, groups run along the columns; 0, along the rows.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes or options disagree, a scale is not finite or has more than 15
            significant bits, or a zero lies outside the codes.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: float
    shape: tuple[int, int]
    group_size: int
    group_dim: int = 1

    def __post_init__(self) -> None:
        subject = "QTensor"
        check_bits(subject, self.bits)
        check_integer(subject, "group_size", self.group_size, 1)
        check_choice(subject, "group_dim", self.group_dim, (0, 1))
        if len(self.shape) != 2:
            raise ValueError(f"{subject}: shape must be (rows, cols); got {tuple(self.shape)}.")
        object.__setattr__(self, "shape", (int(self.shape[0]), int(self.shape[1])))
        _check_bytes("codes", self.codes)
        check_shape(
            subject, "codes", self.codes, (self.shape[0], row_bytes(self.shape[1], self.bits))
        )
        self._check_groups()

    def _check_groups(self) -> None:
        subject, grouped = "QTensor", grouped_shape(self.shape, self.group_size, self.group_dim)
        check_float_tensor(subject, "scale", self.scale)
        check_shape(subject, "scale", self.scale, grouped)
        if self.scale.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(
                f"{subject}: scale must be float32, float16 or bfloat16; got {self.scale.dtype}."
            )
        check_finite(subject, "scale", self.scale)
        if self.scale.dtype == torch.float32 and not torch.equal(
            round_scale(self.scale), self.scale
        ):
            raise ValueError(
                f"{subject}: scale must have at most {_SCALE_BITS} significant bits "
                "(round it with round_scale); it has more."
            )
        if self.zero is None:
            return
        if self.bits in (1, 1.58):
            raise ValueError(f"{subject}: zero must be None at {self.bits} bits; got a tensor.")
        _check_bytes("zero", self.zero)
        check_shape(subject, "zero", self.zero, grouped)
        if self.zero.numel() and int(self.zero.max()) >= 2**self.bits:
            raise ValueError(
                f"{subject}: zero must be below {2 ** int(self.bits)}; got {int(self.zero.max())}."
            )

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        *,
        bits: float,
        group_size: int,
        group_dim: int = 1,
    ) -> QTensor:
        """Pack codes given one to an element.

        Args:
            codes: ``(rows, cols)`` uint8.
            scale: as the attribute; float32 is rounded to 15 significant bits.
            zero: as the attribute.
            bits: 1, 1.58, 2, 3, 4 or 8.
            group_size: weights that share a scale.
            group_dim: 1 or 0.

        Raises:
            TypeError: a dtype is not accepted.
            ValueError: a code does not fit, or shapes disagree.
        """
        if scale.dtype == torch.float32:
            scale = round_scale(scale)
        rows, cols = codes.shape
        packed = pack_codes(codes, bits=bits)
        return cls(packed, scale, zero, bits, (rows, cols), group_size, group_dim)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, ``(rows, cols)``: exact in float32 (and float64), rounded in other types."""
        return dequantize_codes(
            self.codes,
            self.scale,
            self.zero,
            in_features=self.shape[1],
            bits=self.bits,
            group_size=self.group_size,
            group_dim=self.group_dim,
        ).to(dtype)

    def unpack_codes(self) -> Tensor:
        """The codes, ``(rows, cols)`` uint8, one to an element."""
        return unpack_codes(self.codes, in_features=self.shape[1], bits=self.bits)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        parts = (self.codes, self.scale, self.zero)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and zeros included; NaN for an empty weight."""
        count = self.shape[0] * self.shape[1]
        return 8 * self.nbytes / count if count else float("nan")


def grouped_shape(shape: Sequence[int], group_size: int, group_dim: int) -> tuple[int, int]:
    """The shape of the scales of a ``(rows, cols)`` weight."""
    rows, cols = shape
    if group_dim == 1:
        return rows, -(-cols // group_size)
    return -(-rows // group_size), cols


def round_scale(scale: Tensor, *, up: bool = False) -> Tensor:
    """Round to 15 significant bits, which keeps ``scale * (code - zero)`` exact in float32.

    Args:
        scale: float32, finite.
        up: away from zero instead of to the nearest.

    Returns:
        float32 of the same shape.

    Example:
        >>> float(round_scale(torch.tensor(0.1)))
        0.09999847412109375
    """
    dropped = 24 - _SCALE_BITS
    pattern = scale.contiguous().view(torch.int32)
    half = (1 << dropped) - 1 if up else 1 << (dropped - 1)
    return ((pattern + half) & -(1 << dropped)).view(torch.float32)


def _check_bytes(name: str, value: Tensor) -> None:
    if value.dtype != torch.uint8:
        raise TypeError(f"QTensor: {name} must have dtype torch.uint8; got {value.dtype}.")
