"""What ``torch.compile`` must be told to trace boxes whole: two gaps of Dynamo (torch 2.13).

1. It hands a torch function to a box only if ``torch.overrides`` lists the function as overridable.
   ``F.tanh`` and ``F.sigmoid`` are missing there, since they call a method of their argument, and
   ``F.hardswish``, ``F.hardsigmoid`` and forms in place such as ``torch.relu_`` although they ask
   for overrides: :func:`list_as_overridable`.
2. An operator between a box and a tensor arrives with the tensor first and without saying which
   side it stood on or whether it was in place (``_handle_insert_op_in_graph`` in
   ``torch/_dynamo/variables/builtin.py``): :func:`swapped_operator` asks that very function, whose
   call is on the stack of the tracer.

Nothing of Dynamo is changed. ``box @ box`` stays beyond it: that file has no entry for ``@`` of two
objects (``_binops``), so the graph ends there; ``torch.matmul(box, box)`` is traced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch

__all__ = ["UNKNOWN", "list_as_overridable", "swapped_operator"]

UNKNOWN = "?"


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
