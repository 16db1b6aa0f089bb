"""Operators whose ends a native pass makes, with the gradients of the rule in torch operations.

A pass keeps nothing but its inputs; where gradients flow back, the rule is evaluated once more and
differentiated, or a native pass gives them. So both agree, the second derivatives too, which are
the rule's. Where a pass declines, the rule answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrobust.interval.type import Interval, adopt, wrap
from pyrobust.ops._interval_checks import Ends, finite_ends
from pyrobust.ops._library import define, differentiation_transforms, dispatcher_needed

__all__ = ["NativeGradients", "PassOperator", "ends_like", "pass_serves"]

Pass = Callable[..., Ends | None]


def ends_like(tensor: Tensor, *_: Any) -> Ends:
    """Both ends without numbers, of the shape of a pass's first operand."""
    out = tensor.new_empty(tensor.shape)
    return out, torch.empty_like(out)


def pass_serves(box: Interval, *operands: Any, nearest: bool = False) -> bool:
    """Whether a pass may take ``box`` and ``operands``, tensors or None: float32 on the CPU.

    Not under transforms of ``torch.func``, which no operator passes, and unless ``nearest`` not
    with nearest rounding, where rules promise nothing and are cheap.
    """
    if (box.rounding == "nearest" and not nearest) or differentiation_transforms():
        return False
    tensors = [tensor for tensor in (box.lower, box.upper, *operands) if tensor is not None]
    if torch.compiler.is_compiling():
        known = all(isinstance(tensor, Tensor) for tensor in tensors)
    else:
        known = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
    return known and all(
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors
    )


@dataclass(frozen=True)
class NativeGradients:
    """The gradients of a pass, an operator of their own.

    Attributes:
        schema: without namespace; of the ends' gradients and the pass's first operands, all its
            tensors among them, of which each has a gradient.
        kernel: the native pass, of the same operands.
        fake: the gradients without numbers.
    """

    schema: str
    kernel: Callable[..., tuple[Tensor, ...]]
    fake: Callable[..., tuple[Tensor, ...]]


class PassOperator:
    """The operator ``pyrobust::<name>`` of a pass and its rule.

    Args:
        schema: without namespace; tensors come first and two ends come out.
        native: the pass: the ends, or None where it declines. It tells ``finite_ends`` of ends that
            are not finite; the others are.
        rule: the same of the same operands, in torch operations.
        fake: both ends without numbers; those of the first operand's shape if not given.
        gradients: a native pass of the gradients; else they are the rule's.
        by_elements: whether every element is on its own, so that ``torch.vmap`` takes all slices at
            once.
    """

    def __init__(
        self,
        schema: str,
        native: Pass,
        rule: Callable[..., Ends],
        fake: Callable[..., Ends] = ends_like,
        *,
        gradients: NativeGradients | None = None,
        by_elements: bool = False,
    ) -> None:
        slopes = None if gradients is None else _defined(gradients, by_elements)

        def kernel(*operands: Any) -> Ends:
            done = native(*operands)
            finite_ends.note(done is not None)
            return rule(*operands) if done is None else done

        def backward(ctx: Any, *of_ends: Tensor) -> tuple[Tensor | None, ...]:
            operands = list(ctx.options)
            for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
                operands[place] = tensor
            if slopes is None or torch.is_grad_enabled():  # which are to be differentiated again
                return _gradients(rule, operands, of_ends, ctx.needs_input_grad)
            return slopes(of_ends, operands)

        name, vmap = _name(schema), _by_elements(schema) if by_elements else None
        define(schema, kernel, fake, backward=backward, setup_context=_keep, vmap=vmap)
        self._kernel, self._operator = kernel, getattr(torch.ops.pyrobust, name)

    def __call__(self, rounding: str, *operands: Any) -> Interval:
        """The box of the ends of ``operands``, which :func:`pass_serves` has seen."""
        tensors = [operand for operand in operands if isinstance(operand, Tensor)]
        through = self._operator if dispatcher_needed(*tensors) else self._kernel
        if torch.compiler.is_compiling():
            lower, upper = through(*operands)
            return wrap(lower, upper, rounding)
        finite_ends.start()
        lower, upper = through(*operands)
        box = adopt(lower, upper, rounding)
        box.finite_by_kernel = finite_ends.all is True
        return box


def _name(schema: str) -> str:
    return schema[: schema.index("(")]


Slopes = Callable[[tuple[Tensor, ...], list[Any]], tuple[Tensor | None, ...]]


def _defined(gradients: NativeGradients, by_elements: bool) -> Slopes:
    """The operator of ``gradients`` as a function of the ends' and the operands of the pass."""
    schema = gradients.schema
    vmap = _by_elements(schema) if by_elements else None
    define(schema, gradients.kernel, gradients.fake, vmap=vmap)
    operator = getattr(torch.ops.pyrobust, _name(schema))
    given = schema[: schema.index("->")].count(",") - 1  # of the operands

    def slopes(of_ends: tuple[Tensor, ...], operands: list[Any]) -> tuple[Tensor | None, ...]:
        found = operator(*of_ends, *operands[:given])
        return *found, *[None] * (len(operands) - len(found))

    return slopes


def _by_elements(schema: str) -> Callable[..., Any]:
    """Vmap rule: all slices at once, as every element is on its own."""
    name = _name(schema)

    def rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        mapped = [
            tensor.expand(info.batch_size, *tensor.shape) if d is None else tensor.movedim(d, 0)
            for tensor, d in zip(tensors, dims, strict=False)
        ]
        operator = getattr(torch.ops.pyrobust, name)
        results = operator(*mapped, *args[len(tensors) :])
        return results, (0,) * len(results)

    return rule


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Ends) -> None:
    ctx.places = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
    ctx.options = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.save_for_backward(*(inputs[i] for i in ctx.places))


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()


def _gradients(
    rule: Callable[..., Ends], operands: list[Any], of_ends: tuple[Tensor, ...], needed: Any
) -> tuple[Tensor | None, ...]:
    again = torch.is_grad_enabled()  # whether the gradients are to be differentiated
    with torch.enable_grad():  # aliases, as one tensor may be two operands
        leaves = [
            value if not wanted else value.view_as(value) if again else _leaf(value)
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
