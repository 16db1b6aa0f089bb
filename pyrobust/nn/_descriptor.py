"""What a state dict tells about the format of a packed layer: a row of integers.

All of it must agree for codes to mean the same weight, but for ``activations``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyrobust.quantize.qtensor import WeightLayout

__all__ = ["ACTIVATIONS", "describe", "read_descriptor"]

ACTIVATIONS = (None, "int8")
"""The accepted values, in the order of their numbers."""

# 2 also tells the layout, 3 also how a layer with its own storage stores it.
_PLAIN_VERSION, _LAYOUT_VERSION, _STORAGE_VERSION = 1, 2, 3


def describe(
    *,
    kind: int,
    bits: float,
    group_size: int,
    group_dim: int,
    symmetric: bool,
    activations: str | None,
    layout: WeightLayout,
    storage: Sequence[int],
    weight_shape: Sequence[int],
) -> list[int]:
    """Version, kind, bits (in hundredths) and so on, in the order of the arguments."""
    plain = layout == WeightLayout()
    version = _PLAIN_VERSION if plain else _LAYOUT_VERSION
    row = [_STORAGE_VERSION if storage else version, kind, round(100 * bits), group_size, group_dim]
    row += [int(symmetric), ACTIVATIONS.index(activations)]
    if not plain or storage:
        row += [int(value) for value in layout]
    if storage:
        row += [len(storage), *storage]
    return [*row, *weight_shape]


def read_descriptor(values: list[Any]) -> dict[str, Any]:
    """A description as options: kind, weight_shape, bits and so on.

    Raises:
        ValueError: ``values`` is not a description of a known version.
    """
    versions = (_PLAIN_VERSION, _LAYOUT_VERSION, _STORAGE_VERSION)
    integers = all(isinstance(value, int) for value in values)
    if not integers or len(values) < 9 or values[0] not in versions or values[6] not in (0, 1):
        raise _unknown(values)
    layout: dict[str, Any] = {}
    if values[0] != _PLAIN_VERSION:
        if len(values) < 12 or any(value not in (0, 1) for value in values[7:9]):
            raise _unknown(values)
        two_level, codebook, nonzeros = values[7:10]
        layout = {"layout": [bool(two_level), bool(codebook), nonzeros]}
        rest = values[10:]
        if values[0] == _STORAGE_VERSION:
            layout["storage"], rest = rest[1 : 1 + rest[0]], rest[1 + rest[0] :]
        values = values[:7] + rest
    kind, bits, group_size, group_dim, symmetric, activations = values[1:7]
    return {
        "kind": kind,
        "weight_shape": tuple(values[7:]),
        "bits": bits / 100 if bits % 100 else bits // 100,
        "group_size": group_size,
        "group_dim": group_dim,
        "symmetric": bool(symmetric),
        "activations": ACTIVATIONS[activations],
        **layout,
    }


def _unknown(values: list[Any]) -> ValueError:
    return ValueError(f"PackedModule: unknown description of a packed weight, {values}.")
