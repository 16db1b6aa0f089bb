"""Straight-through: the numbers of one tensor, the gradient of another.

Rounding has no useful gradient. Training that simulates it therefore computes with rounded numbers
and hands their gradient to the unrounded ones, whole or where a mask allows it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["straight_through"]


def straight_through(value: Tensor, source: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """``value`` to the last bit; its gradient goes to ``source`` unchanged.

    (The usual ``source + (value - source).detach()`` rounds, so that a level that stands for a
    stored code is no longer that level.)

    Args:
        value: any floating-point tensor; receives no gradient.
        source: of the same shape; its dtype may differ.
        mask: boolean, of the same shape: the gradient is 0 where it is False.

    Raises:
        ValueError: the shapes differ.
    """
    if value.shape != source.shape or (mask is not None and mask.shape != source.shape):
        raise ValueError(
            "straight_through: value, source and mask must have one shape; got "
            f"{tuple(value.shape)} and {tuple(source.shape)}."
        )
    result: Tensor = _StraightThrough.apply(value.detach(), source, mask)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, source, mask = inputs
        ctx.dtype = source.dtype
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        grad = gradients[0].to(ctx.dtype)
        return None, grad if mask is None else torch.where(mask, grad, 0), None
