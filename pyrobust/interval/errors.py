"""How intervals word their errors: what has no rule, where in the model, which data are refused."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from pyrobust.ops._visible_numbers import assert_in_graph, count_of, holds, physical, visible

__all__ = [
    "MissingRule",
    "Place",
    "at_place",
    "check_ends",
    "check_float",
    "check_shape",
    "missing",
    "name_of",
    "place",
    "reject",
    "where",
]

Place = tuple[torch.nn.Module, torch.nn.Module] | None  # the innermost module and the outermost
_place: ContextVar[Place] = ContextVar("where a step was asked for that is done later")
_CALLS = ("_call_impl", "_wrapped_call_impl")
_DTYPES = (torch.float32, torch.float64)


class MissingRule(NotImplementedError, AttributeError):
    """An operation that intervals do not support; also an AttributeError, so ``hasattr`` works."""


def name_of(func: Callable[..., Any]) -> str:
    """The name of a torch function, with its module where that tells anything."""
    name = str(getattr(func, "__qualname__", None) or getattr(func, "__name__", repr(func)))
    name = name.replace("_VariableFunctionsClass.", "torch.").replace("TensorBase.", "Tensor.")
    module = getattr(func, "__module__", None)
    return f"{module}.{name}" if module and "." not in name else name


# Dynamo of torch 2.14 cannot trace what is done to such a name; its answer is a constant
name_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def missing(what: str) -> str:
    """The sentence for an operation ``what`` that has no rule."""
    return f"Interval: no rule for {what}{where()}."


def where() -> str:
    """The modules on the stack as `` (in layer1.0.bn of ResNet)``, or an empty string."""
    if torch.compiler.is_compiling():
        return ""
    modules = _place.get(None) or place()
    if modules is None:
        return ""
    innermost, root = modules
    path = next((name for name, module in root.named_modules() if module is innermost), "")
    inner, outer = type(innermost).__name__, type(root).__name__
    return f" (in {outer})" if not path else f" (in {path}, a {inner}, of {outer})"


def place() -> Place:
    """The innermost and the outermost module on the stack, if there are any."""
    innermost: torch.nn.Module | None = None
    root: torch.nn.Module | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # locals take 0.5 us, and a call of a module has two frames beside that of its forward
        if "self" in code.co_varnames and code.co_name not in _CALLS:
            owner = frame.f_locals.get("self")
            if isinstance(owner, torch.nn.Module):
                innermost, root = owner if innermost is None else innermost, owner
        frame = frame.f_back
    return None if root is None or innermost is None else (innermost, root)


@contextmanager
def at_place(modules: Place) -> Iterator[None]:
    """Let errors inside the block name ``modules`` as their place."""
    token = _place.set(modules)
    try:
        yield
    finally:
        _place.reset(token)


def reject(requirement: str, violated: Tensor) -> None:
    """Raise ValueError where the data of a rule break its ``requirement``.

    Where data cannot be looked at (:func:`visible`) rules answer with infinite ends instead.
    """
    if visible(violated) and bool(violated.any()):
        count = int(violated.sum())
        raise ValueError(f"Interval: {requirement}; {count} elements break this{where()}.")


def check_shape(name: str, accepted: bool, requirement: str, shape: Any) -> None:
    """Raise ValueError unless the shape that ``name`` was given is ``accepted``."""
    if not accepted:
        raise ValueError(f"Interval: {name} must have {requirement}; got {tuple(shape)}{where()}.")


def check_float(subject: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a float32 or float64 tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{subject}: {name} must be a torch.Tensor; got {type(value).__name__}.")
    if value.dtype not in _DTYPES:
        raise TypeError(f"{subject}: {name} must have dtype float32 or float64; got {value.dtype}.")


def check_ends(lower: Any, upper: Any) -> None:
    """Raise unless ``lower`` and ``upper`` are the ends of a box."""
    check_float("Interval", "lower", lower)
    check_float("Interval", "upper", upper)
    if lower.dtype != upper.dtype:
        raise TypeError(
            f"Interval: upper must have the dtype of lower, {lower.dtype}; got {upper.dtype}."
        )
    if lower.shape != upper.shape:
        raise ValueError(
            f"Interval: upper must have the shape of lower, {tuple(lower.shape)}; "
            f"got {tuple(upper.shape)}."
        )
    if lower.device != upper.device:
        raise ValueError(
            f"Interval: upper must be on the device of lower, {lower.device}; got {upper.device}."
        )
    if torch.compiler.is_compiling():
        finite = torch.isfinite(lower) & torch.isfinite(upper)
        message = "Interval: lower and upper must be finite, and lower at most upper."
        return assert_in_graph((finite & (lower <= upper)).all(), message)
    width = physical(upper - lower) if lower.numel() else None
    if width is None:
        return
    least, most = width.aminmax()
    if least.item() >= 0 and most.item() < math.inf:  # infinite or NaN where an end is
        return
    if holds(lower.isnan() | upper.isnan()):
        raise ValueError("Interval: lower and upper must not be NaN; they hold NaN values.")
    infinite, crossed = lower.isinf() | upper.isinf(), lower > upper
    if holds(infinite):
        raise ValueError(
            f"Interval: lower and upper must be finite; {count_of(infinite)} elements are infinite."
        )
    if holds(crossed):
        raise ValueError(
            f"Interval: lower must be at most upper; got lower > upper in {count_of(crossed)} "
            "elements."
        )
