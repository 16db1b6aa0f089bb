"""Affine maps of intervals, rounded outward: the kernels behind ``pyrobust.Interval``.

Each takes the two ends of a box and returns the two ends of its image. ``rounding`` chooses the
promise, for the weights as stored (proof: ``csrc/interval/interval.h``):

- ``"real"``: the result contains the exact real-number image of the box.
- ``"deployed"``: it also contains what any float32 evaluation returns, in any summation order, with
  or without FMA, denormals kept or flushed.
- ``"nearest"``: plain floating point, unsound: an attained value may lie outside by rounding.

float32 on the CPU runs native kernels; float64 and other devices run the same method in torch
operations. float16 and bfloat16 are refused: convert with ``.float()``, which is exact. Where a
bound overflows, or an end of the box is infinite or NaN, the result is ``[-inf, inf]``.

Source: S. M. Rump, "Fast and parallel interval arithmetic", BIT 39 (1999); N. Revol and
P. Theveny, "Numerical reproducibility and parallel computations: issues for interval algorithms",
IEEE Trans. Computers 63 (2014). Departures: the centre's rounding error joins the radius before
its product, so two sums suffice and no rounding mode is switched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from pyrobust import _native
from pyrobust._checks import check_choice
from pyrobust.ops._interval_fallback import outward_image
from pyrobust.ops._library import define, dispatcher_needed, refuse_forward_mode

__all__ = ["interval_linear"]

ROUNDINGS = ("real", "deployed", "nearest")
_MAX_TERMS = 2**21
Ends = tuple[Tensor, Tensor]


def interval_linear(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rounding: str = "real",
) -> Ends:
    """Image of a box under ``x @ weight.T + bias``.

    Args:
        lower: ``(..., K)`` lower ends, float32 or float64.
        upper: ``(..., K)`` upper ends, same dtype and shape. ``lower <= upper`` is not checked.
        weight: ``(N, K)``, same dtype, ``K <= 2**21``.
        bias: ``(N,)``, same dtype, or None.
        rounding: ``"real"``, ``"deployed"`` or ``"nearest"``.

    Returns:
        ``(lower, upper)``, each ``(..., N)``; differentiable in all four tensors (the exact
        derivative of centre-radius propagation; rounding counts as constant).

    Raises:
        TypeError: a dtype other than float32 or float64, or dtypes that differ.
        ValueError: shapes disagree, or ``rounding`` is unknown.

    Example:
        >>> weight = torch.tensor([[1.0, -1.0]])
        >>> lower, upper = interval_linear(torch.zeros(2), torch.ones(2), weight)
        >>> bool(lower <= -1), bool(upper >= 1)
        (True, True)
    """
    tensors = (lower, upper, weight, bias)
    if has_torch_function(tensors):
        result: Ends = handle_torch_function(
            interval_linear, tensors, lower, upper, weight, bias, rounding=rounding
        )
        return result
    _check_linear(lower, upper, weight, bias, rounding)
    if not dispatcher_needed(*tensors):
        return _linear_cpu(lower, upper, weight, bias, rounding)
    refuse_forward_mode("interval_linear", *tensors)
    ends: Ends = torch.ops.pyrobust.interval_linear(lower, upper, weight, bias, rounding)
    return ends


def _check_box(subject: str, lower: Tensor, upper: Tensor, rounding: str) -> None:
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


def _check_operand(subject: str, name: str, value: Tensor | None, dtype: torch.dtype) -> None:
    if value is not None and value.dtype != dtype:
        raise TypeError(
            f"{subject}: {name} must have the dtype of lower, {dtype}; got {value.dtype}."
        )


def _check_linear(
    lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor | None, rounding: str
) -> None:
    subject = "interval_linear"
    _check_box(subject, lower, upper, rounding)
    for name, value in (("upper", upper), ("weight", weight), ("bias", bias)):
        _check_operand(subject, name, value, lower.dtype)
    if weight.ndim != 2:
        raise ValueError(f"{subject}: weight must have shape (N, K); got {tuple(weight.shape)}.")
    if lower.ndim < 1 or lower.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{subject}: lower must have last size {weight.shape[1]} (weight is "
            f"{tuple(weight.shape)}); got shape {tuple(lower.shape)}."
        )
    if weight.shape[1] > _MAX_TERMS:
        raise ValueError(f"{subject}: K must be at most {_MAX_TERMS}; got {weight.shape[1]}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{subject}: bias must have shape ({weight.shape[0]},); got {tuple(bias.shape)}."
        )


def _dense(tensor: Tensor) -> Tensor:
    return tensor.resolve_neg().contiguous()


def _linear_cpu(
    lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor | None, rounding: str
) -> Ends:
    if lower.dtype != torch.float32:
        return _linear_fallback(lower, upper, weight, bias, rounding)
    terms, rows = weight.shape[1], weight.shape[0]
    out_shape = (*lower.shape[:-1], rows)
    count = torch.Size(lower.shape[:-1]).numel()  # reshape(-1, 0) would be ambiguous
    low, high = lower.reshape(count, terms), upper.reshape(count, terms)
    out_low = low.new_empty((count, rows))
    out_high = torch.empty_like(out_low)
    _native.interval_linear(
        _dense(low),
        _dense(high),
        _dense(weight),
        None if bias is None else _dense(bias),
        rounding,
        out_low,
        out_high,
        torch.get_num_threads(),
    )
    return out_low.reshape(out_shape), out_high.reshape(out_shape)


def _linear_fallback(
    lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor | None, rounding: str
) -> Ends:
    return outward_image(
        lower,
        upper,
        weight,
        bias,
        torch.nn.functional.linear,
        terms=weight.shape[1],
        rounding=rounding,
    )


def _linear_fake(
    lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor | None, rounding: str
) -> Ends:
    out = lower.new_empty((*lower.shape[:-1], weight.shape[0]))
    return out, torch.empty_like(out)


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Ends) -> None:
    lower, upper, weight, bias, _ = inputs
    ctx.save_for_backward(lower, upper, weight)
    ctx.has_bias = bias is not None


def _linear_backward(ctx: Any, grad_lower: Tensor, grad_upper: Tensor) -> tuple[Any, ...]:
    """Derivative of ``c W' -+ r |W|'`` at ``c = (u + l) / 2``, ``r = (u - l) / 2``."""
    lower, upper, weight = ctx.saved_tensors
    to_centre, to_radius = grad_lower + grad_upper, grad_upper - grad_lower
    grads: list[Tensor | None] = [None, None, None, None]
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        through_centre, through_radius = to_centre @ weight, to_radius @ weight.abs()
        grads[0] = (through_centre - through_radius) * 0.5
        grads[1] = (through_centre + through_radius) * 0.5
    rows, terms = weight.shape
    flat_centre = to_centre.reshape(-1, rows)
    if ctx.needs_input_grad[2]:
        centre, radius = (lower + upper) * 0.5, (upper - lower) * 0.5
        grads[2] = flat_centre.T @ centre.reshape(-1, terms) + weight.sign() * (
            to_radius.reshape(-1, rows).T @ radius.reshape(-1, terms)
        )
    if ctx.has_bias and ctx.needs_input_grad[3]:
        grads[3] = flat_centre.sum(0)
    return *grads, None


def _linear_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Ends, tuple[int, int]]:
    lower, upper, weight, bias, rounding = args
    size = info.batch_size
    if in_dims[2] is None and in_dims[3] is None:
        low, high = (
            end.movedim(dim, 0) if dim is not None else end.expand(size, *end.shape)
            for end, dim in zip((lower, upper), in_dims[:2], strict=True)
        )
        ends = torch.ops.pyrobust.interval_linear(low, high, weight, bias, rounding)
        return ends, (0, 0)
    parts = [
        torch.ops.pyrobust.interval_linear(
            *(
                arg.select(dim, i) if dim is not None else arg
                for arg, dim in zip(args[:4], in_dims[:4], strict=True)
            ),
            rounding,
        )
        for i in range(size)
    ]
    return tuple(torch.stack(ends) for ends in zip(*parts, strict=True)), (0, 0)  # type: ignore[return-value]


define(
    "interval_linear(Tensor lower, Tensor upper, Tensor weight, Tensor? bias, str rounding)"
    " -> (Tensor, Tensor)",
    _linear_cpu,
    _linear_fake,
    backward=_linear_backward,
    setup_context=_linear_context,
    vmap=_linear_vmap,
    fallback=_linear_fallback,
)
