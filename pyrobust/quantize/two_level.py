"""Two-level scales: a small integer per group under one float per row.

With integer group scales a row's product with 8-bit activations is one integer sum, multiplied by a
float once; with a float scale per group it is one multiplication per group. That makes large
batches faster (docs/guide/kernels.md), at the price of coarser group scales. It is a format of its
own, chosen when packing, never an approximation of another.

Source: the double quantization of scales as in T. Dettmers et al. (arXiv 2305.14314, section 3) and
the k-quants of llama.cpp, here with integers small enough for exact products.
Departures: the upper level is one float per row, not per super-block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrobust._checks import (
    check_choice,
    check_finite,
    check_float_tensor,
    check_integer,
    check_shape,
)
from pyrobust.ops.formats import check_bits, levels_of
from pyrobust.quantize.grid import divisor, split_groups
from pyrobust.quantize.qtensor import QTensor, round_scale

__all__ = ["round_to_two_level"]


def round_to_two_level(
    weight: Tensor,
    *,
    bits: float = 4,
    group_size: int = 128,
    group_dim: int = 1,
    symmetric: bool = False,
) -> QTensor:
    """Quantize to the nearest point of grids whose steps are integers times a float per row.

    The row scale is the row's largest group step over the largest integer, 255 over the number of
    steps of a code (17 at 4 bits); a group takes the smallest integer whose grid covers it. With
    ``group_dim=0`` the rows of a group share their row scale.

    Args:
        weight: ``(rows, cols)`` floating point, finite.
        bits: 2, 3 or 4.
        group_size: weights that share an integer, at least 1; the last group may be shorter.
        group_dim: 1, groups along the columns; 0, along the rows.
        symmetric: fix the zero-point at ``2**(bits - 1)``.

    Returns:
        The packed weight, on the CPU.

    Raises:
        TypeError: ``weight`` is not floating point.
        ValueError: it is not two-dimensional or not finite, or an option is out of range.

    Example:
        >>> weight = torch.tensor([[0.0, 1.7, 0.0, 0.3]])
        >>> round_to_two_level(weight, bits=2, group_size=2).scale
        tensor([[85, 15]], dtype=torch.uint8)
    """
    subject = "round_to_two_level"
    check_float_tensor(subject, "weight", weight)
    check_shape(subject, "weight", weight, (None, None))
    check_finite(subject, "weight", weight)
    check_bits(subject, bits)
    check_choice(subject, "bits", bits, (2, 3, 4))
    check_integer(subject, "group_size", group_size, 1)
    check_choice(subject, "group_dim", group_dim, (0, 1))

    levels = levels_of(bits)
    rows = weight.shape[0]
    along = weight.detach().cpu().to(torch.float32)
    along = along if group_dim == 1 else along.t()
    grouped = split_groups(along, min(group_size, max(1, along.shape[1])))
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    if symmetric:
        step = torch.maximum(high / (levels // 2 - 1), -low / (levels // 2))
    else:
        step = high / (levels - 1) - low / (levels - 1)
    # One unit per row of W: per line here, or (groups along the rows) per column of groups.
    across = 1 if group_dim == 1 else 0
    largest = step.amax(across, keepdim=True) if step.numel() else step.sum(across, keepdim=True)
    unit = round_scale(largest / (255 // (levels - 1)), up=True)
    scale = torch.ceil(step / divisor(unit)).clamp(max=255 // (levels - 1))
    spacing = divisor(scale * unit)
    zero = torch.full_like(scale, levels // 2)
    if not symmetric:
        zero = torch.round(-low / spacing).clamp(0, levels - 1)
    codes = torch.round(grouped / spacing[..., None]) + zero[..., None]
    codes = codes.clamp(0, levels - 1).to(torch.uint8).flatten(1)[:, : along.shape[1]]
    row_scale = unit.flatten()
    if group_dim == 0:
        codes, scale, zero = (t.t().contiguous() for t in (codes, scale, zero))
        row_scale = row_scale.repeat_interleave(group_size)[:rows]
    return QTensor.from_codes(
        codes,
        scale.to(torch.uint8),
        None if symmetric else zero.to(torch.uint8),
        bits=bits,
        group_size=group_size,
        group_dim=group_dim,
        row_scale=row_scale,
    )
