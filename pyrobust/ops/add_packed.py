"""Vectors added to a tensor in place in one pass, packed ones without their weights in memory.

The contract is ``csrc/matmul/matmul.h``, with the same bits on every instruction set:

- float32 targets: ``target += alpha * weight``, the product and the sum each rounded;
- float16 and bfloat16 targets: ``alpha`` and the weight are rounded to that type, and the sum to
  float32 and then to that type. This is ``target.add_(weight.to(target.dtype), alpha=alpha)`` but
  for the last elements of a tensor or a thread's share, where torch rounds the product as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust._checks import check_shape
from pyrobust.ops.formats import check_bits, levels_of, row_bytes
from pyrobust.ops.packed_weight import (
    NO_EXTRAS,
    WeightExtras,
    check_bytes,
    check_weight,
    native_extras,
)

__all__ = [
    "SavedCopy",
    "add_checked_weight_",
    "add_dequantized_",
    "add_levels_",
    "add_values_",
    "as_matrix",
]


# From where on a factor rounds to infinity: at first to float32, which the kernels take, then to
# the type. Half of a unit in the last place above the largest number, less half of one of float32.
_OVERFLOW = {
    torch.float32: 2.0**128 - 2.0**103,
    torch.float16: 65520.0 - 2.0**-9,
    torch.bfloat16: 2.0**128 - 2.0**119 - 2.0**103,
}


@dataclass
class SavedCopy:
    """Room for what a target holds before it is added to, filled in the same pass over it.

    The copy goes past the caches, as it is for later.

    Attributes:
        values: contiguous, of the target's shape and dtype.
        filled: whether ``values`` are the target's. It is set together with the first change, so
            that whatever is raised around an addition, the target is as before or can be restored.
    """

    values: Tensor
    filled: bool = False

    def fill(self, target: Tensor) -> None:
        """Copy ``target`` in a pass of its own."""
        self.values.copy_(target)
        self.filled = True


def as_matrix(target: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """A view of ``target`` that the operators below take, or None where there is none.

    They take a plain matrix on the CPU, float32, float16 or bfloat16, whose rows are contiguous and
    do not overlap.
    """
    try:
        matrix = target.view(shape)
    except RuntimeError:
        return None
    return matrix if _can_add_in_place(matrix) else None


def _can_add_in_place(target: Tensor) -> bool:
    plain = type(target) in (Tensor, torch.nn.Parameter) and target.device.type == "cpu"
    return plain and target.dtype in _OVERFLOW and target.ndim == 2 and _has_dense_rows(target)


def _has_dense_rows(target: Tensor) -> bool:
    (rows, columns), (row_stride, column_stride) = target.shape, target.stride()
    dense = columns <= 1 or column_stride == 1
    return target.numel() == 0 or (dense and (rows <= 1 or row_stride >= columns))


def add_dequantized_(
    target: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    in_features: int,
    bits: float,
    group_size: int,
    group_dim: int = 1,
    extras: WeightExtras | None = None,
    alpha: float = 1.0,
    saved: SavedCopy | None = None,
) -> Tensor:
    """``target += alpha * W`` for the weight W that packed codes stand for.

    Args:
        target: ``(out_features, in_features)`` float32, float16 or bfloat16, on the CPU; changed
            in place. Rows are contiguous; they may lie apart, as in a slice of columns.
        codes: as for :func:`packed_linear`, as are the parts that follow.
        scale: scales of the groups.
        zero: zero-points or None.
        in_features: columns of the weight.
        bits: 1, 1.58, 2, 3, 4 or 8.
        group_size: weights that share a scale.
        group_dim: 1 or 0.
        extras: row scales, codebook and sparse remainder, where the weight has them.
        alpha: finite factor, rounded to the target's type.
        saved: receives what ``target`` held.

    Returns:
        ``target``.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: a shape or option is wrong, the rows of ``target`` are not contiguous or
            overlap, it is not on the CPU, or requires a gradient where gradients are recorded.

    Example:
        >>> from pyrobust.ops import pack_codes
        >>> codes = pack_codes(torch.tensor([[7, 8, 9]], dtype=torch.uint8), bits=4)
        >>> form = {"in_features": 3, "bits": 4, "group_size": 3}
        >>> add_dequantized_(torch.ones(1, 3), codes, torch.ones(1, 1), alpha=0.5, **form)
        tensor([[0.5000, 1.0000, 1.5000]])
    """
    extras = extras or NO_EXTRAS
    check_weight(
        "add_dequantized_", codes, scale, zero, in_features, bits, group_size, group_dim, extras
    )
    form = in_features, bits, group_size, group_dim, extras
    return add_checked_weight_(target, (codes, scale, zero), form, alpha, saved)


def add_checked_weight_(
    target: Tensor,
    parts: tuple[Tensor, Tensor, Tensor | None],
    form: tuple[int, float, int, int, WeightExtras],
    alpha: float,
    saved: SavedCopy | None,
) -> Tensor:
    """:func:`add_dequantized_` for a weight that was checked when it was made.

    A patch of many tensors finds the interpreter's data pushed out of the caches at each of them;
    the checks of a weight then take as long as a tenth of its sums.

    Args:
        target: as for :func:`add_dequantized_`.
        parts: codes, scale and zero.
        form: in_features, bits, group_size, group_dim and extras.
        alpha: finite factor.
        saved: receives what ``target`` held, unless None.
    """
    (codes, scale, zero), (in_features, bits, group_size, group_dim, extras) = parts, form
    _check_target("add_dequantized_", target, alpha, (codes.shape[0], in_features))
    _native.add_dequantized(
        target.detach(), codes.contiguous(), scale.contiguous(),
        None if zero is None else zero.contiguous(), alpha, in_features, levels_of(bits),
        group_size, group_dim, native_extras(extras), torch.get_num_threads(), saved,
    )  # fmt: skip
    torch.autograd.graph.increment_version(target)
    return target


def add_levels_(
    target: Tensor,
    codes: Tensor,
    levels: Tensor,
    *,
    bits: float,
    alpha: float = 1.0,
    saved: SavedCopy | None = None,
) -> Tensor:
    """``target += alpha * levels[codes]``: codes that index any floats, not a grid.

    Args:
        target: ``(rows, columns)``, otherwise as for :func:`add_dequantized_`.
        codes: ``(rows, row_bytes)`` uint8, packed along the columns (:func:`pack_codes`).
        levels: float32, one value a code.
        bits: 1, 1.58, 2, 3, 4 or 8.
        alpha: finite factor, rounded to the target's type.
        saved: receives what ``target`` held.

    Returns:
        ``target``.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: a shape is wrong, or ``target`` as for :func:`add_dequantized_`.

    Example:
        >>> from pyrobust.ops import pack_codes
        >>> codes = pack_codes(torch.tensor([[0, 3, 1]], dtype=torch.uint8), bits=2)
        >>> add_levels_(torch.zeros(1, 3), codes, torch.tensor([0.5, 1, 2, 4]), bits=2)
        tensor([[0.5000, 4.0000, 1.0000]])
    """
    subject = "add_levels_"
    check_bits(subject, bits)
    check_bytes(subject, "codes", codes)
    if levels.dtype != torch.float32:
        raise TypeError(f"{subject}: levels must have dtype torch.float32; got {levels.dtype}.")
    check_shape(subject, "levels", levels, (levels_of(bits),))
    check_shape(subject, "codes", codes, (None, None))
    _check_target(subject, target, alpha, (codes.shape[0], None))
    check_shape(subject, "codes", codes, (None, row_bytes(target.shape[1], bits)))
    _native.add_levels(
        target.detach(), codes.contiguous(), levels.contiguous(), alpha,
        torch.get_num_threads(), saved,
    )  # fmt: skip
    torch.autograd.graph.increment_version(target)
    return target


def add_values_(
    target: Tensor, values: Tensor, *, alpha: float = 1.0, saved: SavedCopy | None = None
) -> Tensor:
    """``target += alpha * values``, rounded as sums with packed weights are.

    Args:
        target: ``(rows, columns)``, otherwise as for :func:`add_dequantized_`.
        values: of its shape on the CPU, contiguous, float32 or of its dtype.
        alpha: finite factor, rounded to the target's type.
        saved: receives what ``target`` held.

    Returns:
        ``target``.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: a shape is wrong, or ``target`` as for :func:`add_dequantized_`.

    Example:
        >>> add_values_(torch.ones(1, 2).bfloat16(), torch.tensor([[1.0, 2.0]]), alpha=0.5)
        tensor([[1.5000, 2.0000]], dtype=torch.bfloat16)
    """
    subject = "add_values_"
    if values.dtype not in (torch.float32, target.dtype):
        raise TypeError(
            f"{subject}: values must have dtype torch.float32 or that of target, {target.dtype}; "
            f"got {values.dtype}."
        )
    _check_target(subject, target, alpha, (None, None))
    check_shape(subject, "values", values, tuple(target.shape))
    _native.add_values(target.detach(), values.detach(), alpha, torch.get_num_threads(), saved)
    torch.autograd.graph.increment_version(target)
    return target


def _check_target(
    subject: str, target: Tensor, alpha: float, shape: tuple[int | None, int | None]
) -> None:
    if target.dtype not in _OVERFLOW:
        raise TypeError(
            f"{subject}: target must have dtype torch.float32, torch.float16 or torch.bfloat16; "
            f"got {target.dtype}."
        )
    if not abs(alpha) < _OVERFLOW[target.dtype]:  # NaN compares false
        raise ValueError(
            f"{subject}: alpha must be finite in the target's type, {target.dtype}; got {alpha}."
        )
    check_shape(subject, "target", target, shape)
    if not _can_add_in_place(target):
        raise ValueError(
            f"{subject}: target must be a plain tensor on the CPU with contiguous rows that do not "
            f"overlap; got strides {target.stride()} on {target.device}."
        )
    if torch.is_grad_enabled() and target.requires_grad:
        raise ValueError(
            f"{subject}: target must not require a gradient while gradients are recorded; "
            "call it under torch.no_grad()."
        )
