"""How a rule is found and applied: the table in use, and what surrounds every rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyrobust.interval.dynamo import UNKNOWN, list_as_overridable, swapped_operator
from pyrobust.interval.errors import MissingRule, missing, name_of
from pyrobust.interval.finite import check_result
from pyrobust.ops._library import autocasting

__all__ = ["QUICK", "RULES", "apply_rule", "install"]

RULES: dict[Any, Callable[..., Any]] = {}
QUICK: dict[Any, Callable[..., Any]] = {}
_kinds: dict[str, frozenset[Any]] = {}
_seen_to: set[Any] = set()  # functions whose results need no look


def install(
    rules: Mapping[Any, Callable[..., Any]],
    kinds: Mapping[str, frozenset[Any]],
    quick: Mapping[Any, Callable[..., Any]],
) -> None:
    """Make ``rules`` the table that intervals look torch functions up in.

    Args:
        rules: torch function to rule.
        kinds: the functions whose results are ``"finite"`` already where operands are, those whose
            rules see to it (``"checks itself"``), those that ``"takes infinity"`` from operands
            that are no boxes, and those that are ``"ambiguous"`` in compiled code.
        quick: torch function to what is asked before its rule in plain eager mode, and may answer
            None.
    """
    RULES.update(rules)
    QUICK.update(quick)
    _kinds.update(kinds)
    _seen_to.update(kinds["finite"], kinds["checks itself"])
    list_as_overridable(rules)


def apply_rule(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of the rule of ``func``, with finite ends.

    Raises:
        NotImplementedError: there is no rule.
        RuntimeError: autocast is on.
        OverflowError: the result leaves the range of its dtype.
    """
    if torch.compiler.is_compiling() and len(args) == 2 and isinstance(args[0], Tensor):
        operator = swapped_operator()
        if operator == UNKNOWN and func in _kinds["ambiguous"]:
            raise MissingRule(
                "Interval: no rule for an operator between a box and a tensor in compiled code "
                f"({name_of(func)}); use torch.add, torch.mul or torch.matmul."
            )
        if operator not in ("", UNKNOWN):
            return getattr(args[1], f"__{operator}__")(args[0])
    rule = RULES.get(func)
    if rule is None:
        raise MissingRule(missing(name_of(func)))
    if autocasting():
        raise RuntimeError(
            "Interval: autocast must be off, as it would round the bounds inwards; wrap the call "
            "in torch.autocast(device_type, enabled=False)."
        )
    result = rule(*args, **kwargs)
    if func in _seen_to:
        return result
    box = result[0] if isinstance(result, tuple) else result
    if not box.finite_by_kernel:
        takes_infinity = func in _kinds["takes infinity"]
        operands = (*args, *kwargs.values())
        check_result(name_of(func), box.lower, box.upper, operands, takes_infinity=takes_infinity)
    return result
