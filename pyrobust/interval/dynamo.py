"""What ``torch.compile`` must be told to trace boxes whole: three gaps of Dynamo (torch 2.13).

1. It hands a torch function to a box only if ``torch.overrides`` lists the function as overridable.
   ``F.tanh`` and ``F.sigmoid`` are missing there, since they call a method of their argument, and
   ``F.hardswish``, ``F.hardsigmoid`` and forms in place such as ``torch.relu_`` although they ask
   for overrides: :func:`list_as_overridable`.
2. An operator between a box and a tensor arrives with the tensor first and without saying which
   side it stood on or whether it was in place (``_handle_insert_op_in_graph`` in
   ``torch/_dynamo/variables/builtin.py``): :func:`swapped_operator` asks that very function, whose
   call is on the stack of the tracer.
3. That file has a function for every operator of two objects (``call_add``, ``call_sub``, ...) but
   for ``@``: :func:`trace_matrix_products` adds the two that are missing, for boxes alone.

Nothing that Dynamo has is changed, and a version with functions of its own for ``@`` keeps them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import Any

import torch

__all__ = ["UNKNOWN", "list_as_overridable", "swapped_operator", "trace_matrix_products"]

UNKNOWN = "?"
_OPERATORS_OF_DYNAMO = "torch._dynamo.variables.builtin"


def list_as_overridable(functions: Iterable[Callable[..., Any]]) -> None:
    """Add those of ``torch`` and ``torch.nn.functional`` to torch's list of overridable functions.

    Dynamo then traces the override, as eager mode calls it; without it, the graph breaks.
    """
    listed = torch.overrides.get_overridable_functions()
    for function in functions:
        for space in (torch, torch.nn.functional):
            name = getattr(function, "__name__", "")
            if getattr(space, name, None) is function and function not in listed[space]:
                listed[space].append(function)


def swapped_operator() -> str:
    """The operator (``"add"``, ``"iadd"``, ...) whose operands Dynamo exchanged on its way here.

    Runs while Dynamo traces, not in the traced code, where its answer is a constant: an empty
    string where nothing was exchanged, :data:`UNKNOWN` where Dynamo is not built as expected.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "dispatch_torch_function":
        frame = frame.f_back
    caller = None if frame is None else frame.f_back
    if caller is None:
        return UNKNOWN
    if caller.f_code.co_name in ("call_function", "call_method"):
        return ""
    operator = getattr(caller.f_locals.get("self"), "fn", None)
    if caller.f_code.co_name != "_handle_insert_op_in_graph" or operator is None:
        return UNKNOWN
    return operator.__name__ if "tmp" in caller.f_locals else ""


# torch.compiler.assume_constant_result sets this and imports Dynamo, which takes two seconds
swapped_operator._dynamo_marked_constant = True  # type: ignore[attr-defined]


def trace_matrix_products(kind: type) -> None:
    """Let Dynamo trace ``@`` and ``@=`` of two objects where one is a ``kind``.

    Happens when Dynamo is imported, which takes two seconds and is left to ``torch.compile``.
    """

    def add(module: ModuleType) -> None:
        known = getattr(module, "BuiltinVariable", None)
        for name, forward in (("call_matmul", "__matmul__"), ("call_imatmul", "__imatmul__")):
            if known is not None and not hasattr(known, name):
                setattr(known, name, _handler(kind, forward))

    imported = sys.modules.get(_OPERATORS_OF_DYNAMO)
    if imported is not None:
        add(imported)
    else:
        sys.meta_path.insert(0, _AfterImport(_OPERATORS_OF_DYNAMO, add))


def _handler(kind: type, forward: str) -> Callable[..., Any]:
    """What ``BuiltinVariable`` calls for an operator of two objects; None: another must serve."""

    def handler(_: Any, tracer: Any, left: Any, right: Any) -> Any:
        if isinstance(getattr(left, "value", None), kind):
            return left.call_method(tracer, forward, [right], {})
        if isinstance(getattr(right, "value", None), kind):
            return right.call_method(tracer, "__rmatmul__", [left], {})
        return None

    return handler


class _AfterImport(MetaPathFinder):
    """Finds one module as everybody else does, and calls ``action`` with it once it is there."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader, execute = spec.loader, spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.action(module)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
