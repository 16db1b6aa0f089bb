"""What torch must be told about boxes: they hold two tensors, and files may hold boxes.

``torch.utils._pytree`` is how ``torch.vmap``, ``torch.func``, ``torch.export`` and wrappers such as
``DistributedDataParallel`` find the tensors in what a function takes and gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree

from pyrobust.interval.type import Interval, hold

__all__ = ["register_with_torch"]

_NAMES = "lower", "upper"


def _parts(box: Interval) -> tuple[list[Any], str]:
    return [box.lower, box.upper], box.rounding


def _parts_with_keys(box: Interval) -> tuple[list[tuple[Any, Any]], str]:
    keys = (_pytree.GetAttrKey(name) for name in _NAMES)
    parts, rounding = _parts(box)
    return list(zip(keys, parts, strict=True)), rounding


def _joined(parts: Iterable[Any], rounding: str) -> Interval:
    """A box of anything: torch puts positions, axes and flags in place of the tensors, too."""
    lower, upper = parts
    box = Interval.__new__(Interval)
    box._memory, box._seen = [0], 0
    hold(box, lower, upper, rounding)
    return box


def register_with_torch() -> None:
    """Let torch take boxes apart, and read them from files with ``weights_only=True``."""
    _pytree.register_pytree_node(
        Interval,
        _parts,
        _joined,
        serialized_type_name="pyrobust.Interval",
        flatten_with_keys_fn=_parts_with_keys,
    )
    if hasattr(torch.serialization, "add_safe_globals"):  # torch >= 2.5
        torch.serialization.add_safe_globals([Interval])
