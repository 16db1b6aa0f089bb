"""Ends must be finite: how infinite ones are found, where they are allowed, how they are refused.

A box says something about every element, so an end that overflows is an error and not an answer.
Infinities that the model itself puts in (a mask of ``-inf`` before a softmax) pass through. In
``torch.vmap`` all slices are looked at together. Where there are no numbers to look at (while
compiling or tracing) or looking would stop a GPU, ends that overflow stay infinite, which contains
everything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from pyrobust.interval.errors import where
from pyrobust.ops._visible_numbers import all_finite, assert_in_graph, count_of, holds, physical

__all__ = ["check_result", "infinite_ends", "infinite_ends_allowed", "refuse_infinite_ends"]

_allowed: ContextVar[bool] = ContextVar("infinite ends allowed", default=False)


@contextmanager
def infinite_ends() -> Iterator[None]:
    """Let results be infinite inside the block, for callers that look at each end themselves."""
    token = _allowed.set(True)
    try:
        yield
    finally:
        _allowed.reset(token)


def infinite_ends_allowed() -> bool:
    """Whether the caller stands in :func:`infinite_ends`."""
    return _allowed.get()


def check_result(
    name: str, lower: Tensor, upper: Tensor, operands: Iterable[Any], *, takes_infinity: bool
) -> None:
    """Raise where an operation ``name`` made ends that are not finite.

    Args:
        name: of the operation, for the error.
        lower: lower ends of the result.
        upper: upper ends.
        operands: what the operation was called with.
        takes_infinity: whether the model may put infinities in by an operand that is no box.

    Raises:
        OverflowError: the result left the range of its dtype.
        ValueError: an operand is NaN, or infinite without ``takes_infinity``.
    """
    if torch.compiler.is_compiling():
        return _assert_finite(name, lower, upper, operands, takes_infinity)
    low, high = physical(lower), physical(upper)
    if low is None or high is None or low.is_cuda or all_finite(low, high) or _allowed.get():
        return
    for operand in _leaves(operands):
        box = not isinstance(operand, Tensor)
        parts = (operand.lower, operand.upper) if box else (operand,)
        if any(holds(part.isnan()) for part in parts):
            raise ValueError(f"Interval: an operand of {name} must not be NaN; it is{where()}.")
        if any(holds(part.isinf()) for part in parts):
            if box or takes_infinity:
                return
            raise ValueError(
                f"Interval: an operand of {name} must be finite; it holds infinite values{where()}."
            )
    infinite = ~(torch.isfinite(lower) & torch.isfinite(upper))
    raise OverflowError(
        f"Interval: the ends must stay finite; {name} leaves the range of {lower.dtype} in "
        f"{count_of(infinite)} elements{where()}."
    )


def refuse_infinite_ends(lower: Tensor, upper: Tensor) -> None:
    """Raise OverflowError where an end is infinite or NaN, on any device."""
    infinite = ~(torch.isfinite(lower) & torch.isfinite(upper))
    if torch.compiler.is_compiling():
        assert_in_graph(~infinite.any(), "Interval: the ends must be finite.")
    elif holds(infinite):
        raise OverflowError(
            f"Interval: the ends must be finite; {count_of(infinite)} elements are not{where()}."
        )


def _assert_finite(
    name: str, lower: Tensor, upper: Tensor, operands: Iterable[Any], takes_infinity: bool
) -> None:
    """The check as part of a compiled graph: the same results pass."""
    passes = (torch.isfinite(lower) & torch.isfinite(upper)).all()
    for operand in operands:
        if isinstance(operand, (int, float)):  # numbers that vary have no attributes here
            if takes_infinity and abs(operand) == math.inf:
                return
        elif not isinstance(operand, Tensor) and hasattr(operand, "rounding"):
            passes = passes | operand.lower.isinf().any() | operand.upper.isinf().any()
        elif takes_infinity and isinstance(operand, Tensor) and operand.is_floating_point():
            passes = passes | operand.isinf().any()
    assert_in_graph(passes, f"Interval: the ends must stay finite; {name} leaves their range.")


def _leaves(operands: Iterable[Any]) -> Iterator[Any]:
    """Floating tensors (numbers among them) and boxes, also inside lists."""
    for operand in operands:
        if isinstance(operand, (list, tuple)):
            yield from _leaves(operand)
        elif isinstance(operand, (float, Tensor)):
            tensor = torch.as_tensor(operand)
            if tensor.is_floating_point():
                yield tensor
        elif hasattr(operand, "rounding"):
            yield operand
