"""The one table: torch function -> rule.

Rules are listed by the name of their function, once, in the file of their kind. A name stands for
every spelling of it (``torch.relu``, ``torch.nn.functional.relu``, ``Tensor.relu``), and where
torch has a form in place (``relu_``), for that too.
"""

from __future__ import annotations

from typing import Any

from pyrobust.interval import (
    arithmetic,
    attention,
    elementwise,
    linear,
    normalization,
    pooling,
    reduction,
    shape,
)
from pyrobust.interval.operands import Rule, in_place, spellings

__all__ = ["BY_NAME", "RULES"]

_CHANGES_IN_PLACE = {
    **arithmetic.RULES,
    **elementwise.RULES,
    "masked_fill": shape.RULES["masked_fill"],
}

BY_NAME: dict[str, Rule] = {
    **arithmetic.RULES,
    **elementwise.RULES,
    **linear.RULES,
    **normalization.RULES,
    **pooling.RULES,
    **reduction.RULES,
    **attention.RULES,
    **shape.RULES,
}


def _table() -> dict[Any, Rule]:
    table: dict[Any, Rule] = dict(linear.PACKED_RULES)
    for name, rule in BY_NAME.items():
        table.update(dict.fromkeys(spellings(name), rule))
    for name, rule in _CHANGES_IN_PLACE.items():
        if not name.startswith("__"):
            table.update(dict.fromkeys(spellings(f"{name}_"), in_place(rule)))
    return table


RULES = _table()
