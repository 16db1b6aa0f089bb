"""Softmax, its logarithm, softmin and log-sum-exp by the log-sum-exp of the other elements."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from pyrobust.certify.relaxation.compositions.parts import meet
from pyrobust.certify.relaxation.compositions.site import Site, emit
from pyrobust.certify.relaxation.log_sums import log_sum_of_others

__all__ = ["log_softmax", "log_sum_exp", "masked_soft", "soft", "softmax", "softmin"]


def _inner(shape: torch.Size, dim: int | None) -> bool:
    """Whether ``dim`` is not the batch and has more than one element."""
    return dim is not None and dim % len(shape) != 0 and shape[dim] > 1


def _serves(site: Site, dim: Any, rest: tuple[Any, ...], dtype: Any) -> bool:
    return dtype is None and not rest and _inner(site.shapes[0], dim)


def softmax(site: Site, x: Any, dim: Any = None, *rest: Any, dtype: Any = None) -> Any:
    """Softmax along an axis of more than one element."""
    return soft(x, dim) if _serves(site, dim, rest, dtype) else None


def soft(x: Any, dim: int) -> Any:
    """The sigmoid of what an element has over the log-sum-exp of the others."""
    parts = torch.sigmoid(x - emit(log_sum_of_others, x, dim))
    return emit(meet, parts, F.softmax(x, dim))


def masked_soft(x: Any, keep: Any) -> Any:
    """Softmax over the last axis of the elements that are kept, where there are some."""
    alone = keep & (keep.sum(-1, keepdim=True) == 1)
    others = (keep & ~alone).to(torch.float32)
    parts = torch.sigmoid(x - emit(log_sum_of_others, x, -1, keep))
    return parts * others + alone.to(torch.float32)


def log_softmax(site: Site, x: Any, dim: Any = None, *rest: Any, dtype: Any = None) -> Any:
    """The logarithm of the sigmoid."""
    if not _serves(site, dim, rest, dtype):
        return None
    parts = F.logsigmoid(x - emit(log_sum_of_others, x, dim))
    return emit(meet, parts, F.log_softmax(x, dim))


def softmin(site: Site, x: Any, dim: Any = None, *rest: Any, dtype: Any = None) -> Any:
    """Softmax of the negative."""
    return soft(-x, dim) if _serves(site, dim, rest, dtype) else None


def log_sum_exp(site: Site, x: Any, dim: Any, keepdim: bool = False) -> Any:
    """Of one axis, which is kept and has planes; several become one first."""
    rank = len(site.shapes[0])
    axes = sorted({d % rank for d in ([dim] if isinstance(dim, int) else dim)})
    if not axes or axes[0] == 0 or (len(axes) == 1 and keepdim and isinstance(dim, int)):
        return None
    if len(axes) > 1:
        others = [d for d in range(rank) if d not in axes]
        x = x.permute(*others, *axes).flatten(len(others))
        whole = torch.logsumexp(x, -1, True).squeeze(-1)
    else:
        whole = torch.logsumexp(x, axes[0], True).squeeze(axes[0])
    for axis in axes if keepdim else []:
        whole = whole.unsqueeze(axis)
    return whole
