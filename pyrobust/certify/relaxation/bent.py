"""Coefficients through a bend, in float32 on the CPU by a kernel that passes over memory once.

The loops are written out in ``csrc/relaxation/relaxation.h``; elsewhere torch operations compute
the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust.ops._library import dispatcher_needed

__all__ = ["Lines", "bent", "unbent"]

Lines = tuple[Tensor, Tensor, Tensor, Tensor]
"""``(b, N)`` slope and shift of the lower line, then of the upper one."""


def bent(a: Tensor, lines: Lines, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(S, b, N)`` coefficients before a bend, and ``(S, b)`` what shifts and biases add.

    Args:
        a: ``(S, b, N)`` coefficients behind it; positive ones meet the lower line.
        lines: of the bend.
        bias: ``(N,)`` of the layer whose result is bent, or None.
    """
    pulled, value = torch.empty_like(a), a.new_empty(a.shape[:2])
    if _serves(a, lines, bias):
        _native.relaxation_bend(a, lines, bias, pulled, value, torch.get_num_threads())
        return pulled, value
    slope, shift = _met(a, lines)
    torch.mul(a, slope, out=pulled)
    shift = shift if bias is None else shift + slope * bias
    return pulled, (a * shift).sum(2)


def unbent(
    a: Tensor,
    lines: Lines,
    bias: Tensor | None,
    by_pulled: Tensor,
    by_value: Tensor,
    by_a: Tensor | None,
    wants: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`bent`.

    Args:
        a: as there.
        lines: as there.
        bias: as there.
        by_pulled: ``(S, b, N)`` gradient of the coefficients.
        by_value: ``(S, b)`` gradient of the value.
        by_a: where to write the gradient of ``a``, or None; may be ``by_pulled``.
        wants: which of ``a``, the four of the lines and the biases to find.

    Returns:
        Six gradients or None; that of the biases is ``(b, N)``, the share of each image.
    """
    by_pulled, by_value = by_pulled.contiguous(), by_value.contiguous()
    found = [torch.empty_like(lines[0]) if wanted else None for wanted in wants[1:]]
    if _serves(a, (*lines, by_pulled, by_value), bias):
        by_lines, threads = (found[0], found[1], found[2], found[3]), torch.get_num_threads()
        _native.relaxation_unbend(
            a, lines, bias, by_pulled, by_value, by_a, by_lines, found[4], threads
        )
        return by_a, *found
    slope, shift = _met(a, lines)
    by_value = by_value.unsqueeze(2)
    by_bent = by_pulled if bias is None else by_pulled + by_value * bias
    above, below = a.clamp(min=0), a.clamp(max=0)
    for index, signed, by in (
        (0, above, by_bent),
        (1, above, by_value),
        (2, below, by_bent),
        (3, below, by_value),
        (4, a * slope, by_value),
    ):
        if wants[index + 1]:
            found[index] = (signed * by).sum(0)
    if by_a is not None:
        torch.add(by_bent * slope, by_value * shift, out=by_a)
    return by_a, *found


def _serves(a: Tensor, others: tuple[Tensor, ...], bias: Tensor | None) -> bool:
    """Whether the kernel does: dense float32 matrices in plain eager mode on the CPU."""
    tensors = (a, *others) if bias is None else (a, *others, bias)
    plain = all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
    with torch.no_grad():  # gradients are written out by the caller
        return plain and not dispatcher_needed(*tensors)


def _met(a: Tensor, lines: Lines) -> tuple[Tensor, Tensor]:
    """Slope and shift of the line that each coefficient meets."""
    below = a < 0
    return torch.where(below, lines[2], lines[0]), torch.where(below, lines[3], lines[1])
