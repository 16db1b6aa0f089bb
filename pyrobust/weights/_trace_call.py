"""What a tracing rule sees of one node, and where it records the axes of the model's tensors.

A layout has one entry per tensor axis: None (in place) or the runs of units along it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from pyrobust.weights._unit_classes import Axis, Run, UnitClass, join, pin

__all__ = ["Call", "Layout", "Recorder", "pin_all"]

Layout = tuple[Axis | None, ...]


@dataclass
class Call:
    """One node with the values and layouts of its operands."""

    node: fx.Node
    args: Any
    kwargs: Any
    layouts: Any
    keyword_layouts: Any
    result: Any

    def layout(self, position: int, value: Any) -> Layout:
        """Layout of a positional operand; all in place where it has none."""
        known = self.layouts[position] if position < len(self.layouts) else None
        if isinstance(known, tuple) and isinstance(value, Tensor) and len(known) == value.ndim:
            return known
        return (None,) * (value.ndim if isinstance(value, Tensor) else 0)

    @property
    def free(self) -> Layout:
        """The layout of a result whose axes all stay in place."""
        return (None,) * (self.result.ndim if isinstance(self.result, Tensor) else 0)

    def argument(self, position: int, name: str, default: Any) -> Any:
        """An argument given by position or by name."""
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[position] if position < len(self.args) else default


class Recorder:
    """Collects the layout of every tensor of the model; two uses of one tensor are joined."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        self.tensors: dict[str, Layout] = {}
        self.notes: list[str] = []

    def tensor(self, name: str, *axes: Axis | None) -> None:
        """Note the axes of one state-dict entry, if it exists."""
        if name not in self.shapes:
            for axis in axes:
                if name.endswith("weight"):
                    pin(axis)
            return
        before = self.tensors.get(name)
        if before is None:
            self.tensors[name] = axes
        else:
            self.tensors[name] = tuple(join(a, b) for a, b in zip(before, axes, strict=True))

    def parameter(self, name: str, value: Any) -> Layout | None:
        """A parameter used directly: every axis may follow the units it is combined with."""
        if not isinstance(value, Tensor):
            return None
        if name not in self.shapes:
            return (None,) * value.ndim
        known = self.tensors.get(name)
        if known is None:
            known = tuple(
                (Run(UnitClass(size, name), size),) if size > 1 else None for size in value.shape
            )
            self.tensors[name] = known
        return known

    def units(self, name: str, size: int) -> Axis:
        """The new units that a layer's output opens."""
        return (Run(UnitClass(size, name), size),)


def pin_all(call: Call, recorder: Recorder, reason: str) -> Layout:
    """Keep everything that enters a node in place."""

    def walk(entry: Any) -> None:
        if isinstance(entry, Run):
            if entry.count > 1 and reason != "the output of the model":
                recorder.notes.append(f"{entry.units.root().name} stays in place: {reason}")
            pin((entry,))
        elif isinstance(entry, dict):
            walk(list(entry.values()))
        elif isinstance(entry, (tuple, list)):
            for part in entry:
                walk(part)

    walk(call.layouts)
    walk(call.keyword_layouts)
    return call.free
