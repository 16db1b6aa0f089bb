"""Rounding of activations while a network trains: what the int8 kernels do, with a gradient.

The rule is that of the kernels (``csrc/core/activation_int8.h``), to the bit: the step of a row is
its largest magnitude over ``2**(bits - 1) - 1`` in float64, an element becomes the nearest multiple
of it (half to even). A row of zeros stays zero; a row with a NaN or an infinity becomes NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrobust._checks import check_float_tensor, check_integer

__all__ = ["fake_quantize_activation", "quantize_activation"]


def quantize_activation(x: Tensor, *, bits: int = 8, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Round ``x`` to signed integers with one step for each row along ``dim``.

    Args:
        x: floating point, any shape with at least one axis.
        bits: 2 to 8.
        dim: the axis that shares a step.

    Returns:
        int8 codes of the shape of ``x`` in ``[-(2**(bits - 1) - 1), 2**(bits - 1) - 1]``, and the
        float64 steps, of that shape with 1 on ``dim``. ``codes * step`` is within half a step of
        ``x``.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: ``bits`` is not in 2 to 8, or ``x`` has no axis.

    Example:
        >>> codes, step = quantize_activation(torch.tensor([[-2.0, 0.5, 1.0]]))
        >>> codes, round(float(step), 6)
        (tensor([[-127,   32,   64]], dtype=torch.int8), 0.015748)
    """
    _check("quantize_activation", x, bits)
    codes, step = _rounded(x, bits, dim)
    return codes.to(torch.int8), step


def fake_quantize_activation(x: Tensor, *, bits: int = 8, dim: int = -1) -> Tensor:
    """Round ``x`` to ``bits`` along ``dim`` and back; the gradient passes as if nothing happened.

    Args:
        x: floating point, any shape with at least one axis.
        bits: 2 to 8.
        dim: the axis that shares a step.

    Returns:
        ``codes * step`` of :func:`quantize_activation`, in the dtype of ``x``. Straight-through:
        its gradient with respect to ``x`` is the identity.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: ``bits`` is not in 2 to 8, or ``x`` has no axis.
    """
    _check("fake_quantize_activation", x, bits)
    result: Tensor = _StraightThrough.apply(x, bits, dim)  # type: ignore[no-untyped-call]
    return result


def _check(subject: str, x: Tensor, bits: int) -> None:
    check_float_tensor(subject, "x", x)
    check_integer(subject, "bits", bits, 2)
    if bits > 8:
        raise ValueError(f"{subject}: bits must be at most 8; got {bits}.")
    if x.ndim == 0:
        raise ValueError(f"{subject}: x must have at least one axis; got a scalar.")


def _rounded(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Codes and steps, both float64."""
    wide = x.detach().double()
    if wide.shape[dim] == 0:
        return wide, wide.sum(dim, keepdim=True)
    largest = wide.abs().amax(dim, keepdim=True)
    step = torch.where(largest.isfinite(), largest, torch.nan) / (2 ** (bits - 1) - 1)
    codes = torch.round(wide / torch.where(step > 0, step, 1.0))
    return torch.where(step > 0, codes, 0.0), step


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, dim: int) -> Tensor:
        codes, step = _rounded(x, bits, dim)
        return (codes * step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None
