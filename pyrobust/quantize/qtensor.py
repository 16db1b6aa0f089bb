"""QTensor: a two-dimensional weight as packed low-bit codes with grouped scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyrobust._checks import check_choice, check_finite, check_integer, check_shape
from pyrobust.ops.add_packed import SavedCopy, Summand, add_dequantized_, weight_summand
from pyrobust.ops.formats import (
    check_bits,
    code_multiplier,
    levels_of,
    row_bytes,
    symmetric_zero,
)
from pyrobust.ops.matmul import dequantize_codes, pack_codes, unpack_codes
from pyrobust.ops.packed_weight import WeightExtras, check_bytes, check_weight
from pyrobust.quantize.remainder import SparseRemainder

__all__ = ["QTensor", "WeightLayout", "grouped_shape", "round_scale"]

_SCALE_BITS = 15
_INTEGER_LIMIT = 511


class WeightLayout(NamedTuple):
    """Which optional parts a packed weight has.

    Attributes:
        two_level: integer scales under a scale per row.
        codebook: codes are indices.
        nonzeros: values of the remainder; -1 without one.
    """

    two_level: bool = False
    codebook: bool = False
    nonzeros: int = -1


@dataclass(frozen=True)
class QTensor:
    """A ``(rows, cols)`` weight in 1, 1.58, 2, 3, 4 or 8 bits.

    The value of an element is ``scale * (code - zero)``; without zero-points the zero is
    ``2**(bits - 1)``. At 1.58 bits it is ``scale * (code - 1)`` with codes 0, 1, 2, and at 1 bit
    ``scale * (2 * code - 1)``.

    A scale has at most 15 significant bits, so that every value is a float32 without rounding: the
    stored weight *is* what :meth:`dequantize` returns. Three optional parts keep that law:

    * ``codebook``: codes are indices; the entry, an integer from 0 to 255, stands where the code
      stands above, and without zero-points the zero is 128. So levels lie on a grid of 1/127 of the
      largest one (:func:`codebook_of` rounds them there). Not at 8 bits, whose codes are such
      integers themselves.
    * ``row_scale``: two-level scales. ``scale`` then holds small integers (uint8), and a row's
      values are multiplied by its ``row_scale``. An integer scale times the largest possible
      ``|code - zero|`` must not exceed 511; sums over a row stay integers, which is faster.
    * ``remainder``: a sparse matrix that is added, for the few weights that codes hold badly
      (:meth:`with_remainder` makes one). The sum must again be a float32, and in magnitude
      at least 4/5 of the value of the code (which is 0 wherever the format has a zero).

    Attributes:
        codes: ``(rows, row_bytes)`` uint8. Little-endian bit packing along the columns, every row
            from a byte border; at 1.58 bits five base-3 digits a byte, the first the lowest.
        scale: float32, float16 or bfloat16 (uint8 with ``row_scale``);
            ``(rows, ceil(cols / group_size))`` for ``group_dim=1``,
            ``(ceil(rows / group_size), cols)`` for ``group_dim=0``.
        zero: uint8 of the shape of ``scale``, or None for a symmetric weight.
        bits: 1, 1.58, 2, 3, 4 or 8.
        shape: ``(rows, cols)``.
        group_size: weights that share a scale, at least 1; the last group may be shorter.
        group_dim: 1, groups run along the columns; 0, along the rows.
        row_scale: ``(rows,)`` float32 with at most 15 significant bits, or None.
        codebook: ``(levels,)`` uint8, or None.
        remainder: :class:`SparseRemainder`, or None.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes or options disagree, a scale is not finite or has more than 15
            significant bits, a zero lies outside the codes, integer scales are too large, or a
            value with its remainder is no float32 or too small.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: float
    shape: tuple[int, int]
    group_size: int
    group_dim: int = 1
    row_scale: Tensor | None = None
    codebook: Tensor | None = None
    remainder: SparseRemainder | None = None

    def __post_init__(self) -> None:
        subject = "QTensor"
        check_bits(subject, self.bits)
        check_integer(subject, "group_size", self.group_size, 1)
        check_choice(subject, "group_dim", self.group_dim, (0, 1))
        if len(self.shape) != 2:
            raise ValueError(f"{subject}: shape must be (rows, cols); got {tuple(self.shape)}.")
        object.__setattr__(self, "shape", (int(self.shape[0]), int(self.shape[1])))
        check_bytes(subject, "codes", self.codes)
        check_shape(
            subject, "codes", self.codes, (self.shape[0], row_bytes(self.shape[1], self.bits))
        )
        weight = (self.codes, self.scale, self.zero, self.shape[1])
        check_weight(subject, *weight, self.bits, self.group_size, self.group_dim, self.extras)
        if self.codes.is_meta:
            return
        for name, scale in (("scale", self.scale), ("row_scale", self.row_scale)):
            _check_scale(subject, name, scale)
        top = 2 ** int(self.bits) if self.codebook is None else 256
        if self.zero is not None and self.zero.numel() and int(self.zero.max()) >= top:
            raise ValueError(f"{subject}: zero must be below {top}; got {int(self.zero.max())}.")
        if self.row_scale is not None:
            self._check_two_levels()
        if self.remainder is not None:
            self._check_remainder(self.remainder)

    def _check_two_levels(self) -> None:
        """Integer scale times integer code keep to 9 bits: 15 more make a float32."""
        lowest, highest = self._code_range()
        zero = torch.tensor(self.symmetric_zero) if self.zero is None else self.zero
        reach = torch.maximum((zero.int() - lowest).abs(), (highest - zero.int()).abs())
        product = int((reach * self.scale.int()).max()) if self.scale.numel() else 0
        if product > _INTEGER_LIMIT:
            raise ValueError(
                "QTensor: an integer scale times the largest |code - zero| must be at most "
                f"{_INTEGER_LIMIT}; got {product}."
            )

    def _check_remainder(self, remainder: SparseRemainder) -> None:
        if remainder.count and int(remainder.columns.max()) >= self.shape[1]:
            raise ValueError(
                f"QTensor: columns of the remainder must be below {self.shape[1]}; got "
                f"{int(remainder.columns.max())}."
            )
        place = (remainder.rows, remainder.columns.long())
        dense = replace(self, remainder=None).dequantize(torch.float64)[place]
        whole = dense + remainder.values.double()
        small = (whole.abs() < 0.8 * dense.abs()).any()
        if small or not torch.equal(whole.float().double(), whole):
            raise ValueError(
                "QTensor: a value with its remainder must be a float32 and at least 4/5 of the "
                "value without in magnitude (with_remainder makes such); one is not."
            )

    def _code_range(self) -> tuple[int, int]:
        """The least and the largest integer that a code can stand for."""
        if self.codebook is not None:
            return int(self.codebook.min()), int(self.codebook.max())
        return 0, code_multiplier(self.bits) * (levels_of(self.bits) - 1)

    @property
    def symmetric_zero(self) -> int:
        """The zero that stands for absent zero-points."""
        return symmetric_zero(self.bits) if self.codebook is None else 128

    @property
    def layout(self) -> WeightLayout:
        """Which optional parts there are."""
        count = -1 if self.remainder is None else self.remainder.count
        return WeightLayout(self.row_scale is not None, self.codebook is not None, count)

    @property
    def extras(self) -> WeightExtras:
        """Row scales, codebook and remainder as the operators take them."""
        sparse: tuple[Tensor | None, ...] = (None, None, None)
        if self.remainder is not None:
            sparse = (self.remainder.values, self.remainder.columns, self.remainder.offsets)
        return WeightExtras(self.row_scale, self.codebook, *sparse)

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
        row_scale: Tensor | None = None,
        codebook: Tensor | None = None,
    ) -> QTensor:
        """Pack codes given one to an element.

        Args:
            codes: ``(rows, cols)`` uint8.
            scale: as the attribute; float32 is rounded to 15 significant bits.
            zero: as the attribute.
            bits: 1, 1.58, 2, 3, 4 or 8.
            group_size: weights that share a scale.
            group_dim: 1 or 0.
            row_scale: as the attribute, rounded to 15 significant bits.
            codebook: as the attribute.

        Raises:
            TypeError: a dtype is not accepted.
            ValueError: a code does not fit, or shapes disagree.
        """
        if row_scale is not None and row_scale.dtype == torch.float32:
            row_scale = round_scale(row_scale)
        if scale.dtype == torch.float32:
            scale = round_scale(scale)
        rows, cols = codes.shape
        packed = pack_codes(codes, bits=bits)
        form = (bits, (rows, cols), group_size, group_dim)
        return cls(packed, scale, zero, *form, row_scale, codebook)

    def with_remainder(
        self, weight: Tensor, mask: Tensor, *, dtype: torch.dtype = torch.float16
    ) -> QTensor:
        """The same weight with the entries of ``weight`` where ``mask`` holds in high precision.

        Codes at those places are set to zero where the format has a zero, else to the value nearest
        to the entry; the remainder holds the rest, rounded to ``dtype``.

        Args:
            weight: ``(rows, cols)`` floating point, finite under the mask.
            mask: bool of the same shape.
            dtype: of the kept values: float16, bfloat16 or float32.

        Raises:
            ValueError: shapes disagree, a value overflows ``dtype``, or (formats without a zero) an
                entry is smaller than every value of a code, or the sum is no float32.

        Example:
            >>> codes = torch.full((1, 3), 9, dtype=torch.uint8)
            >>> packed = QTensor.from_codes(codes, torch.ones(1, 1), bits=4, group_size=3)
            >>> outlier = torch.tensor([[False, True, False]])
            >>> packed.with_remainder(torch.tensor([[1.0, 1000.0, 1.0]]), outlier).dequantize()
            tensor([[   1., 1000.,    1.]])
        """
        check_shape("QTensor.with_remainder", "weight", weight, self.shape)
        check_shape("QTensor.with_remainder", "mask", mask, self.shape)
        mask = mask.bool()
        codes = torch.where(mask, self._quiet_codes(weight), self.unpack_codes())
        packed = pack_codes(codes, bits=self.bits)
        dense = replace(self, codes=packed, remainder=None)
        rest = weight.double() - dense.dequantize(torch.float64)
        return replace(dense, remainder=SparseRemainder.from_dense(rest, mask, dtype=dtype))

    def _quiet_codes(self, weight: Tensor) -> Tensor:
        """Codes that stand for 0; where a group has none, for the value nearest to ``weight``."""
        zero = self.symmetric_zero if self.zero is None else self._spread(self.zero)
        codes = torch.arange(levels_of(self.bits), dtype=torch.uint8)
        integers = code_multiplier(self.bits) * codes.int()
        if self.codebook is not None:
            integers = self.codebook.int()
        scale = self._spread(self.scale).double()
        if self.row_scale is not None:
            scale = scale * self.row_scale.double()[:, None]
        best = torch.zeros(self.shape, dtype=torch.uint8)
        least = torch.full(self.shape, torch.inf, dtype=torch.float64)
        for code, integer in zip(codes, integers, strict=True):
            value = scale * (integer - zero)
            distance = torch.where(value == 0, -1.0, (weight.double() - value).abs())
            best, least = torch.where(distance < least, code, best), torch.minimum(distance, least)
        return best

    def _spread(self, grouped: Tensor) -> Tensor:
        """One value per group to one per weight."""
        each = grouped.int() if grouped.dtype == torch.uint8 else grouped
        spread = each.repeat_interleave(self.group_size, self.group_dim)
        return spread[: self.shape[0], : self.shape[1]]

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
            extras=self.extras,
        ).to(dtype)

    def add_to_(self, target: Tensor, alpha: float = 1.0, saved: SavedCopy | None = None) -> Tensor:
        """``target += alpha * weight`` in place and in one pass.

        Args:
            target: ``(rows, cols)`` float32, float16 or bfloat16, on the CPU, with contiguous
                rows; rounded as :func:`ops.add_dequantized_` says.
            alpha: finite factor.
            saved: receives what ``target`` held.

        Raises:
            TypeError: ``target`` has another dtype.
            ValueError: it has another shape, its rows are not contiguous, or it is not on the CPU.
        """
        return add_dequantized_(
            target, self.codes, self.scale, self.zero,
            in_features=self.shape[1], bits=self.bits, group_size=self.group_size,
            group_dim=self.group_dim, extras=self.extras, alpha=alpha, saved=saved,
        )  # fmt: skip

    def summand(self) -> Summand:
        """The weight as :func:`ops.add_packed.add_all_` takes it."""
        parts = self.codes, self.scale, self.zero
        form = self.shape[1], self.bits, self.group_size, self.group_dim, self.extras
        return weight_summand(parts, form)

    @property
    def dim(self) -> str:
        """``"oc"``, groups within an output channel (``group_dim=1``), or ``"ic"``."""
        return "oc" if self.group_dim == 1 else "ic"

    def unpack_codes(self) -> Tensor:
        """The codes, ``(rows, cols)`` uint8, one to an element."""
        return unpack_codes(self.codes, in_features=self.shape[1], bits=self.bits)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts = (self.codes, self.scale, self.zero, *self.extras)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, all parts included; NaN for an empty weight."""
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


def _check_scale(subject: str, name: str, scale: Tensor | None) -> None:
    if scale is None or scale.dtype == torch.uint8:
        return
    check_finite(subject, name, scale)
    if scale.dtype == torch.float32 and not torch.equal(round_scale(scale), scale):
        raise ValueError(
            f"{subject}: {name} must have at most {_SCALE_BITS} significant bits "
            "(round it with round_scale); it has more."
        )
