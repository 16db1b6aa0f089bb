"""What every interval operator asks of its tensors, and what their gradients share."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from pyrobust._checks import check_choice
from pyrobust.ops._cuda_module import has_cuda_module
from pyrobust.ops._visible_numbers import all_finite, assert_in_graph, count_of, holds, physical

__all__ = [
    "Ends",
    "check_bias",
    "check_box",
    "check_operand",
    "check_terms",
    "check_weight_range",
    "clipped_at_zero",
    "dense",
    "finite_ends",
    "in_dtype_of",
    "is_deployed",
    "map_one_by_one",
    "operand_error",
    "settled",
]

ROUNDINGS = ("real", "deployed", "nearest", "deployed-tf32", "deployed-bfloat16")
# How far arithmetic may move an operand of a product, relatively. TF32 keeps 10 bits of the
# mantissa and may cut the others off; bfloat16 keeps 7 and rounds to nearest.
_OPERAND_ERROR = {"deployed-tf32": 2.0**-10, "deployed-bfloat16": 2.0**-8}
_MAX_TERMS = 2**21
Ends = tuple[Tensor, Tensor]


class _FiniteEnds(threading.local):
    """What the kernels of a call said about their results, for the caller around an operator.

    Attributes:
        all: None before a kernel ran; then whether all ends since are finite.
    """

    all: bool | None = None

    def start(self) -> None:
        """Forget what kernels said."""
        if not torch.compiler.is_compiling():
            self.all = None

    def note(self, finite: bool) -> None:
        """Add what one kernel said."""
        self.all = finite and self.all is not False


finite_ends = _FiniteEnds()


def settled(
    subject: str, ends: Ends, operands: dict[str, Tensor | None], allow_infinite: bool
) -> Ends:
    """``ends`` that ``subject`` made of ``operands``, unless they are not finite.

    Kernels of a call that began with ``finite_ends.start()`` have said so; others are looked at,
    but not on GPUs, which that would stop. Compiled code for the CPU raises RuntimeError.

    Raises:
        ValueError: an operand is NaN or infinite.
        OverflowError: the result leaves the range of its dtype.
    """
    if allow_infinite:
        return ends
    if torch.compiler.is_compiling():
        finite = torch.isfinite(ends[0]) & torch.isfinite(ends[1])
        assert_in_graph(finite.all(), f"{subject}: the ends must stay finite.")
        return ends
    if finite_ends.all:
        return ends
    low, high = physical(ends[0]), physical(ends[1])
    if low is None or high is None or low.is_cuda or all_finite(low, high):
        return ends
    for name, operand in operands.items():
        if operand is None or not operand.is_floating_point():
            continue
        if holds(operand.isnan()):
            raise ValueError(f"{subject}: {name} must not be NaN; it holds NaN values.")
        infinite = operand.isinf()
        if holds(infinite):
            raise ValueError(
                f"{subject}: {name} must be finite; {count_of(infinite)} elements are infinite."
            )
    infinite = ~(torch.isfinite(ends[0]) & torch.isfinite(ends[1]))
    raise OverflowError(
        f"{subject}: the ends must stay finite; they leave the range of {ends[0].dtype} in "
        f"{count_of(infinite)} elements."
    )


def is_deployed(rounding: str) -> bool:
    """Whether the promise covers evaluations in floating point."""
    return rounding.startswith("deployed")


def operand_error(rounding: str) -> float:
    """Relative error of an operand of a product under this promise's arithmetic; 0 for float32."""
    return _OPERAND_ERROR.get(rounding, 0.0)


def check_weight_range(subject: str, name: str, weight: Tensor, rounding: str, most: float) -> None:
    """Raise ValueError where coarser arithmetic could round a weight to infinity."""
    if operand_error(rounding) == 0.0 or torch.compiler.is_compiling() or weight.numel() == 0:
        return
    if not bool(weight.detach().abs().amax() < most):
        raise ValueError(
            f"{subject}: {name} must be below {most:.3g} in magnitude with rounding "
            f"{rounding!r}; it is not."
        )


def check_box(subject: str, lower: Tensor, upper: Tensor, rounding: str) -> None:
    """Raise unless the ends agree, are float32 or float64, and ``rounding`` is known."""
    check_choice(subject, "rounding", rounding, ROUNDINGS)
    if lower.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{subject}: lower must have dtype float32 or float64; got {lower.dtype} "
            "(.float() converts half precision exactly)."
        )
    if lower.shape != upper.shape:
        raise ValueError(
            f"{subject}: upper must have the shape of lower, {tuple(lower.shape)}; "
            f"got {tuple(upper.shape)}."
        )


def check_operand(subject: str, name: str, value: Tensor | None, dtype: torch.dtype) -> None:
    """Raise TypeError unless ``value`` is None or of ``dtype``."""
    if value is not None and value.dtype != dtype:
        raise TypeError(
            f"{subject}: {name} must have the dtype of lower, {dtype}; got {value.dtype}."
        )


def in_dtype_of(
    lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of 16 bits in the dtype of the box, which holds them exactly.

    A bfloat16 weight that the CUDA kernels read as it is, for a result without gradient, stays.
    """
    halves = (torch.float16, torch.bfloat16)
    if bias is not None and bias.dtype in halves:
        bias = bias.to(lower.dtype)
    if weight.dtype not in halves:
        return weight, bias
    graded = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (lower, upper, weight, bias)
    )
    read = weight.dtype == torch.bfloat16 and lower.dtype == torch.float32 and lower.is_cuda
    if read and not graded and has_cuda_module():
        return weight, bias
    return weight.to(lower.dtype), bias


def check_bias(subject: str, bias: Tensor | None, rows: int) -> None:
    """Raise ValueError unless ``bias`` is None or ``(rows,)``."""
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"{subject}: bias must have shape ({rows},); got {tuple(bias.shape)}.")


def check_terms(subject: str, terms: int) -> None:
    """Raise ValueError where an output sums more products than the error bounds allow."""
    if terms > _MAX_TERMS:
        raise ValueError(
            f"{subject}: an output may sum at most {_MAX_TERMS} products; got {terms}."
        )


def clipped_at_zero(lower: Tensor, upper: Tensor) -> Ends:
    """The ends after a ReLU."""
    return lower.relu(), upper.relu()


def dense(tensor: Tensor) -> Tensor:
    """Contiguous, with the negative bit resolved."""
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor  # 0.1 us; the two calls below cost 0.6 even where they change nothing
    return tensor.resolve_neg().contiguous()


def map_one_by_one(operator: Any, info: Any, in_dims: tuple[Any, ...], args: Any) -> Any:
    """Vmap rule without a shortcut: one call per slice."""
    parts = [
        operator(
            *(
                arg if dim is None else arg.select(dim, i)
                for arg, dim in zip(args, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(ends) for ends in zip(*parts, strict=True)), (0, 0)
