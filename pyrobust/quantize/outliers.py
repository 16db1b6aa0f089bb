"""Outliers of a weight: which entries to keep in 16 bits, and the codes of the others."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pyrobust._checks import check_choice, check_finite, check_shape, check_unit
from pyrobust.ops.formats import levels_of
from pyrobust.quantize.qtensor import QTensor
from pyrobust.quantize.round_to_nearest import round_to_nearest
from pyrobust.quantize.second_level import QTensorWithStatistics, SecondLevel

__all__ = [
    "OUTLIER_BITS",
    "largest",
    "outlier_columns",
    "outlier_count",
    "outlier_mask",
    "quantize_with_outliers",
]

OUTLIER_BITS = (2, 3, 4, 8)
"""The widths with a code for 0, which a kept weight's slot takes."""

_COLUMN_SHARE = 0.6  # of a layer's outliers, beyond which their columns are kept whole


def outlier_mask(weight: Tensor, score: Tensor, fraction: float) -> Tensor:
    """The weights with the largest scores.

    Args:
        weight: any shape.
        score: of that shape, finite.
        fraction: ``floor(fraction * weight.numel())`` weights are marked; in [0, 1].

    Returns:
        bool of that shape; of equal scores the first count.

    Raises:
        ValueError: shapes disagree, a score is not finite, or ``fraction`` is out of range.

    Example:
        >>> outlier_mask(torch.zeros(4), torch.tensor([1.0, 3.0, 3.0, 0.0]), 0.5)
        tensor([False,  True,  True, False])
    """
    check_shape("outlier_mask", "score", score, tuple(weight.shape))
    check_finite("outlier_mask", "score", score)
    check_unit("outlier_mask", "fraction", fraction)
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=score.device)
    mask[largest(score, outlier_count(fraction, weight.numel()))] = True
    return mask.reshape(weight.shape)


def outlier_columns(mask: Tensor, *, share: float = _COLUMN_SHARE) -> Tensor:
    """Columns to keep whole: the fewest that hold more than ``share`` of the marked weights.

    Args:
        mask: ``(rows, columns)`` bool.
        share: in [0, 1].

    Returns:
        int64 column numbers, ascending; none where a value and an index for each of their marked
        weights take less than a value for each of their rows.
    """
    counts = mask.sum(0)
    order = torch.argsort(counts, descending=True, stable=True)
    covered = counts[order].cumsum(0)
    total = int(mask.sum())
    needed = int((covered <= share * total).sum()) + 1
    if total == 0 or needed > len(order) or mask.shape[0] * needed > 2 * int(covered[needed - 1]):
        return order[:0]
    return order[:needed].sort().values


def quantize_with_outliers(
    weight: Tensor,
    mask: Tensor,
    *,
    bits: float = 4,
    group_size: int = 16,
    group_dim: int = 1,
    symmetric: bool = False,
    second_level: bool = False,
) -> QTensor:
    """Round a weight to nearest but for marked entries, which are kept in 16 bits.

    Ranges of groups count unmarked entries only. Marked entries become exact in float16 (bfloat16
    for a bfloat16 weight, and where the largest of them lies outside of float16's normal range);
    their code slots stand for 0.

    Args:
        weight: ``(rows, columns)`` floating point, finite.
        mask: bool of that shape.
        bits: 2, 3, 4 or 8.
        group_size: weights that share a scale.
        group_dim: 1, groups along the columns; 0, along the rows.
        symmetric: no zero-points.
        second_level: round scales and zero-points to what 3-bit codes a super-group can say
            (:class:`~pyrobust.quantize.SecondLevel`); ``group_dim=1`` only.

    Returns:
        The packed weight with its remainder; without one where nothing is marked.

    Raises:
        ValueError: an option is out of range, shapes disagree, or a marked entry overflows.
    """
    subject = "quantize_with_outliers"
    check_choice(subject, "bits", bits, OUTLIER_BITS)
    check_shape(subject, "mask", mask, tuple(weight.shape))
    if second_level and group_dim != 1:
        raise ValueError(f"{subject}: group_dim must be 1 with second_level; got {group_dim}.")
    mask = mask.cpu().bool()
    rest = weight.detach().cpu().masked_fill(mask, 0)  # zero widens no range, and is exact
    packed = round_to_nearest(
        rest, bits=bits, group_size=group_size, group_dim=group_dim, symmetric=symmetric
    )
    if second_level:
        packed = _with_second_level(rest, packed)
    if not bool(mask.any()):
        return packed
    kept = weight.detach().cpu().float()
    top = float(kept[mask].abs().max())
    narrow = weight.dtype != torch.bfloat16 and (top == 0 or 2.0**-14 <= top <= 65504)
    return packed.with_remainder(kept, mask, dtype=torch.float16 if narrow else torch.bfloat16)


def outlier_count(fraction: float, size: int) -> int:
    """``floor(fraction * size)``, as if ``fraction`` were the decimal that was written."""
    return math.floor(fraction * size + 1e-9)  # 0.29 * 100 is below 29


def largest(score: Tensor, count: int) -> Tensor:
    """Flat positions of the ``count`` largest values, ascending; of equal ones the first."""
    flat = score.flatten()
    if count == 0:
        return flat.new_empty(0, dtype=torch.int64)
    least = flat.topk(count).values[-1]
    above = (flat > least).nonzero().flatten()
    equal = (flat == least).nonzero().flatten()[: count - len(above)]
    return torch.cat([above, equal]).sort().values


def _with_second_level(weight: Tensor, packed: QTensor) -> QTensor:
    """The same format with statistics of the second level, and the codes nearest to ``weight``."""
    levels = levels_of(packed.bits)
    statistics = SecondLevel.of(packed.scale, packed.zero)
    scale, zero = statistics.scale, statistics.zero(levels)
    middle = torch.full_like(scale, levels // 2, dtype=torch.uint8) if zero is None else zero
    size, columns = packed.group_size, weight.shape[1]
    step, offset = (s.float().repeat_interleave(size, 1)[:, :columns] for s in (scale, middle))
    codes = torch.round(weight.float() / torch.where(step > 0, step, 1.0)) + offset
    codes = codes.clamp(0, levels - 1).to(torch.uint8)
    result = QTensorWithStatistics.from_codes(codes, scale, zero, bits=packed.bits, group_size=size)
    assert isinstance(result, QTensorWithStatistics)
    return replace(result, statistics=statistics)
