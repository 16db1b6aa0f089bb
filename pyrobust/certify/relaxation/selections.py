"""Operations that pick or average entries by constants: ``where``, ``gather``, resized images.

They are affine in the data. A condition, index or mask that depends on the input is not covered,
nor an entry that is put in and is not finite.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from pyrobust.interval.type import Interval

__all__ = ["SELECTIONS", "is_selection", "magnitude_of_selection"]

SELECTIONS = ("where", "masked_fill", "gather", "take_along_dim", "interpolate")
_COPIES = ("nearest", "nearest-exact")
_AVERAGES = ("linear", "bilinear", "trilinear", "area")
_ORDER = {
    "masked_fill": ("input", "mask", "value"),
    "gather": ("input", "dim", "index"),
    "take_along_dim": ("input", "indices", "dim"),
}


def is_selection(name: str, node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Whether a call is one of these and all but the data is constant."""
    if name not in SELECTIONS:
        return False
    if name == "interpolate":
        return _mode(node.args, node.kwargs) in (*_COPIES, *_AVERAGES)
    known = _named(name, node, lambda n: values[n])
    condition = known.get("condition", known.get("mask", known.get("index", known.get("indices"))))
    if not isinstance(condition, Tensor):
        return False
    if name in ("gather", "take_along_dim"):
        dim = known.get("dim")
        box = known["input"]
        return isinstance(box, Interval) and isinstance(dim, int) and dim % box.ndim != 0
    return all(_suits(known.get(part)) for part in ("input", "other", "value") if part in known)


def _named(name: str, node: fx.Node, value: Callable[[fx.Node], Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    order = _ORDER.get(name, ("condition", "input", "other"))
    if name == "where" and node.op == "call_method":
        order = ("input", "condition", "other")
    args: Any = fx.node.map_arg(node.args, value)
    kwargs: Any = fx.node.map_arg(node.kwargs, value)
    return dict(zip(order, args, strict=False)) | dict(kwargs)


def _suits(part: Any) -> bool:
    if isinstance(part, Interval):
        return True
    if isinstance(part, Tensor):
        return bool(torch.isfinite(part).all())
    return isinstance(part, int | float) and math.isfinite(part)


def _mode(args: Any, kwargs: Any) -> str:
    known = inspect.signature(F.interpolate).bind(*args, **kwargs).arguments
    return "" if known.get("antialias", False) else str(known.get("mode", "nearest"))


def magnitude_of_selection(
    name: str, call: Callable[[Any, Any], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """``call(args, kwargs)`` with the magnitudes of all numbers, where tensors are such already.

    A coefficient of an average errs by some units of the position that it comes from, and so may
    reach a neighbour of coefficient 0: the largest magnitude of the image counts as well.
    """
    if name in ("where", "masked_fill"):
        args = tuple(abs(a) if isinstance(a, int | float) else a for a in args)
        kwargs = {k: abs(v) if isinstance(v, int | float) else v for k, v in kwargs.items()}
    result = call(args, kwargs)
    if name == "interpolate" and _mode(args, kwargs) in _AVERAGES:
        image = args[0] if args else kwargs["input"]
        result = result + image.amax(tuple(range(2, image.ndim)), keepdim=True)
    return result
