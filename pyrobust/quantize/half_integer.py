"""Half-integer levels in the packed formats: ``scale * (k + 1/2) / n`` without rounding.

``(k + 1/2) / n`` with codes ``c = k + n`` is ``(2 c - (2 n - 1)) / (2 n)``: odd integers times a
power of two, so a scale of 15 significant bits stays one. At 8 bits those integers leave a byte:
:class:`HalfStepTensor` keeps ``k`` and adds the half apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyrobust.quantize.qtensor import QTensor

__all__ = ["HalfStepTensor", "half_integer_qtensor"]

_CENTRE = 128  # the byte that stands for 0


def half_integer_qtensor(codes: Tensor, scale: Tensor, *, bits: int) -> QTensor:
    """Pack codes of ``2^bits`` half-integer levels with a scale per row.

    1 bit is the plain one-bit format and 2 to 4 bits use a codebook of odd integers; 5 to 7 bits
    take 8 bits of storage, the odd integer itself.

    Args:
        codes: ``(rows, cols)`` uint8, ``k + n`` in ``[0, 2^bits)``.
        scale: ``(rows, 1)`` float32 with at most 15 significant bits.
        bits: 1 to 7.

    Raises:
        ValueError: ``bits`` is 8 (256 odd integers do not fit a byte around zero).
    """
    n = 2 ** (bits - 1)
    step, columns = scale / (2 * n), max(1, codes.shape[1])
    if bits == 1:
        return QTensor.from_codes(codes, step, bits=1, group_size=columns)
    if bits > 7:
        raise ValueError(
            "half_integer_qtensor: bits must be 1 to 7, since 256 half-integer levels fit no "
            f"QTensor (pack the layer: it stores a HalfStepTensor); got {bits}."
        )
    if bits <= 4:
        levels = 2 * torch.arange(2 * n) - (2 * n - 1) + _CENTRE
        book = levels.to(device=codes.device, dtype=torch.uint8)
        return QTensor.from_codes(codes, step, bits=bits, group_size=columns, codebook=book)
    odd = 2 * codes.to(torch.int16) - (2 * n - 1) + _CENTRE
    return QTensor.from_codes(odd.to(torch.uint8), step, bits=8, group_size=columns)


@dataclass(frozen=True)
class HalfStepTensor:
    """A weight on the 256 half-integer levels of 8 bits: ``step * (k + 1/2)``.

    Attributes:
        integers: ``step * k`` in ``columns`` columns, then ``step`` itself in ``extra`` columns,
            which meet half of the sum of the inputs (:class:`pyrobust.nn.half_sums.HalfSums`).
        extra: 1 for a linear layer; the size of the kernel for a convolution.
    """

    integers: QTensor
    extra: int
    bits: ClassVar[int] = 8

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, *, extra: int = 1) -> HalfStepTensor:
        """Pack ``scale * (k + 1/2) / 128``.

        Args:
            codes: ``(rows, columns)`` uint8, ``k + 128``.
            scale: ``(rows, 1)`` float32 with at most 15 significant bits.
            extra: as the attribute.
        """
        ones = torch.full((codes.shape[0], extra), _CENTRE + 1, dtype=torch.uint8)
        both = torch.cat([codes, ones.to(codes.device)], 1)
        step = scale / _CENTRE
        return cls(QTensor.from_codes(both, step, bits=8, group_size=both.shape[1]), extra)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.integers.nbytes

    def dequantize(self) -> Tensor:
        """The weight, ``(rows, columns)`` float32, exactly."""
        both = self.integers.dequantize()
        return both[:, : -self.extra] + both[:, -1:] / 2
