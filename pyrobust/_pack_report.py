"""What ``pyrobust.pack`` did to a model: one row per layer, totals, and how to read them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

__all__ = ["LayerReport", "PackReport", "pack_report"]

_HEADS = ("name", "type")
_ATTRIBUTE = "_pyrobust_pack_report"


@dataclass(frozen=True)
class LayerReport:
    """One layer with a weight of two or more axes.

    Attributes:
        name: its (first) name in the model; "" for the model itself.
        type: class name of the float layer.
        skipped: why it was left as it is; None where it was packed.
        bits: format, None where skipped.
        bytes_before: bytes of the weight as it was; 0 for a shared weight.
        bytes_after: bytes of codes, scales, zero-points and all else that stands for the weight;
            0 for a shared weight.
        error: Frobenius norm of the change of the weight over that of the weight; None if skipped.
        shared_with: name of the layer that holds the same packed weight, or None.
        group_dim: 1, groups along input features; 0, along output features; None if skipped.
        output_error_nearest: root mean square change of the layer's output on the calibration data
            over that of the output, had its weight been rounded to nearest in the format asked for;
            None where the quantizer did not measure it.
        output_error: the same for the weight as it is packed.
    """

    name: str
    type: str
    skipped: str | None
    bits: float | None
    bytes_before: int
    bytes_after: int
    error: float | None
    shared_with: str | None = None
    group_dim: int | None = None
    output_error_nearest: float | None = None
    output_error: float | None = None


@dataclass(frozen=True)
class PackReport:
    """All layers that were looked at, and the size of the whole model.

    Attributes:
        layers: one row per layer with a weight, in the order of the model.
        bytes_before: bytes of all parameters and buffers of the float model, shared ones once.
        bytes_after: the same of the packed model.
    """

    layers: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int

    @property
    def packed(self) -> tuple[LayerReport, ...]:
        """The rows of the layers that were packed."""
        return tuple(row for row in self.layers if row.skipped is None)

    @property
    def skipped(self) -> tuple[LayerReport, ...]:
        """The rows of the layers that were left as they are."""
        return tuple(row for row in self.layers if row.skipped is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """A table for people: one line per layer, then the totals."""
        name, kind = (max(len(h), *(len(getattr(r, h)) for r in self.layers)) for h in _HEADS)
        heads = f"{'name':<{name}}  {'type':<{kind}} {'bits':>5} {'bytes':>22} {'error':>8}"
        measured = any(row.output_error is not None for row in self.layers)
        lines = [heads + ("  groups  output error: nearest -> this" if measured else "")]
        lines += [f"{row.name:<{name}}  {row.type:<{kind}} {_result(row)}" for row in self.layers]
        ratio = self.bytes_before / max(1, self.bytes_after)
        lines.append(
            f"{len(self.packed)} packed, {len(self.skipped)} skipped; whole model "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes ({ratio:.2f} times smaller)"
        )
        return "\n".join(lines)

    __str__ = summary


def _result(row: LayerReport) -> str:
    """The right half of a line of the table."""
    if row.skipped is not None:
        return f"skipped: {row.skipped}"
    if row.shared_with is not None:
        return f"{row.bits:>5g} shares the packed weight of {row.shared_with}"
    sizes = f"{row.bytes_before:,} -> {row.bytes_after:,}"
    text = f"{row.bits:>5g} {sizes:>22} {row.error:>8.4f}"
    if row.output_error is None or row.output_error_nearest is None:
        return text
    groups = "per input" if row.group_dim == 0 else "per output"
    return f"{text}  {groups:<10}  {row.output_error_nearest:.4f} -> {row.output_error:.4f}"


def pack_report(model: nn.Module) -> PackReport:
    """The report of the call of :func:`pyrobust.pack` that made ``model``.

    It is an attribute of the model, so copies, pickles and compiled forms of the model have it too.

    Args:
        model: a result of :func:`pyrobust.pack`.

    Raises:
        ValueError: ``model`` was not made by :func:`pyrobust.pack`.
    """
    report = getattr(model, _ATTRIBUTE, None)
    if not isinstance(report, PackReport):
        raise ValueError(
            f"pack_report: model must be a result of pyrobust.pack; got {type(model).__name__} "
            "without a report."
        )
    return report


def attach(model: nn.Module, report: PackReport) -> None:
    """Keep ``report`` on ``model``."""
    setattr(model, _ATTRIBUTE, report)
