"""The native pass of a function of one number as autograd records it, and as compilers do.

Transforms, other dtypes and devices, and dispatch modes keep to torch operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrobust.ops._interval_checks import Ends
from pyrobust.ops._interval_curve import curve_ends, curve_gradients
from pyrobust.ops._interval_gradients import native_serves
from pyrobust.ops._library import plain_eager

__all__ = ["curve_pass", "has_pass"]

Function = tuple[str, tuple[float, ...]]  # its native name, and what it takes besides


def has_pass(lower: Tensor, upper: Tensor) -> bool:
    """Whether the native pass takes these ends here."""
    if lower.dtype != torch.float32 or lower.device.type != "cpu":
        return False
    return torch.compiler.is_compiling() or plain_eager(lower, upper)


def curve_pass(
    lower: Tensor,
    upper: Tensor,
    function: Function,
    deployed: tuple[float, float, float],
    rounding: str,
    image: Callable[[Tensor, Tensor], Ends],
) -> Ends:
    """The ends of the image, differentiable; ``finite_ends`` is told of them.

    Args:
        lower: lower ends that :func:`has_pass` takes.
        upper: upper ends.
        function: which it is.
        deployed: errors of a float32 evaluation.
        rounding: the promise.
        image: the same in torch operations on float64, for gradients of gradients.
    """
    operands = lower, upper, *function, deployed, rounding
    if torch.compiler.is_compiling():
        ends: Ends = torch.ops.pyrobust.interval_curve(*operands)
        return ends
    if torch.is_grad_enabled() and (lower.requires_grad or upper.requires_grad):
        ends = _Pass.apply(*operands, image)  # type: ignore[no-untyped-call]
        return ends
    return curve_ends(*operands)


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lower: Tensor, upper: Tensor, *rest: Any) -> Ends:
        ctx.save_for_backward(lower, upper)
        ctx.function, ctx.image = rest[:2], rest[-1]
        return curve_ends(lower, upper, *rest[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        ends = ctx.saved_tensors
        if native_serves(*grads, *ends):
            return *curve_gradients(*grads, *ends, *ctx.function), None, None, None, None, None
        return *_by_torch(ctx, ends, grads), None, None, None, None, None


def _by_torch(ctx: Any, ends: Ends, grads: Ends) -> list[Tensor | None]:
    """Gradients that can be differentiated again."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        wanted = [end for end, needed in zip(ends, ctx.needs_input_grad, strict=False) if needed]
        image = [end.to(ends[0].dtype) for end in ctx.image(*(end.double() for end in ends))]
        found = iter(torch.autograd.grad(image, wanted, grads, create_graph=recorded))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:2]]
