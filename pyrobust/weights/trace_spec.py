"""The permutation spec of a model, derived by torch.fx.

One forward pass on an example is interpreted node by node; every value carries, axis by axis, the
units its entries belong to. Layers open new units, additions join them, reshapes into heads and
grouped convolutions narrow them to whole blocks, and whatever is not known to commute with a
reordering pins its units in place: the spec that comes out may be smaller than possible, but it
always preserves the function. What was pinned is listed in ``spec.notes``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from pyrobust.weights._state import check_no_ties
from pyrobust.weights._trace_call import Call, Recorder, pin_all
from pyrobust.weights._trace_functions import function_rule
from pyrobust.weights._trace_modules import module_rule
from pyrobust.weights._unit_classes import Axis
from pyrobust.weights.permutation import AxisRun, PermutationSpec

__all__ = ["trace_spec"]


def trace_spec(model: nn.Module, example: Tensor) -> PermutationSpec:
    """Derive which axes of ``model``'s tensors are reordered together.

    Knows linear, convolution and embedding layers, batch, layer and group norm, residual sums,
    concatenation, pooling, flatten, grouped convolutions (whole groups move) and attention heads
    (whole heads move), both ``nn.MultiheadAttention`` and written out with reshapes.

    Args:
        model: traceable by torch.fx; its training flags and statistics are left as they are.
        example: one input batch.

    Returns:
        A spec that covers every entry of the state dict.

    Raises:
        TypeError: torch.fx cannot trace the model; write a :class:`PermutationSpec` by hand.
        ValueError: weights are tied.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> trace_spec(net, torch.zeros(1, 4)).axes["2.weight"]
        (None, 'P_0')
    """
    check_no_ties("trace_spec", model)
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        try:
            graph = fx.symbolic_trace(model)
        except Exception as error:
            raise TypeError(
                f"trace_spec: torch.fx cannot trace {type(model).__name__} ({error}); "
                "write a PermutationSpec by hand."
            ) from error
        recorder = Recorder(model)
        with torch.no_grad():
            _LayoutInterpreter(graph, recorder).run(example)
    finally:
        for module, training in flags:
            module.training = training
    return _finish(recorder)


class _LayoutInterpreter(fx.Interpreter):
    """Runs the graph and follows the layout of every tensor."""

    def __init__(self, graph: fx.GraphModule, recorder: Recorder) -> None:
        super().__init__(graph)
        self.recorder = recorder
        self.layouts: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        call = Call(
            node=n,
            args=self.map_nodes_to_values(n.args, n),
            kwargs=self.map_nodes_to_values(n.kwargs, n),
            layouts=fx.node.map_arg(n.args, self.layouts.get),
            keyword_layouts=fx.node.map_arg(n.kwargs, self.layouts.get),
            result=result,
        )
        if n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            self.layouts[n] = module_rule(module, str(n.target), call, self.recorder)
        elif n.op in ("call_function", "call_method"):
            self.layouts[n] = function_rule(call, self.recorder)
        elif n.op == "get_attr":
            self.layouts[n] = self.recorder.parameter(str(n.target), result)
        elif n.op == "output":
            pin_all(call, self.recorder, "the output of the model")
        return result


def _finish(recorder: Recorder) -> PermutationSpec:
    names: dict[int, str] = {}
    sizes: dict[str, int] = {}

    def run_of(axis: Axis) -> tuple[AxisRun, ...] | str | None:
        runs = []
        for run in axis:
            root = run.units.root()
            if root.count == 1:
                runs.append(AxisRun(None, run.length))
                continue
            name = names.setdefault(id(root), f"P_{root.name}")
            sizes[name] = root.count
            inner = run.length // (run.outer * root.count)
            runs.append(AxisRun(name, root.count, inner, run.outer))
        if all(run.name is None for run in runs):
            return None
        if len(runs) == 1 and runs[0].length == runs[0].units:
            return runs[0].name
        return tuple(runs)

    axes: dict[str, tuple[str | tuple[AxisRun, ...] | None, ...]] = {}
    for name, value in recorder.model.state_dict().items():
        layout = recorder.tensors.get(name, (None,) * value.ndim)
        axes[name] = tuple(None if axis is None else run_of(axis) for axis in layout)
    return PermutationSpec(axes, sizes, tuple(recorder.notes))
