"""Single rows of a batch of calibration data: samples of the arguments of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrobust.quantize.calibration import Call

__all__ = ["batch_size", "mixed_call", "rows_of"]


def batch_size(call: Call) -> int:
    """The length of the first tensor among the arguments; 1 without one."""
    return next((len(value) for value in _tensors(call) if value.ndim), 1)


def rows_of(call: Call, rows: Tensor) -> Call:
    """The chosen rows of every tensor that is as long as the batch.

    Args:
        call: the arguments; tensors within tuples and lists count.
        rows: ``(n,)`` int64.
    """
    size = batch_size(call)

    def part(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == size and size > 1:
            return value[rows.to(value.device)]
        return value

    return _mapped(call, part)


def mixed_call(first: Call, second: Call, generator: torch.Generator) -> Call:
    """Each element of every floating-point tensor from either call, at random."""
    others = iter(_tensors(second))

    def mix(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        other = next(others)
        if not value.is_floating_point() or other.shape != value.shape:
            return value
        coin = torch.rand(value.shape, generator=generator).to(value.device) < 0.5
        return torch.where(coin, value, other)

    return _mapped(first, mix)


def _tensors(call: Call) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(value: Any) -> Any:
        if isinstance(value, Tensor):
            found.append(value)
        return value

    _mapped(call, keep)
    return found


def _mapped(call: Call, change: Callable[[Any], Any]) -> Call:
    def walk(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)([walk(each) for each in value])
        return change(value)

    return Call(
        tuple(walk(each) for each in call.args), {k: walk(v) for k, v in call.kwargs.items()}
    )
