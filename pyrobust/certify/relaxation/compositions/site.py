"""Where a composite operation is written out, and calls of our own functions there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["Rule", "Site", "emit"]

Rule = Callable[..., Any]


class Site:
    """Where a rule is applied.

    Attributes:
        shapes: of the arguments that are tensors, by position; None for others.
        boxes: whether each argument depends on the input.
        dtype: of the box.
        path: of the module, for its parameters.
        tracer: of the graph that is written.
        fixed: the tensors among the arguments that do not depend on the input, by their node.
    """

    def __init__(
        self,
        shapes: list[Any],
        boxes: list[bool],
        dtype: torch.dtype,
        path: str,
        tracer: Any,
        fixed: dict[fx.Node, Tensor] | None = None,
    ):
        self.shapes, self.boxes, self.dtype = shapes, boxes, dtype
        self.path, self.tracer, self.fixed = path, tracer, fixed or {}

    def constant(self, proxy: Any) -> Tensor | None:
        """The value of an argument that is a constant tensor, else None."""
        return self.fixed.get(proxy.node) if isinstance(proxy, fx.Proxy) else None

    def at(self, name: str, shapes: list[Any] | None = None) -> Site:
        """The same for a part of the module, or for arguments of other shapes."""
        path = f"{self.path}.{name}" if name else self.path
        shapes = self.shapes if shapes is None else shapes
        return Site(shapes, [True] * len(shapes), self.dtype, path, self.tracer, self.fixed)

    def parameter(self, module: nn.Module, name: str) -> Any:
        """A parameter of the module, or None where it has none."""
        if getattr(module, name, None) is None:
            return None
        return self.tracer.create_proxy("get_attr", f"{self.path}.{name}", (), {})

    def call(self, name: str, x: Any) -> Any:
        """A part of the module, applied."""
        return self.tracer.create_proxy("call_module", f"{self.path}.{name}", (x,), {})


def emit(function: Callable[..., Any], x: Any, *args: Any) -> Any:
    """A call of one of our own functions."""
    return x.tracer.create_proxy("call_function", function, (x, *args), {})
