"""StoredOutliers: the sparse remainder of a weight in the fewest bits, as files hold it.

16 bits for a value and 16 for its column (32 where rows are longer than 32,768); rows tell how many
they hold. Columns that are kept whole stand apart, with one number a column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrobust.quantize.remainder import SparseRemainder

__all__ = ["StoredOutliers", "index_type"]


def index_type(columns: int) -> torch.dtype:
    """The smallest accepted type that counts to ``columns``."""
    return torch.int16 if columns < 2**15 else torch.int32


@dataclass(frozen=True)
class StoredOutliers:
    """A sparse ``(rows, columns)`` matrix.

    Attributes:
        values: ``(count,)`` float16, bfloat16 or float32, row by row.
        columns: ``(count,)`` int16 or int32, ascending in a row.
        counts: ``(rows,)`` of the same type: how many each row holds.
        whole_columns: ``(c,)`` int32: columns of which every entry is kept, ascending.
        whole_values: ``(rows, c)``, dtype of ``values``.
    """

    values: Tensor
    columns: Tensor
    counts: Tensor
    whole_columns: Tensor
    whole_values: Tensor

    @classmethod
    def of(cls, remainder: SparseRemainder, columns: int) -> StoredOutliers:
        """The same matrix; ``columns`` is its width."""
        rows, places = remainder.rows, remainder.columns.long()
        height = len(remainder.offsets) - 1
        whole = (torch.bincount(places, minlength=columns) == height).nonzero().flatten()
        apart = torch.isin(places, whole)
        kind = index_type(columns)
        return cls(
            remainder.values[~apart],
            places[~apart].to(kind),
            torch.bincount(rows[~apart], minlength=height).to(kind),
            whole.to(torch.int32),
            remainder.values[apart].reshape(height, len(whole)),  # row by row, columns ascending
        )

    def remainder(self) -> SparseRemainder:
        """The matrix as the packed product takes it."""
        height, device = len(self.counts), self.values.device
        every = torch.arange(height, device=device)
        whole = self.whole_columns.long()
        rows = torch.cat(
            [every.repeat_interleave(self.counts.long()), every.repeat_interleave(len(whole))]
        )
        places = torch.cat([self.columns.long(), whole.repeat(height)])
        values = torch.cat([self.values, self.whole_values.flatten()])
        order = torch.argsort(rows * 2**32 + places)
        counts = torch.bincount(rows, minlength=height)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return SparseRemainder(values[order], places[order].to(torch.int32), offsets)
