"""ONNX files as torch modules that can be packed, bounded and smoothed.

The operators of sequential and residual networks are read into a ``torch.fx.GraphModule``: matrix
products, convolutions and normalisations become ``torch.nn`` layers (so that
:func:`pyrobust.pack` and the bounding methods know them), the rest torch functions. Nodes of
constants alone are evaluated at once.

Source: the ONNX operator specifications, https://onnx.ai, operator sets 9 to 22.
Departures: the batch stays free where the file fixes it to 1 (``Reshape`` keeps the first axis).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyrobust._checks import require_extra
from pyrobust.certify.onnx_operators import OPERATORS
from pyrobust.certify.onnx_shapes import Unsupported, leaves

__all__ = ["load_onnx"]


def load_onnx(path: str | Path) -> nn.Module:
    """Read an ONNX network of one input and one output.

    Args:
        path: the ``.onnx`` file; needs the ``onnx`` package. Weights may lie in files beside it,
            as torch's exporter leaves them.

    Returns:
        A module in evaluation mode, float32, batch first; ``module.input_shape`` is the shape of
        one input without the batch, where the file says it.

    Raises:
        ImportError: ``onnx`` is not installed.
        ValueError: the file is no ONNX model, has several inputs or outputs, or uses an operator or
            an option that is not supported (named).
        OSError: the file cannot be read.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise require_extra("load_onnx", "onnx", "onnx") from error
    with open(path, "rb"):  # a missing file keeps its own error
        pass
    try:
        proto = onnx.load(str(path), format="protobuf")  # with weights that lie in files beside it
        onnx.checker.check_model(proto)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"load_onnx: {path} is not a valid ONNX model: {reason}") from error
    constants = {
        t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in proto.graph.initializer
    }
    inputs = [v for v in proto.graph.input if v.name not in constants]
    if len(inputs) != 1 or len(proto.graph.output) != 1:
        raise ValueError(
            f"load_onnx: the model must have one input and one output; {path} has {len(inputs)} "
            f"and {len(proto.graph.output)}."
        )
    reader = Reader(constants, onnx.helper.get_attribute_value, _shapes(proto), _opset(proto))
    reader.begin(inputs[0].name)
    for node in proto.graph.node:
        reader.read(node)
    module = reader.finish(proto.graph.output[0].name)
    sizes = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim]
    module.input_shape = tuple(sizes[1:]) if all(sizes[1:]) else None  # type: ignore[assignment]
    return module


def _shapes(proto: Any) -> dict[str, tuple[int, ...]]:
    """Sizes of each value by ONNX's own shape inference, 0 where one is not fixed."""
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(proto).graph
    known = [*graph.value_info, *graph.input, *graph.output]
    return {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in known}


def _opset(proto: Any) -> int:
    """Version of ONNX's own operators."""
    return next((int(o.version) for o in proto.opset_import if o.domain in ("", "ai.onnx")), 1)


class Reader:
    """Builds the graph; values are fx nodes, or tensors where they are constant.

    Attributes:
        shape: sizes of the current node's first input, 0 where not fixed; empty where unknown.
        opset: version of the operator set.
    """

    def __init__(
        self,
        constants: dict[str, Tensor],
        attribute: Callable[[Any], Any],
        shapes: dict[str, tuple[int, ...]],
        opset: int,
    ) -> None:
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[str, Any] = dict(constants)
        self.values[""] = None
        self.attribute = attribute
        self.shapes = shapes
        self.opset = opset
        self.layers = 0
        self.shape: tuple[int, ...] = ()

    def begin(self, name: str) -> None:
        """The network's input."""
        self.values[name] = self.graph.placeholder("x")

    def read(self, node: Any) -> None:
        """Translate one ONNX node."""
        own = node.domain in ("", "ai.onnx")
        make = OPERATORS.get(node.op_type) if own else None
        where = f"(node {node.name or node.output[0]!r})"
        if make is None:
            kind = node.op_type if own else f"{node.domain}.{node.op_type}"
            raise ValueError(
                f"load_onnx: operator {kind} {where} is not supported; supported are "
                f"{', '.join(sorted(OPERATORS))}."
            )
        options = {a.name: self.attribute(a) for a in node.attribute}
        missing = [name for name in node.input if name not in self.values]
        if missing:
            raise ValueError(
                f"load_onnx: {node.op_type} {where} takes {missing[0]!r}, the second output of an "
                "operator of which only the first is supported."
            )
        inputs = [self.values[name] for name in node.input]
        self.shape = self.shapes.get(node.input[0], ()) if node.input else ()
        try:
            value = make(self, inputs, options)
        except Unsupported as reason:
            raise ValueError(f"load_onnx: {node.op_type} {where}: {reason}.") from None
        if isinstance(value, list):
            self.values.update(zip(node.output, value, strict=True))
        else:
            self.values[node.output[0]] = value

    def finish(self, name: str) -> fx.GraphModule:
        """The module whose output is the value ``name``."""
        value = self.values[name]
        if not isinstance(value, fx.Node):
            raise ValueError("load_onnx: the output does not depend on the input.")
        self.graph.output(value)
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph).eval()

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """A call of a torch function, at once where every argument is constant."""
        if not any(isinstance(a, fx.Node) for a in leaves(args)):
            return function(*args, **options)
        return self.graph.call_function(function, self._held(args), options)

    def method(self, name: str, *args: Any) -> Any:
        """A call of a tensor method on a value that is not constant."""
        return self.graph.call_method(name, args)

    def layer(self, module: nn.Module, value: Any) -> fx.Node:
        """A call of a module of the network's own."""
        name = f"layer_{self.layers}"
        self.layers += 1
        self.root.add_module(name, module)
        return self.graph.call_module(name, (value,))

    def _held(self, args: Any) -> Any:
        """Constants among the arguments as buffers."""
        if isinstance(args, tuple | list):
            return type(args)(self._held(a) for a in args)
        if not isinstance(args, Tensor):
            return args
        name = f"constant_{self.layers}"
        self.layers += 1
        self.root.register_buffer(name, args)
        return self.graph.get_attr(name)
