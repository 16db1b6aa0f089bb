"""SparseRemainder: the few weights that low-bit codes cannot hold, kept in high precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrobust._checks import check_finite, check_shape

__all__ = ["SparseRemainder"]

_FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class SparseRemainder:
    """A sparse ``(rows, cols)`` matrix in compressed rows, added to a packed weight.

    Attributes:
        values: ``(count,)`` float32, float16 or bfloat16, finite.
        columns: ``(count,)`` int32 in ``[0, cols)``, strictly ascending in each row.
        offsets: ``(rows + 1,)`` int64: row n holds entries ``offsets[n]`` to ``offsets[n + 1]``.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes disagree, a value is not finite, or offsets or columns are not in order.
    """

    values: Tensor
    columns: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        subject = "SparseRemainder"
        if self.values.dtype not in _FLOAT_TYPES:
            raise TypeError(
                f"{subject}: values must be float32, float16 or bfloat16; got {self.values.dtype}."
            )
        for name, wanted in (("columns", torch.int32), ("offsets", torch.int64)):
            if getattr(self, name).dtype != wanted:
                raise TypeError(
                    f"{subject}: {name} must have dtype {wanted}; got {getattr(self, name).dtype}."
                )
        check_shape(subject, "values", self.values, (None,))
        check_shape(subject, "columns", self.columns, tuple(self.values.shape))
        check_shape(subject, "offsets", self.offsets, (None,))
        check_finite(subject, "values", self.values)
        count = self.values.shape[0]
        steps = self.offsets.diff()
        whole = len(self.offsets) > 0 and self.offsets[0] == 0 and self.offsets[-1] == count
        if not whole or (steps < 0).any():
            raise ValueError(f"{subject}: offsets must rise from 0 to the {count} values.")
        place = self.rows.long() * 2**32 + self.columns.long()
        if (self.columns < 0).any() or (place.diff() <= 0).any():
            raise ValueError(
                f"{subject}: columns must be at least 0 and strictly ascending in each row."
            )

    @property
    def count(self) -> int:
        """Number of stored values."""
        return self.values.shape[0]

    @property
    def rows(self) -> Tensor:
        """The row of each value, ``(count,)`` int64."""
        indices = torch.arange(len(self.offsets) - 1, device=self.offsets.device)
        return indices.repeat_interleave(self.offsets.diff())

    @property
    def nbytes(self) -> int:
        """Bytes of values, columns and offsets."""
        parts = (self.values, self.columns, self.offsets)
        return sum(part.numel() * part.element_size() for part in parts)

    @classmethod
    def from_dense(
        cls, matrix: Tensor, mask: Tensor, *, dtype: torch.dtype = torch.float16
    ) -> SparseRemainder:
        """The entries of ``matrix`` where ``mask`` holds, rounded to ``dtype``.

        Args:
            matrix: ``(rows, cols)`` floating point.
            mask: bool of the same shape.
            dtype: float16, bfloat16 or float32.

        Raises:
            ValueError: shapes disagree, or a value overflows ``dtype``.

        Example:
            >>> matrix = torch.tensor([[0.0, 9.0], [7.0, 0.0]])
            >>> SparseRemainder.from_dense(matrix, matrix > 0).columns
            tensor([1, 0], dtype=torch.int32)
        """
        subject = "SparseRemainder.from_dense"
        check_shape(subject, "matrix", matrix, (None, None))
        check_shape(subject, "mask", mask, tuple(matrix.shape))
        row, column = mask.bool().nonzero(as_tuple=True)
        counts = torch.bincount(row, minlength=matrix.shape[0])
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return cls(matrix.detach()[row, column].to(dtype), column.to(torch.int32), offsets)

    def dense(self, shape: tuple[int, int]) -> Tensor:
        """The matrix, ``shape`` float32."""
        matrix = torch.zeros(shape, device=self.values.device)
        matrix[self.rows, self.columns.long()] = self.values.float()
        return matrix
