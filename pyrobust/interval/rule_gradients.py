"""Operators whose ends a native pass makes, with the gradients of the rule in torch operations.

A pass keeps nothing but its inputs; where gradients flow back, the rule is evaluated once more and
differentiated. So both agree, the second derivatives too. Where a pass declines, the rule answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrobust.interval.type import Interval, wrap
from pyrobust.ops._interval_checks import Ends
from pyrobust.ops._library import define, differentiation_transforms, dispatcher_needed

__all__ = ["PassOperator", "pass_serves"]

Pass = Callable[..., Ends | None]


def pass_serves(box: Interval, *operands: Any) -> bool:
    """Whether a pass may take ``box`` and ``operands``, tensors or None: float32 on the CPU.

    Not under transforms of ``torch.func``, which no operator passes, and not with nearest rounding,
    whose rules promise nothing and are cheap.
    """
    if box.rounding == "nearest" or differentiation_transforms():
        return False
    tensors = [tensor for tensor in (box.lower, box.upper, *operands) if tensor is not None]
    if torch.compiler.is_compiling():
        known = all(isinstance(tensor, Tensor) for tensor in tensors)
    else:
        known = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
    return known and all(
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors
    )


class PassOperator:
    """The operator ``pyrobust::<name>`` of a pass and its rule.

    Args:
        schema: without namespace; tensors come first and two ends come out.
        native: the pass: the ends, or None where it declines.
        rule: the same of the same operands, in torch operations.
        fake: both ends without numbers.
    """

    def __init__(
        self, schema: str, native: Pass, rule: Callable[..., Ends], fake: Callable[..., Ends]
    ) -> None:
        name = schema[: schema.index("(")]

        def kernel(*operands: Any) -> Ends:
            done = native(*operands)
            return rule(*operands) if done is None else done

        def backward(ctx: Any, *of_ends: Tensor) -> tuple[Tensor | None, ...]:
            operands = list(ctx.options)
            for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
                operands[place] = tensor
            return _gradients(rule, operands, of_ends, ctx.needs_input_grad)

        define(schema, kernel, fake, backward=backward, setup_context=_keep)
        self._kernel, self._operator = kernel, getattr(torch.ops.pyrobust, name)

    def __call__(self, rounding: str, *operands: Any) -> Interval:
        """The box of the ends of ``operands``, which :func:`pass_serves` has seen."""
        tensors = [operand for operand in operands if isinstance(operand, Tensor)]
        through = self._operator if dispatcher_needed(*tensors) else self._kernel
        lower, upper = through(*operands)
        return wrap(lower, upper, rounding)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Ends) -> None:
    ctx.places = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
    ctx.options = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.save_for_backward(*(inputs[i] for i in ctx.places))


def _gradients(
    rule: Callable[..., Ends], operands: list[Any], of_ends: tuple[Tensor, ...], needed: Any
) -> tuple[Tensor | None, ...]:
    again = torch.is_grad_enabled()  # whether the gradients are to be differentiated
    with torch.enable_grad():
        leaves = [
            value.detach().requires_grad_() if wanted and not again else value
            for value, wanted in zip(operands, needed, strict=True)
        ]
        ends = rule(*leaves)
    places = [i for i, wanted in enumerate(needed) if wanted]
    found = torch.autograd.grad(
        ends, [leaves[i] for i in places], of_ends, create_graph=again, allow_unused=True
    )
    result: list[Tensor | None] = [None] * len(operands)
    for place, gradient in zip(places, found, strict=True):
        result[place] = gradient
    return tuple(result)
