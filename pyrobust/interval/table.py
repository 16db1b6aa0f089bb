"""The one table: torch function -> rule.

Rules are listed by the name of their function, once, in the file of their kind. A name stands for
every spelling of it (``torch.relu``, ``torch.nn.functional.relu``, ``Tensor.relu``), and where
torch has a form in place (``relu_``), for that too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from pyrobust.interval import (
    arithmetic,
    attention,
    convolution,
    elementwise,
    linear,
    norm_pass,
    normalization,
    pair_pass,
    pooling,
    reduction,
    shape,
    single_pass,
)
from pyrobust.interval.operands import Rule, in_place, spellings

__all__ = ["BY_NAME", "KINDS", "QUICK", "RULES"]

_CHANGES_IN_PLACE = {
    **arithmetic.RULES,
    **pair_pass.RULES,
    **elementwise.RULES,
    "masked_fill": shape.RULES["masked_fill"],
}

BY_NAME: dict[str, Rule] = {
    **arithmetic.RULES,
    **pair_pass.RULES,
    **elementwise.RULES,
    **linear.RULES,
    **convolution.RULES,
    **normalization.RULES,
    **norm_pass.RULES,
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
QUICK: dict[Any, Rule] = {
    **linear.QUICK,
    **elementwise.QUICK,
    **dict.fromkeys(spellings("add"), single_pass.add),
    **dict.fromkeys(spellings("batch_norm"), single_pass.batch_norm),
}

_BOUNDED = (
    *("relu", "relu6", "leaky_relu", "clamp", "clip", "clamp_min", "clamp_max", "hardtanh"),
    *("sigmoid", "expit", "tanh", "hardsigmoid", "softsign", "erf", "atan", "softmax", "softmin"),
    *("neg", "negative", "abs", "absolute", "amax", "amin"),
    *(f"{kind}max_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3)),
    *(name for name in normalization.RULES if "dropout" in name),
)
_CONVERSIONS = ("to", "type_as", "float", "double")
_JOINS = ("masked_fill", "where", "pad", "cat", "concat", "concatenate", "stack")
_TAKES_INFINITY = (*_JOINS, "add", "sub", "subtract", "rsub", "maximum", "minimum", "max", "min")


def _functions(names: Iterable[str]) -> frozenset[Any]:
    return frozenset(
        function
        for name in names
        for spelling in (name, f"{name}_")
        for function in spellings(spelling)
    )


KINDS: dict[str, frozenset[Any]] = {
    "finite": _functions([*_BOUNDED, *set(shape.RULES).difference(_CONVERSIONS, _JOINS)]),
    "checks itself": _functions(["linear", *convolution.RULES]) | frozenset(linear.PACKED_RULES),
    "takes infinity": _functions(_TAKES_INFINITY),
    # what dynamo calls for + += * *= @ of a box and a tensor, the tensor first in any case
    "ambiguous": frozenset({torch.Tensor.add, torch.Tensor.mul, torch.Tensor.matmul}),
}
