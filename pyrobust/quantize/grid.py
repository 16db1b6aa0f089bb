"""Grids of groups of weights: the scale and zero-point that cover a group, its nearest codes."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrobust.quantize.qtensor import round_scale

__all__ = ["covering_grid", "divisor", "nearest_codes", "split_groups", "store_scale"]

_HALF_SMALLEST, _HALF_LARGEST = 2.0**-14, 65504 / 2  # float16 is precise between these


def split_groups(weight: Tensor, group_size: int) -> Tensor:
    """``(lines, length)`` as ``(lines, groups, group_size)``; the last group ends in zeros."""
    missing = -weight.shape[1] % group_size
    padded = torch.nn.functional.pad(weight, (0, missing))
    return padded.reshape(weight.shape[0], padded.shape[1] // group_size, group_size)


def store_scale(scale: Tensor, *, up: bool) -> Tensor:
    """float16 where its normal range holds every scale, else float32 with 15 significant bits.

    Args:
        scale: float64 or float32, ``>= 0``.
        up: round up instead of to the nearest; a scale that is stored already stays as it is.
    """
    used = scale[scale > 0]
    if used.numel() and (float(used.min()) < _HALF_SMALLEST or float(used.max()) > _HALF_LARGEST):
        single = scale.float()
        return round_scale(_next_up(single, scale) if up else single, up=up)
    half = scale.half()
    return _next_up(half, scale) if up else half


def _next_up(rounded: Tensor, scale: Tensor) -> Tensor:
    """``rounded``, or its next number above where it is below ``scale``.

    Beyond rounding errors of the float64 computation: 2^-40 of the scale moves no weight.
    """
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.double() < scale.double() * (1 - 2.0**-40), above, rounded)


def covering_grid(grouped: Tensor, levels: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The smallest grid that holds 0 and covers each group up to half a step.

    A group whose weights lie on such a grid already keeps it, so that quantizing twice changes
    nothing: rounding the scale up leaves some groups one level short, and these are recognised.

    Args:
        grouped: ``(lines, groups, group_size)`` floating point.
        levels: code values, 4 or more.
        symmetric: fix the zero-point in the middle.

    Returns:
        Stored scale and uint8 zero-point, ``(lines, groups)`` each.
    """
    low = grouped.amin(2).double().clamp(max=0)
    high = grouped.amax(2).double().clamp(min=0)
    if symmetric:
        scale = store_scale(torch.maximum(high / (levels // 2 - 1), -low / (levels // 2)), up=True)
        return scale, torch.full_like(scale, levels // 2, dtype=torch.uint8)
    scale = store_scale((high - low) / (levels - 1), up=True)
    scale = _keep_shorter_grid(grouped, scale, low, high, levels)
    zero = torch.round(-low / divisor(scale.double())).clamp(0, levels - 1)
    return scale, zero.to(torch.uint8)


def _keep_shorter_grid(
    grouped: Tensor, scale: Tensor, low: Tensor, high: Tensor, levels: int
) -> Tensor:
    """The scale of a grid of one level less, where all weights of a group lie exactly on it."""
    shorter = store_scale((high - low) / (levels - 2), up=True).to(scale.dtype)
    step = divisor(shorter.to(grouped.dtype))[..., None]
    exact = (torch.round(grouped / step) * step == grouped).all(2)
    return torch.where(exact & (shorter > 0) & torch.isfinite(shorter), shorter, scale)


def divisor(scale: Tensor) -> Tensor:
    """``scale``, or 1 where it is 0 (a group of zeros)."""
    return torch.where(scale > 0, scale, 1.0)


def nearest_codes(grouped: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """uint8 codes of the nearest grid points; ``scale`` and ``zero`` without the last axis."""
    steps = torch.round(grouped / divisor(scale)[..., None])
    return (steps + zero[..., None].to(steps)).clamp(0, levels - 1).to(torch.uint8)
