"""Round-to-nearest: every weight to the closest point of its group's grid, with no data needed.

The baseline of every quantizer here, and the only step for weights that were trained for it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyrobust._checks import (
    check_choice,
    check_finite,
    check_float_tensor,
    check_instance,
    check_integer,
    check_shape,
)
from pyrobust.ops.formats import check_bits, levels_of
from pyrobust.quantize.grid import (
    covering_grid,
    divisor,
    nearest_codes,
    split_groups,
    store_scale,
)
from pyrobust.quantize.qtensor import QTensor

__all__ = ["quantize_groupwise", "round_to_nearest", "rtn"]

_DIMS = {"oc": 1, "ic": 0}


def round_to_nearest(
    weight: Tensor,
    *,
    bits: float,
    group_size: int = 128,
    group_dim: int = 1,
    symmetric: bool = False,
) -> QTensor:
    """Quantize a weight group by group to the nearest point of a uniform grid.

    At 2 to 8 bits the grid spans the group's smallest and largest weight, extended to hold 0
    exactly (so that pruned weights stay pruned); no weight moves by more than half a step. At 1.58
    and 1 bit the scale minimises the group's squared error instead.

    Scales are float16 where all of them lie in its normal range, else float32 with 15 significant
    bits; either way rounded up, so that the grid still covers the group.

    Args:
        weight: ``(rows, cols)`` floating point, finite.
        bits: 1, 1.58, 2, 3, 4 or 8.
        group_size: weights that share a scale, at least 1; the last group may be shorter.
        group_dim: 1, groups along the columns (per output channel); 0, along the rows.
        symmetric: fix the zero-point at ``2**(bits - 1)``. Always so at 1 and 1.58 bits.

    Returns:
        The packed weight, on the CPU.

    Raises:
        TypeError: ``weight`` is not floating point.
        ValueError: it is not two-dimensional or not finite, or an option is wrong.

    Example:
        >>> packed = round_to_nearest(torch.tensor([[-1.0, 0.0, 0.5, 2.0]]), bits=2)
        >>> packed.dequantize()
        tensor([[-1.,  0.,  0.,  2.]])
    """
    subject = "round_to_nearest"
    check_float_tensor(subject, "weight", weight)
    check_shape(subject, "weight", weight, (None, None))
    check_bits(subject, bits)
    check_integer(subject, "group_size", group_size, 1)
    check_choice(subject, "group_dim", group_dim, (0, 1))
    check_finite(subject, "weight", weight)

    along = weight.detach().cpu().to(torch.float32)
    along = along if group_dim == 1 else along.t()
    grouped = split_groups(along, min(group_size, max(1, along.shape[1])))
    if bits in (1, 1.58):
        scale = store_scale(_least_squares_scale(grouped, bits, along.shape[1]), up=False)
        codes, zero = _nearest_signs(grouped, scale.float(), bits), None
    else:
        scale, zero = covering_grid(grouped, levels_of(bits), symmetric)
        codes = nearest_codes(grouped, scale.float(), zero, levels_of(bits))
    codes = codes.flatten(1)[:, : along.shape[1]]
    if group_dim == 0:
        codes, scale = codes.t().contiguous(), scale.t().contiguous()
        zero = None if zero is None else zero.t().contiguous()
    return QTensor.from_codes(
        codes,
        scale,
        None if symmetric else zero,
        bits=bits,
        group_size=group_size,
        group_dim=group_dim,
    )


def quantize_groupwise(
    w: Tensor, bits: float, group_size: int = 128, dim: str = "oc", symmetric: bool = False
) -> QTensor:
    """:func:`round_to_nearest` at 2, 3, 4 or 8 bits, with the group direction by name.

    Args:
        w: ``(out_features, in_features)`` floating point, finite.
        bits: 2, 3, 4 or 8.
        group_size: weights that share a scale, ``>= 1``; the last group may be shorter.
        dim: ``"oc"``, groups along the inputs within an output channel; ``"ic"``, along the outputs
            within an input channel, so that a troublesome input channel keeps to its own groups.
        symmetric: no zero-points.

    Returns:
        The packed weight, on the CPU.

    Raises:
        TypeError: ``w`` is not floating point.
        ValueError: it is not two-dimensional or not finite, or an option is wrong.

    Example:
        >>> w = torch.randn(8, 6)
        >>> per_ic = quantize_groupwise(w, 4, 4, "ic")
        >>> per_oc = quantize_groupwise(w.t(), 4, 4, "oc")
        >>> torch.equal(per_ic.dequantize(), per_oc.dequantize().t())
        True
    """
    check_choice("quantize_groupwise", "bits", bits, (2, 3, 4, 8))
    check_choice("quantize_groupwise", "dim", dim, _DIMS)
    return round_to_nearest(
        w, bits=bits, group_size=group_size, group_dim=_DIMS[dim], symmetric=symmetric
    )


def rtn(linear: nn.Linear, bits: float, group_size: int = 128, dim: str = "oc") -> QTensor:
    """:func:`quantize_groupwise` of the weight of a linear layer.

    Raises:
        TypeError: ``linear`` is not a ``torch.nn.Linear``.
        ValueError: as :func:`quantize_groupwise`.
    """
    check_instance("rtn", "linear", linear, nn.Linear)
    return quantize_groupwise(linear.weight, bits, group_size, dim)


def _least_squares_scale(grouped: Tensor, bits: float, length: int) -> Tensor:
    """The scale of the closest ``scale * {-1, 1}`` or ``scale * {-1, 0, 1}`` in squared error.

    One bit: the mean magnitude. Ternary: the mean of the k largest magnitudes, with the k that
    maximises (their sum)^2 / k; then |w| > scale / 2 exactly for those k.
    """
    magnitude = grouped.abs().double()
    if bits == 1:
        used = torch.ones(length, dtype=torch.float64)
        counts = split_groups(used[None], grouped.shape[2]).sum(2) if grouped.numel() else 1.0
        return (magnitude.sum(2) / counts).float()
    if not grouped.numel():
        return grouped.sum(2)
    sums = magnitude.sort(2, descending=True).values.cumsum(2)
    kept = torch.arange(1, grouped.shape[2] + 1, dtype=torch.float64)
    best = (sums**2 / kept).argmax(2, keepdim=True)
    return (sums.gather(2, best) / (best + 1)).squeeze(2).float()


def _nearest_signs(grouped: Tensor, scale: Tensor, bits: float) -> Tensor:
    if bits == 1:
        return (grouped >= 0).to(torch.uint8)
    steps = torch.round(grouped / divisor(scale)[..., None]).clamp(-1, 1)
    return (steps + 1).to(torch.uint8)
