"""Codebooks: levels of any spacing for low-bit codes, NF4 among them.

The entries of a stored codebook are integers from 0 to 255 with 128 for zero (``QTensor``), so that
every weight is an exact float32 and integer kernels multiply it. A level therefore moves by at most
1/254 of the largest one: for NF4, 5% of the smallest distance between two levels.

Source: T. Dettmers, A. Pagnoni, A. Holtzman, L. Zettlemoyer, "QLoRA: Efficient Finetuning of
Quantized LLMs", NeurIPS 2023, arXiv 2305.14314; section 3, equation 4 and appendix E.
Departures: levels on the grid described above; scales are not themselves quantized.
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
from pyrobust.quantize.grid import divisor, split_groups, store_scale
from pyrobust.quantize.qtensor import QTensor

__all__ = ["codebook_of", "nf4_levels", "round_to_codebook"]

_LARGEST = 127  # distance of the outermost entry from 128
_OUTERMOST = 0.9677083  # probability of NF4's outermost quantile


def nf4_levels() -> Tensor:
    """The 16 levels of NF4: quantiles of the normal distribution, 8 above and 7 below zero.

    Returns:
        ``(16,)`` float64, ascending from -1 to 1.

    Example:
        >>> nf4_levels()[[0, 7, 8, 15]].float()
        tensor([-1.0000,  0.0000,  0.0796,  1.0000])
    """

    def quantiles(count: int) -> Tensor:
        inner = torch.linspace(_OUTERMOST, 0.5, count + 1, dtype=torch.float64)[:-1]
        outer: Tensor = torch.special.ndtri(inner)
        return outer

    levels = torch.cat([-quantiles(7), torch.zeros(1, dtype=torch.float64), quantiles(8).flip(0)])
    return levels / levels[-1]


def codebook_of(levels: Tensor) -> Tensor:
    """The stored codebook nearest to ``levels``: 128 + 127 level / max |level|, to nearest.

    Args:
        levels: ``(count,)`` floating point, finite, not all zero.

    Returns:
        ``(count,)`` uint8.

    Raises:
        ValueError: ``levels`` is not finite, not one-dimensional or all zero.
    """
    subject = "codebook_of"
    check_float_tensor(subject, "levels", levels)
    check_shape(subject, "levels", levels, (None,))
    check_finite(subject, "levels", levels)
    top = levels.abs().max() if levels.numel() else torch.zeros(())
    if not top > 0:
        raise ValueError(f"{subject}: levels must hold a value other than 0; got {levels}.")
    return (128 + torch.round(levels.double() / top.double() * _LARGEST)).to(torch.uint8)


def round_to_codebook(
    weight: Tensor,
    *,
    levels: Tensor | None = None,
    bits: float = 4,
    group_size: int = 64,
    group_dim: int = 1,
    symmetric: bool = True,
) -> QTensor:
    """Quantize a weight group by group to the nearest level times the group's largest magnitude.

    Args:
        weight: ``(rows, cols)`` floating point, finite.
        levels: ``(2**bits,)`` floating point in any order, scaled so that the largest magnitude is
            that of the group; three at 1.58 bits. None: NF4.
        bits: 1, 1.58, 2, 3 or 4.
        group_size: weights that share a scale, at least 1; the last group may be shorter.
        group_dim: 1, groups along the columns; 0, along the rows.
        symmetric: accepted for the signature of quantizers; codebooks have no zero-points.

    Returns:
        The packed weight, on the CPU.

    Raises:
        TypeError: ``weight`` is not floating point.
        ValueError: it is not two-dimensional or not finite, ``levels`` do not number ``2**bits``,
            or an option is out of range.

    Example:
        >>> round_to_codebook(torch.tensor([[-2.0, 0.1, 0.9]]), group_size=3).dequantize()
        tensor([[-1.9999,  0.1575,  0.8818]])
    """
    subject = "round_to_codebook"
    check_float_tensor(subject, "weight", weight)
    check_shape(subject, "weight", weight, (None, None))
    check_finite(subject, "weight", weight)
    check_bits(subject, bits)
    check_integer(subject, "group_size", group_size, 1)
    check_choice(subject, "group_dim", group_dim, (0, 1))
    if levels is None:
        check_choice(subject, "bits (without levels)", bits, (4,))
        levels = nf4_levels()
    check_choice(subject, "bits", bits, (1, 1.58, 2, 3, 4))
    check_shape(subject, "levels", levels, (levels_of(bits),))
    codebook = codebook_of(levels)

    along = weight.detach().cpu().to(torch.float32)
    along = along if group_dim == 1 else along.t()
    grouped = split_groups(along, min(group_size, max(1, along.shape[1])))
    scale = store_scale(grouped.abs().amax(2) / _LARGEST, up=False)
    steps = grouped / divisor(scale.float())[..., None]
    codes = _nearest(steps, codebook.float() - 128).flatten(1)[:, : along.shape[1]]
    if group_dim == 0:
        codes, scale = codes.t().contiguous(), scale.t().contiguous()
    return QTensor.from_codes(
        codes, scale, bits=bits, group_size=group_size, group_dim=group_dim, codebook=codebook
    )


def _nearest(steps: Tensor, entries: Tensor) -> Tensor:
    """The index of the entry nearest to each value."""
    order = entries.argsort()
    sorted_entries = entries[order]
    borders = (sorted_entries[1:] + sorted_entries[:-1]) / 2
    return order[torch.bucketize(steps.contiguous(), borders)].to(torch.uint8)
