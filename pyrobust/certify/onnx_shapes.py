"""ONNX operators that move elements without changing them; used by :func:`load_onnx`.

The batch stays free. Where a file computes with it (``Shape``, then ``Gather``, ``Concat`` and
``Reshape``), a number stands for it that no real size has, so that any use of it but as the first
size of a ``Reshape`` is noticed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyrobust.certify.onnx_model import Reader

__all__ = ["SHAPE_OPERATORS", "Unsupported", "axes_of", "constant", "known", "leaves"]

# stands for the batch in computations with sizes
_BATCH = -(2**40)


class Unsupported(Exception):
    """An option that has no translation."""


def leaves(args: Any) -> list[Any]:
    """The items of nested lists and tuples."""
    if isinstance(args, tuple | list):
        return [leaf for a in args for leaf in leaves(a)]
    return [args]


def constant(value: Any, what: str) -> Tensor:
    """``value``, which must not depend on the input."""
    if not isinstance(value, Tensor):
        raise Unsupported(f"{what} must be constant")
    return value


def known(value: Any, what: str) -> Tensor:
    """``value``, which must depend neither on the input nor on the size of the batch."""
    found = constant(value, what)
    if found.dtype != torch.bool and bool((found < _BATCH // 16).any()):
        raise Unsupported(f"{what} must not depend on the batch")
    return found


def axes_of(inputs: list[Any], options: dict[str, Any]) -> tuple[int, ...]:
    """The axes of the second input, or of the attribute of older files."""
    if len(inputs) > 1 and inputs[1] is not None:
        return tuple(int(a) for a in constant(inputs[1], "axes").tolist())
    return tuple(options.get("axes", ()))


def _concat(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    if options["axis"] == 0 and not all(isinstance(v, Tensor) for v in inputs):
        raise Unsupported("joins along the batch")
    return reader.call(torch.cat, list(inputs), options["axis"])


def _constant_of_shape(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    from onnx import numpy_helper

    sizes = constant(inputs[0], "the shape").tolist()
    if any(size < 0 for size in sizes):
        raise Unsupported("a shape that depends on the batch")
    if "value" not in options:
        return torch.zeros(sizes)
    value = torch.from_numpy(numpy_helper.to_array(options["value"]).copy())
    return value.reshape(()).expand(sizes).clone()


def _depth_to_space(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    if options.get("mode", b"DCR") != b"CRD":
        raise Unsupported("mode=DCR")
    return reader.call(torch.pixel_shuffle, inputs[0], options["blocksize"])


def _expand(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    sizes = constant(inputs[1], "the shape").tolist()
    if isinstance(inputs[0], Tensor):
        if min(sizes, default=0) < 0:
            raise Unsupported("a shape that depends on the batch")
        return inputs[0].expand(torch.broadcast_shapes(inputs[0].shape, sizes))
    if len(sizes) != len(reader.shape) or sizes[0] not in (1, _BATCH):
        raise Unsupported("a shape that does not keep the axes and the batch")
    return reader.method("expand", inputs[0], -1, *(-1 if n == 1 else n for n in sizes[1:]))


def _flatten(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    if options.get("axis", 1) != 1:
        raise Unsupported(f"axis={options['axis']}")
    return reader.call(torch.flatten, inputs[0], 1)


def _gather(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    index = constant(inputs[1], "the index")
    axis = options.get("axis", 0)
    if isinstance(inputs[0], Tensor):
        size = inputs[0].shape[axis]
        places = torch.where(index < 0, index + size, index).flatten()
        chosen = torch.index_select(inputs[0], axis, places)
        return chosen.unflatten(axis, index.shape) if index.ndim else chosen.squeeze(axis)
    if axis == 0 or axis == -len(reader.shape):
        raise Unsupported("an index into the batch")
    if index.ndim == 0:
        return reader.call(torch.select, inputs[0], axis, int(index))
    if index.ndim > 1 or bool((index < 0).any()):
        raise Unsupported("an index of several axes, or from the end")
    return reader.call(torch.index_select, inputs[0], axis, index)


def _reshape(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    sizes = constant(inputs[1], "the shape").tolist()
    if isinstance(inputs[0], Tensor):
        return inputs[0].reshape(sizes)
    if 0 in sizes[1:]:
        raise Unsupported("sizes of 0 behind the first axis")
    own = sizes[0] in (0, 1, _BATCH) or (sizes[0] == -1 and -1 not in sizes[1:])
    if own and min(sizes[1:], default=0) >= -1:
        batch = reader.method("size", inputs[0], 0)
        return reader.method("reshape", inputs[0], batch, *sizes[1:])
    shown = ["batch" if size == _BATCH else size for size in sizes]
    raise Unsupported(f"a shape that does not keep the batch, {shown}")


def _shape(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    if isinstance(inputs[0], Tensor):
        sizes = list(inputs[0].shape)
    else:
        if not reader.shape or 0 in reader.shape[1:]:
            raise Unsupported("an input whose sizes behind the batch are not fixed")
        sizes = [_BATCH, *reader.shape[1:]]
    return torch.tensor(sizes[options.get("start", 0) : options.get("end")])


def _slice(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    values = [known(v, "every bound").tolist() for v in inputs[1:] if v is not None]
    starts, ends = values[:2]
    axes = values[2] if len(values) > 2 else list(range(len(starts)))
    steps = values[3] if len(values) > 3 else [1] * len(starts)
    if not isinstance(inputs[0], Tensor) and min(steps, default=1) < 1:
        raise Unsupported(f"steps {steps}")
    value = inputs[0]
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        place = axis if axis >= 0 else axis + len(reader.shape)
        if place < 0:
            raise Unsupported(f"axis {axis} of an input of unknown shape")
        index = (*[slice(None)] * place, slice(start, end, step))
        if isinstance(value, Tensor):
            value = torch.from_numpy(value.numpy()[index].copy())  # backwards too
        elif place == 0:
            raise Unsupported("a part of the batch")
        else:
            value = reader.call(operator.getitem, value, index)
    return value


def _split(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    """The parts, in a list."""
    axis = options.get("axis", 0)
    rank = len(reader.shape)
    place = axis if axis >= 0 else axis + rank
    if not isinstance(inputs[0], Tensor) and place <= 0:
        raise Unsupported("parts of the batch, or along an axis of an input of unknown shape")
    if len(inputs) > 1 and inputs[1] is not None:
        sizes = known(inputs[1], "split").tolist()
    elif "split" in options:
        sizes = list(options["split"])
    elif "num_outputs" in options and rank > place and reader.shape[place]:
        whole, count = reader.shape[place], options["num_outputs"]
        size = -(-whole // count)
        sizes = [min(size, whole - i * size) for i in range(count)]
    else:
        raise Unsupported("parts whose sizes are not given")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        reader.call(torch.narrow, inputs[0], place, start, size)
        for start, size in zip(starts, sizes, strict=True)
    ]


def _squeeze(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    value = inputs[0]
    for axis in sorted(axes_of(inputs, options), reverse=True):
        value = reader.call(torch.squeeze, value, axis)
    return value


def _transpose(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    if "perm" not in options:
        raise Unsupported("no perm")
    return reader.call(torch.permute, inputs[0], tuple(options["perm"]))


def _unsqueeze(reader: Reader, inputs: list[Any], options: dict[str, Any]) -> Any:
    value = inputs[0]
    for axis in sorted(axes_of(inputs, options)):
        value = reader.call(torch.unsqueeze, value, axis)
    return value


SHAPE_OPERATORS: dict[str, Callable[..., Any]] = {
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
