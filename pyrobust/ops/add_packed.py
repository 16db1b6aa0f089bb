"""Vectors added to a tensor in place in one pass, packed ones without their weights in memory.

The contract is ``csrc/matmul/matmul.h``, with the same bits on every instruction set:

- float32 targets: ``target += alpha * weight``, the product and the sum each rounded;
- float16 and bfloat16 targets: ``alpha`` and the weight are rounded to that type, and the sum to
  float32 and then to that type. This is ``target.add_(weight.to(target.dtype), alpha=alpha)`` but
  for the last elements of a tensor or a thread's share, where torch rounds the product as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    native_weight,
)

__all__ = [
    "Addition",
    "SavedCopy",
    "Summand",
    "add_all_",
    "add_dequantized_",
    "add_levels_",
    "add_values_",
    "levels_summand",
    "saved_copies",
    "takes",
    "values_summand",
    "weight_summand",
]

Summand = _native.Summand
"""What is added, checked: a matrix of a packed weight, of levels with codes, or of plain values."""


# From where on a factor rounds to infinity: at first to float32, which the kernels take, then to
# the type. Half of a unit in the last place above the largest number, less half of one of float32.
_OVERFLOW = {
    torch.float32: 2.0**128 - 2.0**103,
    torch.float16: 65520.0 - 2.0**-9,
    torch.bfloat16: 2.0**128 - 2.0**119 - 2.0**103,
}


_PLAIN = (Tensor, torch.nn.Parameter)
_LINE = 64  # bytes
_MOST_DIMENSIONS = 8  # that the binding reads


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


def saved_copies(targets: Sequence[Tensor]) -> list[SavedCopy]:
    """Empty copies, contiguous and on the devices of the targets.

    Those on the CPU lie in one piece of memory, each from a line of the caches on. Large pages can
    hold it: writing to it past the caches then takes a tenth less time, and less still when it is
    new.
    """
    sizes = [-(-t.nbytes // _LINE) * _LINE if t.device.type == "cpu" else 0 for t in targets]
    memory = torch.empty(sum(sizes) + _LINE, dtype=torch.uint8)
    _native.use_large_pages(memory)
    begin, copies = -memory.data_ptr() % _LINE, []
    for target, size in zip(targets, sizes, strict=True):
        if target.device.type == "cpu":
            values = memory[begin : begin + target.nbytes].view(target.dtype).view(target.shape)
        else:
            values = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        copies.append(SavedCopy(values))
        begin += size
    return copies


class Addition(NamedTuple):
    """``target += alpha * summand``.

    Attributes:
        summand: what is added.
        target: one that :func:`takes` accepts.
        alpha: finite factor, rounded to the target's type.
        saved: receives what ``target`` held, unless None.
    """

    summand: Summand
    target: Tensor
    alpha: float
    saved: SavedCopy | None = None


def takes(target: Tensor, shape: tuple[int, int]) -> bool:
    """Whether ``target`` can be added to in place as a matrix of that shape.

    That is a plain tensor of as many elements on the CPU, float32, float16 or bfloat16, which is
    contiguous, or of the shape with contiguous rows that do not overlap.
    """
    if type(target) not in _PLAIN or target.device.type != "cpu" or target.dtype not in _OVERFLOW:
        return False
    dense = target.is_contiguous() and target.ndim <= _MOST_DIMENSIONS
    return dense or (tuple(target.shape) == shape and _has_dense_rows(target))


def _has_dense_rows(target: Tensor) -> bool:
    (rows, columns), (row_stride, column_stride) = target.shape, target.stride()
    dense = columns <= 1 or column_stride == 1
    return target.numel() == 0 or (dense and (rows <= 1 or row_stride >= columns))


def add_all_(subject: str, additions: Sequence[Addition]) -> None:
    """Make sums, in one call and with all checked before the first target is changed.

    Raises:
        ValueError: a factor is not finite in its target's type; a target has another size than its
            summand, or :func:`takes` does not accept it.
    """
    for _, target, alpha, _ in additions:
        _check_alpha(subject, target.dtype, alpha)
    for addition in additions:
        torch.autograd.graph.increment_version(addition.target)
    _native.add_all(additions, torch.get_num_threads())


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
    summand = weight_summand((codes, scale, zero), form)
    _check_target("add_dequantized_", target, (codes.shape[0], in_features))
    add_all_("add_dequantized_", [Addition(summand, target, alpha, saved)])
    return target


def weight_summand(
    parts: tuple[Tensor, Tensor, Tensor | None],
    form: tuple[int, float, int, int, WeightExtras],
) -> Summand:
    """A packed weight that was checked when it was made.

    Args:
        parts: codes, scale and zero, as for :func:`add_dequantized_`.
        form: in_features, bits, group_size, group_dim and extras.
    """
    (codes, scale, zero), (in_features, bits, group_size, group_dim, extras) = parts, form
    return _native.weight_summand(
        *native_weight(codes, scale, zero),
        in_features, levels_of(bits), group_size, group_dim, native_extras(extras),
    )  # fmt: skip


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
    check_shape(subject, "target", target, (None, None))
    summand = levels_summand(subject, codes, levels, bits=bits, length=target.shape[1])
    _check_target(subject, target, (codes.shape[0], None))
    add_all_(subject, [Addition(summand, target, alpha, saved)])
    return target


def levels_summand(
    subject: str, codes: Tensor, levels: Tensor, *, bits: float, length: int
) -> Summand:
    """``levels[codes]`` with ``length`` columns, otherwise as for :func:`add_levels_`."""
    check_bits(subject, bits)
    check_bytes(subject, "codes", codes)
    if levels.dtype != torch.float32:
        raise TypeError(f"{subject}: levels must have dtype torch.float32; got {levels.dtype}.")
    check_shape(subject, "levels", levels, (levels_of(bits),))
    check_shape(subject, "codes", codes, (None, row_bytes(length, bits)))
    return _native.levels_summand(codes.contiguous(), levels.contiguous(), length)


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
    _check_target(subject, target, (None, None))
    check_shape(subject, "values", values, tuple(target.shape))
    summand = values_summand(values, (target.shape[0], target.shape[1]))
    add_all_(subject, [Addition(summand, target, alpha, saved)])
    return target


def values_summand(values: Tensor, shape: tuple[int, int]) -> Summand:
    """Contiguous values as a matrix, float32 or of the dtype of their targets."""
    return _native.values_summand(values.detach(), *shape)


def _check_alpha(subject: str, dtype: torch.dtype, alpha: float) -> None:
    if not abs(alpha) < _OVERFLOW[dtype]:  # NaN compares false
        raise ValueError(
            f"{subject}: alpha must be finite in the target's type, {dtype}; got {alpha}."
        )


def _check_target(subject: str, target: Tensor, shape: tuple[int | None, int | None]) -> None:
    if target.dtype not in _OVERFLOW:
        raise TypeError(
            f"{subject}: target must have dtype torch.float32, torch.float16 or torch.bfloat16; "
            f"got {target.dtype}."
        )
    check_shape(subject, "target", target, shape)
    if not takes(target, (target.shape[0], target.shape[1])):
        raise ValueError(
            f"{subject}: target must be a plain tensor on the CPU with contiguous rows that do not "
            f"overlap; got strides {target.stride()} on {target.device}."
        )
    if torch.is_grad_enabled() and target.requires_grad:
        raise ValueError(
            f"{subject}: target must not require a gradient while gradients are recorded; "
            "call it under torch.no_grad()."
        )
