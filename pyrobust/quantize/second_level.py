"""Second-level statistics: the scales and zero-points of small groups as low-bit codes themselves.

With a scale every 16 weights, scales cost as much as a bit a weight. Here 16 groups of a row form a
super-group; their scales become ``base + step * code`` with 3-bit codes, their zero-points
``zero_base + zero_step * code`` in integers.

Source: Dettmers et al., "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight
Compression", ICLR 2024, arXiv 2306.03078, section 4.2. Departure: zero-points stay integers, as
the packed product wants them, so up to three bits of zero-points are kept exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrobust._checks import check_integer, check_shape
from pyrobust.ops.matmul import pack_codes, unpack_codes
from pyrobust.quantize.qtensor import QTensor, round_scale

__all__ = ["SUPER_GROUP", "QTensorWithStatistics", "SecondLevel"]

SUPER_GROUP = 16
"""Groups that share the second-level statistics."""

_BITS = 3
_TOP = 2**_BITS - 1


@dataclass(frozen=True)
class SecondLevel:
    """Scales and zero-points of a ``(rows, groups)`` grid in 3 bits each.

    Attributes:
        groups: columns of the grid.
        scale_codes: ``(rows, ceil(3 * groups / 8))`` uint8, packed.
        scale_base: ``(rows, ceil(groups / 16))`` float16; bfloat16 beyond the range of float16.
        scale_step: the same.
        zero_codes: as ``scale_codes``, or None for a symmetric weight.
        zero_base: ``(rows, ceil(groups / 16))`` uint8, or None.
        zero_step: the same.
    """

    groups: int
    scale_codes: Tensor
    scale_base: Tensor
    scale_step: Tensor
    zero_codes: Tensor | None = None
    zero_base: Tensor | None = None
    zero_step: Tensor | None = None

    @classmethod
    def of(cls, scale: Tensor, zero: Tensor | None) -> SecondLevel:
        """The codes nearest to given statistics.

        Args:
            scale: ``(rows, groups)`` float, non-negative.
            zero: ``(rows, groups)`` uint8, or None.

        Raises:
            ValueError: shapes disagree.
        """
        subject = "SecondLevel"
        check_shape(subject, "scale", scale, (None, None))
        groups = scale.shape[1]
        low, high = _ends(scale.float())
        used = scale[scale > 0].float()
        narrow = bool(((used >= 2.0**-12) & (used <= 65504 / 2)).all())
        dtype = torch.float16 if narrow else torch.bfloat16
        base = low.to(dtype)
        step = ((high - base.float()).clamp(min=0) / _TOP).to(dtype)
        codes = _codes(scale.float(), base.float(), step.float())
        if zero is None:
            return cls(groups, codes, base, step)
        check_shape(subject, "zero", zero, tuple(scale.shape))
        first, last = _ends(zero.float())
        stride = torch.ceil((last - first) / _TOP)
        integers = (first.to(torch.uint8), stride.to(torch.uint8))
        return cls(groups, codes, base, step, _codes(zero.float(), first, stride), *integers)

    @property
    def scale(self) -> Tensor:
        """``(rows, groups)`` float16; float32 with 15 significant bits beyond its range."""
        codes = self._unpacked(self.scale_codes).float()
        value = self._spread(self.scale_base) + self._spread(self.scale_step) * codes
        return value.half() if self.scale_base.dtype == torch.float16 else round_scale(value)

    def zero(self, levels: int) -> Tensor | None:
        """``(rows, groups)`` uint8 below ``levels``, or None for a symmetric weight."""
        if self.zero_codes is None or self.zero_base is None or self.zero_step is None:
            return None
        codes = self._unpacked(self.zero_codes).float()
        value = self._spread(self.zero_base) + self._spread(self.zero_step) * codes
        return value.clamp(max=levels - 1).to(torch.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        every = (self.scale_codes, self.scale_base, self.scale_step)
        parts = [*every, self.zero_codes, self.zero_base, self.zero_step]
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def _unpacked(self, codes: Tensor) -> Tensor:
        check_integer("SecondLevel", "groups", self.groups, 0)
        unpacked = unpack_codes(codes.cpu(), in_features=self.groups, bits=_BITS)
        return unpacked.to(codes.device)

    def _spread(self, statistic: Tensor) -> Tensor:
        return statistic.float().repeat_interleave(SUPER_GROUP, 1)[:, : self.groups]


@dataclass(frozen=True)
class QTensorWithStatistics(QTensor):
    """A :class:`~pyrobust.quantize.QTensor` whose scales and zero-points come from 3-bit codes.

    Attributes:
        statistics: the codes; ``scale`` and ``zero`` are what they stand for.
    """

    statistics: SecondLevel | None = None


def _ends(values: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each super-group, ``(rows, super-groups)``."""
    missing = -values.shape[1] % SUPER_GROUP
    padded = torch.cat([values, values[:, -1:].expand(-1, missing)], 1)
    grouped = padded.unflatten(1, (-1, SUPER_GROUP)) if padded.numel() else padded[..., None]
    return grouped.amin(2), grouped.amax(2)


def _codes(values: Tensor, base: Tensor, step: Tensor) -> Tensor:
    columns = values.shape[1]
    base, step = (s.repeat_interleave(SUPER_GROUP, 1)[:, :columns] for s in (base, step))
    codes = torch.round((values - base) / torch.where(step > 0, step, 1.0))
    return pack_codes(codes.clamp(0, _TOP).to(torch.uint8), bits=_BITS)
