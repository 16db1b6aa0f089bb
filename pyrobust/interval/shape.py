"""Rules of functions that move elements without computing: both ends move alike, exactly."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrobust.interval.operands import (
    Rule,
    common_dtype,
    ends_of,
    on_ends,
    refuse,
    require_box,
    reshaped,
)
from pyrobust.interval.outward import straight_through
from pyrobust.interval.type import Interval, weakest, wrap
from pyrobust.ops._interval_fallback import round_outward

__all__ = ["RULES", "to_dtype"]

_RESHAPES = (
    *("view", "reshape", "flatten", "permute", "transpose", "swapaxes", "swapdims"),
    *("movedim", "t", "unsqueeze", "squeeze"),
)
_VIEWS = (
    *("unflatten", "expand", "broadcast_to", "chunk", "unfold"),
    *("split", "tensor_split", "unbind", "narrow", "select", "diagonal", "contiguous", "detach"),
)
_MOVES = (
    *("repeat", "repeat_interleave", "tile", "index_select", "gather", "take_along_dim", "clone"),
    *("roll", "flip", "rot90", "tril", "triu", "pixel_shuffle", "pixel_unshuffle"),
    *("channel_shuffle", "cpu", "cuda"),
)


def _joined(tensors: Any) -> tuple[list[Tensor], list[Tensor], str]:
    """The ends of a sequence of boxes and tensors, in one dtype."""
    rounding = weakest(*tensors)
    like = next(t for t in tensors if isinstance(t, Interval))
    dtype = common_dtype(*tensors)
    lows, highs = [], []
    for tensor in tensors:
        exact = isinstance(tensor, Interval) and tensor.dtype == dtype
        low, high = (tensor.lower, tensor.upper) if exact else ends_of(tensor, like, rounding)
        lows.append(low)
        highs.append(high)
    if rounding == "nearest":
        return [t.to(dtype) for t in lows], [t.to(dtype) for t in highs], rounding
    rounded = [_converted(a, b, dtype) for a, b in zip(lows, highs, strict=True)]
    return [a for a, _ in rounded], [b for _, b in rounded], rounding


def _converted(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if low.dtype == high.dtype == dtype:
        return low, high
    with torch.no_grad():
        lower, upper = round_outward(low.detach(), high.detach(), dtype)
    return straight_through(low.to(dtype), lower), straight_through(high.to(dtype), upper)


def _cat(tensors: Any, dim: int = 0, *, out: None = None) -> Interval:
    lows, highs, rounding = _joined(tensors)
    return wrap(torch.cat(lows, dim), torch.cat(highs, dim), rounding)


def _stack(tensors: Any, dim: int = 0, *, out: None = None) -> Interval:
    lows, highs, rounding = _joined(tensors)
    return wrap(torch.stack(lows, dim), torch.stack(highs, dim), rounding)


def _pad(input: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Interval:
    box = require_box(input, "pad")
    if value is not None and float(torch.tensor(value, dtype=box.dtype)) != value:
        raise refuse(f"pad with {value}, which {box.dtype} cannot hold")
    low, high = (F.pad(end, pad, mode, value) for end in (box.lower, box.upper))
    return wrap(low, high, box.rounding)


def _embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Interval:
    """Rows of a box of a table; for sets of tokens see ``Interval.hull``."""
    if not isinstance(weight, Interval) or isinstance(input, Interval):
        raise refuse("embedding with the interval in another argument than weight")
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise refuse("embedding with max_norm, scale_grad_by_freq or sparse")
    low, high = (F.embedding(input, end, padding_idx) for end in (weight.lower, weight.upper))
    return wrap(low, high, weight.rounding)


def _where(condition: Any, input: Any, other: Any) -> Interval:
    if isinstance(condition, Interval) and getattr(input, "dtype", None) == torch.bool:
        condition, input = input, condition  # as the method: x.where(condition, other)
    if isinstance(condition, Interval):
        raise refuse("where with a condition on intervals")
    (low_x, low_y), (high_x, high_y), rounding = _joined([input, other])
    return wrap(
        torch.where(condition, low_x, low_y), torch.where(condition, high_x, high_y), rounding
    )


def _masked_fill(input: Any, mask: Tensor, value: Any) -> Interval:
    return _where(mask, value, input)


def to_dtype(input: Any, *args: Any, **options: Any) -> Interval:
    """Another device or dtype; float64 to float32 rounds outward."""
    box = require_box(input, "to")
    target = box.lower.new_empty(0).to(*args, **options)
    if target.dtype not in (torch.float32, torch.float64):
        raise refuse(f"conversion to {target.dtype}")
    low, high = (end.to(device=target.device) for end in (box.lower, box.upper))
    if target.dtype == box.dtype:
        return wrap(low, high, box.rounding, base=box)
    if box.rounding == "nearest":
        return wrap(low.to(target.dtype), high.to(target.dtype), box.rounding)
    return wrap(*_converted(low, high, target.dtype), box.rounding)


def _like(name: str) -> Rule:
    def rule(input: Any, other: Any) -> Any:
        box = require_box(input, name)
        low, high = (getattr(end, name)(tuple(other.shape)) for end in (box.lower, box.upper))
        return wrap(low, high, box.rounding, base=box)

    return rule


def _method(name: str) -> Any:
    method = getattr(torch, name, None) or getattr(F, name, None)
    return (
        method
        if method is not None and not hasattr(torch.Tensor, name)
        else getattr(torch.Tensor, name)
    )


RULES: dict[str, Rule] = {
    **{name: reshaped(_method(name)) for name in _RESHAPES},
    **{name: on_ends(_method(name), view=True) for name in _VIEWS},
    **{name: on_ends(_method(name)) for name in _MOVES},
    "moveaxis": reshaped(torch.movedim),  # torch.vmap knows movedim only
    # Dynamo does not trace Tensor.unflatten of a plain tensor
    "unflatten": on_ends(
        lambda end, dim, sizes: torch.ops.aten.unflatten.int(end, dim, sizes), view=True
    ),
    "__getitem__": lambda x, index: require_box(x, "indexing")[index],
    "cat": _cat,
    "concat": _cat,
    "concatenate": _cat,
    "stack": _stack,
    "pad": _pad,
    "embedding": _embedding,
    "where": _where,
    "masked_fill": _masked_fill,
    "to": to_dtype,
    "type_as": lambda x, other: to_dtype(x, other.dtype),
    "float": lambda x: to_dtype(x, torch.float32),
    "double": lambda x: to_dtype(x, torch.float64),
    "view_as": _like("view"),
    "reshape_as": _like("reshape"),
    "expand_as": _like("expand"),
}
