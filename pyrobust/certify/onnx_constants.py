"""ONNX operators that are evaluated while a file is read; used by :func:`load_onnx`.

Exporters leave arithmetic on constants in their files: sizes, masks, the decoding of packed codes.
These operators have no rules for boxes, and serve there only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrobust.certify.onnx_shapes import Unsupported, constant, known

if TYPE_CHECKING:
    from pyrobust.certify.onnx_model import Reader

__all__ = ["CONSTANT_OPERATORS"]


def _alone(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """``function`` of tensors, where all of them are constant."""

    def make(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
        return function(*[known(value, "every input") for value in inputs])

    return make


def _equal(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    """The size of the batch can be compared with negative numbers only, as exporters do."""
    first, second = (constant(value, "every input") for value in inputs)
    if not bool((second < 0).all()):
        first, second = known(first, "every input"), known(second, "every input")
    return torch.eq(first, second)


def _node(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    from onnx import numpy_helper

    if "value" in options:
        return torch.from_numpy(numpy_helper.to_array(options["value"]).copy())
    for name in ("value_float", "value_floats", "value_int", "value_ints"):
        if name in options:
            return torch.tensor(options[name])
    raise Unsupported(f"{', '.join(options)}")


def _cast(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    from onnx import TensorProto

    if isinstance(inputs[0], Tensor):
        kinds = {
            TensorProto.BOOL: torch.bool,
            TensorProto.UINT8: torch.uint8,
            TensorProto.INT32: torch.int32,
            TensorProto.INT64: torch.int64,
            TensorProto.FLOAT: torch.float32,
        }
        if options["to"] in kinds:
            return inputs[0].to(kinds[options["to"]])
    elif options["to"] == TensorProto.FLOAT:
        return inputs[0]
    raise Unsupported("a type other than float32")


def _cumulative_sum(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    if options.get("exclusive", 0) or options.get("reverse", 0):
        raise Unsupported("exclusive or reverse sums")
    values, axis = (known(value, "every input") for value in inputs)
    return torch.cumsum(values, int(axis), dtype=values.dtype)


def _gather_nd(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    if options.get("batch_dims", 0):
        raise Unsupported("batch_dims")
    values, places = (known(value, "every input") for value in inputs)
    return values[places.unbind(-1)]


def _scatter_elements(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    values, places, updates = (known(value, "every input") for value in inputs)
    axis, reduction = options.get("axis", 0), options.get("reduction", b"none")
    if reduction not in (b"none", b"add"):
        raise Unsupported(f"reduction={reduction.decode()}")
    places = torch.where(places < 0, places + values.shape[axis], places)
    if reduction == b"add":
        return values.scatter_add(axis, places, updates)
    return values.scatter(axis, places, updates)


CONSTANT_OPERATORS: dict[str, Callable[..., Any]] = {
    "And": _alone(torch.logical_and),
    "Cast": _cast,
    "Ceil": _alone(torch.ceil),
    "Constant": _node,
    "CumSum": _cumulative_sum,
    "Equal": _equal,
    "Floor": _alone(torch.floor),
    "GatherND": _gather_nd,
    "Greater": _alone(torch.gt),
    "GreaterOrEqual": _alone(torch.ge),
    "Less": _alone(torch.lt),
    "LessOrEqual": _alone(torch.le),
    "Not": _alone(torch.logical_not),
    "Or": _alone(torch.logical_or),
    "Range": _alone(lambda first, end, step: torch.arange(*(n.item() for n in (first, end, step)))),
    "Round": _alone(torch.round),
    "ScatterElements": _scatter_elements,
    "Sign": _alone(torch.sign),
}
