"""The image of a box under a function of one number: operator ``interval_curve``.

One native pass forwards and one backwards (``csrc/interval/curves.h``). Derivatives are those of
the ends; rounding counts as constant. Compiled code takes the operators, whose gradients cannot be
differentiated again; plain eager code calls the passes (:mod:`pyrobust.interval.curve_pass`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust.ops._interval_checks import Ends, dense, finite_ends
from pyrobust.ops._library import define

__all__ = ["curve_ends", "curve_gradients"]


def curve_ends(
    lower: Tensor,
    upper: Tensor,
    curve: str,
    numbers: Sequence[float],
    deployed: Sequence[float],
    rounding: str,
) -> Ends:
    """The ends of the image; ``finite_ends`` is told of them.

    Args:
        lower: lower ends, float32 on the CPU.
        upper: upper ends, of the same shape.
        curve: the function, as ``csrc/bindings/interval_curves.cpp`` lists them.
        numbers: what that function takes besides.
        deployed: error of a float32 evaluation in units of 2^-24 of the value, of ``min(|x|, 8)``,
            and of 1.
        rounding: the promise.

    Returns:
        Both ends; those that are not finite are infinite on their outer side.
    """
    flat = dense(lower).view(-1), dense(upper).view(-1)
    low, high = torch.empty_like(flat[0]), torch.empty_like(flat[0])
    threads = torch.get_num_threads()
    finite = _native.interval_curve(*flat, curve, numbers, deployed, rounding, low, high, threads)
    finite_ends.note(finite)
    return low.view(lower.shape), high.view(lower.shape)


def curve_gradients(
    of_lower: Tensor,
    of_upper: Tensor,
    lower: Tensor,
    upper: Tensor,
    curve: str,
    numbers: Sequence[float],
) -> Ends:
    """Gradients of a box's ends from those of its image's.

    Args:
        of_lower: gradients of the image's lower ends, float32 on the CPU.
        of_upper: of its upper ends; like all below of the same shape.
        lower: lower ends of the box.
        upper: upper ends.
        curve: the function.
        numbers: what it takes besides.
    """
    grads = dense(of_lower).view(-1), dense(of_upper).view(-1)
    ends = dense(lower).view(-1), dense(upper).view(-1)
    to_lower, to_upper = torch.empty_like(ends[0]), torch.empty_like(ends[0])
    threads = torch.get_num_threads()
    _native.interval_curve_backward(*grads, *ends, curve, numbers, to_lower, to_upper, threads)
    return to_lower.view(lower.shape), to_upper.view(lower.shape)


def _fake(lower: Tensor, *_: Any) -> Ends:
    out = lower.new_empty(lower.shape)
    return out, torch.empty_like(out)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Ends) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.function = inputs[2:4]


def _backward(ctx: Any, of_lower: Tensor, of_upper: Tensor) -> tuple[Tensor | None, ...]:
    operands = of_lower, of_upper, *ctx.saved_tensors
    ends = torch.ops.pyrobust.interval_curve_gradients(*operands, *ctx.function)
    return *ends, None, None, None, None


def _vmap_by_elements(name: str) -> Any:
    """Vmap rule: all slices at once, as every element is on its own."""

    def rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        mapped = [
            tensor.expand(info.batch_size, *tensor.shape) if d is None else tensor.movedim(d, 0)
            for tensor, d in zip(tensors, dims, strict=False)
        ]
        operator = getattr(torch.ops.pyrobust, name)
        return operator(*mapped, *args[len(tensors) :]), (0, 0)

    return rule


define(
    "interval_curve(Tensor lower, Tensor upper, str curve, float[] numbers, float[] deployed,"
    " str rounding) -> (Tensor, Tensor)",
    curve_ends,
    _fake,
    backward=_backward,
    setup_context=_context,
    vmap=_vmap_by_elements("interval_curve"),
)
define(
    "interval_curve_gradients(Tensor of_lower, Tensor of_upper, Tensor lower, Tensor upper,"
    " str curve, float[] numbers) -> (Tensor, Tensor)",
    curve_gradients,
    lambda of_lower, of_upper, lower, *_: _fake(lower),
    vmap=_vmap_by_elements("interval_curve_gradients"),
)
