"""Constant masks of attention: which keys count, and what is added to their scores."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrobust.certify.relaxation.compositions.site import Site

__all__ = ["Mask", "mask_of", "merged_mask"]


class Mask(NamedTuple):
    """Proxies of two constant tensors that broadcast with the scores.

    Attributes:
        keep: bool, the keys that count, with the axis of the keys in full.
        added: finite numbers, or None.
        whole: as attention takes it.
    """

    keep: Any
    added: Any
    whole: Any


def mask_of(site: Site, mask: Any, keys: int) -> Mask | None:
    """A mask of ``scaled_dot_product_attention``; True in a bool one lets a key count.

    None where it is no constant, or leaves a query without a key.
    """
    value = site.constant(mask)
    return None if value is None else _sorted(mask, value, keys)


def merged_mask(site: Site, attention: Any, padding: Any, heads: int, keys: int) -> Mask | None:
    """The masks of ``nn.MultiheadAttention``; True in a bool one forbids a key.

    None where one is no constant, or a query is left without a key.
    """
    values = [site.constant(m) for m in (attention, padding) if m is not None]
    if any(value is None for value in values):
        return None
    known = iter(values)
    both = [next(known) if m is not None else None for m in (attention, padding)]
    floats = any(v is not None and v.is_floating_point() for v in both)
    shapes = [None if v is None else v.shape for v in both]
    dtypes = [None if v is None else v.dtype for v in both]

    def merged(first: Any, second: Any) -> Any:
        parts = []
        if first is not None:
            parts.append(first.unflatten(0, (-1, heads)) if len(shapes[0]) == 3 else first)  # type: ignore[arg-type]
        if second is not None:
            parts.append(second.unsqueeze(-2).unsqueeze(-2))
        kinds = [kind for kind in dtypes if kind is not None]
        if floats:
            parts = [
                _additive(p) if k == torch.bool else p for p, k in zip(parts, kinds, strict=True)
            ]
            return parts[0] if len(parts) == 1 else parts[0] + parts[1]
        forbidden = parts[0] if len(parts) == 1 else parts[0] | parts[1]
        return torch.logical_not(forbidden)

    return _sorted(merged(attention, padding), merged(*both), keys)


def _additive(forbidden: Any) -> Any:
    return torch.where(forbidden, -math.inf, 0.0)


def _sorted(proxy: Any, value: Tensor, keys: int) -> Mask | None:
    floats = value.is_floating_point()
    keep = value > -math.inf if floats else value
    if not bool(keep.any(-1).all()) or (floats and not bool((value < math.inf).all())):
        return None
    kept = torch.gt(proxy, -math.inf) if floats else proxy
    added = torch.where(kept, proxy, 0.0) if floats else None
    if value.shape[-1] != keys:
        kept = kept.expand(*value.shape[:-1], keys)
    return Mask(kept, added, proxy)
