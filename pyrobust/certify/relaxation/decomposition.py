"""Rewrites a traced model so that composite operations become operations with lines or planes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyrobust.certify.relaxation.compositions.site import Site
from pyrobust.certify.relaxation.compositions.table import FUNCTIONS, MODULES
from pyrobust.nn._hooks import is_customised

__all__ = ["decomposed", "function_name"]


def function_name(node: fx.Node) -> str:
    """The name of the function or method that a node calls, without the mark of in-place forms."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return name.removesuffix("_") if in_place else name


def decomposed(graph: fx.Graph, root: nn.Module, point: Tensor) -> fx.Graph:
    """The graph with every composite operation of the input written out.

    Args:
        graph: of a model with one input.
        root: holds its modules and parameters.
        point: ``(1, ...)`` an input, to know the shapes of values.
    """
    if not any(_rule(node, root) for node in graph.nodes):
        return graph
    try:
        shapes, constants = _shapes(graph, root, point)
    except Exception:  # a model for one size of batch; propagation names what is wrong otherwise
        return graph
    written = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(written)
    new: dict[fx.Node, Any] = {}
    boxes: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            boxes.update([] if boxes else [node])
        elif node in shapes and any(n in boxes for n in node.all_input_nodes):
            boxes.add(node)
        if node in boxes and _write(node, root, shapes, constants, boxes, new, tracer, point.dtype):
            continue
        if not _picked(node, new):
            new[node] = written.node_copy(node, lambda n: new[n])
    return written


def _rule(node: fx.Node, root: nn.Module) -> Callable[..., Any] | None:
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return None if is_customised(module) else MODULES.get(type(module))
    if node.op in ("call_function", "call_method"):
        return FUNCTIONS.get(function_name(node))
    return None


def _write(
    node: fx.Node,
    root: nn.Module,
    shapes: dict[fx.Node, torch.Size | None],
    constants: dict[fx.Node, Tensor],
    boxes: set[fx.Node],
    new: dict[fx.Node, Any],
    tracer: Any,
    dtype: torch.dtype,
) -> bool:
    """Write a node by its rule, if it has one that serves."""
    rule = _rule(node, root)
    if rule is None or any(isinstance(new[n], tuple) for n in node.all_input_nodes):
        return False
    traced: Callable[[fx.Node], Any] = lambda n: fx.Proxy(new[n], tracer)  # noqa: E731
    args: Any = fx.node.map_arg(node.args, traced)
    kwargs: Any = fx.node.map_arg(node.kwargs, traced)
    kwargs = {k: v for k, v in kwargs.items() if k not in ("_stacklevel", "inplace")}
    named = node.kwargs.get("input")
    first = [*node.args, *([] if named is None else [named])]
    known = [shapes.get(a) if isinstance(a, fx.Node) else None for a in first]
    fixed = {
        new[n]: constants[n] for n in node.all_input_nodes if n in constants and n not in boxes
    }
    site = Site(known, [a in boxes for a in first], dtype, str(node.target), tracer, fixed)
    if named is not None:
        args = (kwargs.pop("input"), *args)
    if not first:
        return False
    if node.op == "call_module":
        args = (root.get_submodule(str(node.target)), *args)
    before = len(tracer.graph.nodes)
    result = rule(site, *args, **kwargs)
    if result is None or (isinstance(result, tuple) and not all(map(_is_pick, node.users))):
        for made in reversed(list(tracer.graph.nodes)[before:]):
            tracer.graph.erase_node(made)
        return False
    if isinstance(result, tuple):
        new[node] = tuple(part if part is None else part.node for part in result)
    else:
        new[node] = result.node
    return True


def _is_pick(user: fx.Node) -> bool:
    """Whether a node takes one entry of a tuple, or a named one."""
    if user.target is operator.getitem:
        return isinstance(user.args[1], int)
    return user.target is getattr and user.args[1] == "values"


def _picked(node: fx.Node, new: dict[fx.Node, Any]) -> bool:
    """Resolve an entry of a value that was written as several."""
    if not _is_pick(node) or not isinstance(node.args[0], fx.Node):
        return False
    whole = new[node.args[0]]
    if not isinstance(whole, tuple):
        return False
    index = node.args[1] if isinstance(node.args[1], int) else 0
    new[node] = whole[index]
    return True


@torch.no_grad()
def _shapes(
    graph: fx.Graph, root: nn.Module, point: Tensor
) -> tuple[dict[fx.Node, torch.Size | None], dict[fx.Node, Tensor]]:
    """Of the values that are tensors, None for those that are several; and the constant tensors."""
    constants: dict[fx.Node, Tensor] = {}
    moving: set[str] = set()
    found: dict[fx.Node, torch.Size | None] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "placeholder" or any(m.name in moving for m in n.all_input_nodes):
                moving.add(n.name)
            elif isinstance(value, Tensor):
                constants[originals[n.name]] = value
            if isinstance(value, Tensor):
                found[originals[n.name]] = value.shape
            elif isinstance(value, tuple | list) and n.op != "output":
                found[originals[n.name]] = None
            return value

    originals = {node.name: node for node in graph.nodes}
    Recorder(fx.GraphModule(root, graph)).run(point)
    return found, constants
