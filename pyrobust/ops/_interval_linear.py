"""The image of a box under a linear map: operator ``interval_linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from pyrobust import _native
from pyrobust.ops import _cuda_interval, _interval_precision
from pyrobust.ops._cuda_module import has_cuda_module
from pyrobust.ops._dense_product import product
from pyrobust.ops._interval_checks import (
    Ends,
    check_bias,
    check_box,
    check_operand,
    check_terms,
    check_weight_range,
    clipped_at_zero,
    dense,
    finite_ends,
    in_dtype_of,
    map_one_by_one,
    operand_error,
    settled,
)
from pyrobust.ops._interval_fallback import outward_image
from pyrobust.ops._interval_gradients import (
    coarse_serves,
    join_gradients,
    size_of_weight,
    split_ends,
    split_gradients,
    weight_gradient,
)
from pyrobust.ops._interval_nearest import nearest_image, taken_by_torch
from pyrobust.ops._kept_memory import new_ends
from pyrobust.ops._library import define, dispatcher_needed, plain_eager, refuse_forward_mode

__all__ = ["flat_ends", "grad_of_ends", "interval_linear", "map_boxes"]


def interval_linear(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rounding: str = "real",
    rectified: bool = False,
    allow_infinite: bool = False,
) -> Ends:
    """Image of a box under ``x @ weight.T + bias``.

    Args:
        lower: ``(..., K)`` lower ends, float32 or float64.
        upper: ``(..., K)`` upper ends, same dtype and shape. ``lower <= upper`` is not checked.
        weight: ``(N, K)``, same dtype or of 16 bits, ``K <= 2**21``. Halves count as they are.
        bias: ``(N,)``, likewise, or None.
        rounding: ``"real"``, ``"deployed"`` or ``"nearest"``.
        rectified: whether a ReLU stands before the layer: the box is that of ``max(0, x)``. The
            kernels clip on the way in.
        allow_infinite: whether ends may be infinite: then an operand that is infinite or NaN and a
            bound that overflows give ``[-inf, inf]``. On a GPU nobody looks, and they always do.

    Returns:
        ``(lower, upper)``, each ``(..., N)``; differentiable in all four tensors (the exact
        derivative of centre-radius propagation; rounding counts as constant).

    Raises:
        TypeError: a dtype other than float32 or float64, or dtypes that differ.
        ValueError: shapes disagree, ``rounding`` is unknown, or an operand is infinite or NaN.
        OverflowError: the result leaves the range of its dtype.

    Example:
        >>> weight = torch.tensor([[1.0, -1.0]])
        >>> lower, upper = interval_linear(torch.zeros(2), torch.ones(2), weight)
        >>> bool(lower <= -1), bool(upper >= 1)
        (True, True)
    """
    tensors = (lower, upper, weight, bias)
    options: dict[str, Any] = {"rounding": rounding, "rectified": rectified}
    plain = not dispatcher_needed(*tensors)
    if not plain and has_torch_function(tensors):
        options["allow_infinite"] = allow_infinite
        result: Ends = handle_torch_function(interval_linear, tensors, *tensors, **options)
        return result
    finite_ends.start()
    ends = _linear_image(*tensors, plain=plain, **options)
    operands = {"lower": lower, "upper": upper, "weight": weight, "bias": bias}
    return settled("interval_linear", ends, operands, allow_infinite)


def _linear_image(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    rounding: str,
    rectified: bool,
    plain: bool,
) -> Ends:
    """The image, whose ends may be infinite; ``plain`` eager inference goes past the dispatcher."""
    if plain:
        threads = torch.get_num_threads()
        done = _native.eager_interval_linear(
            lower, upper, weight, bias, rounding, rectified, threads, False, False
        )
        if done is not None:
            finite_ends.note(done[2])
            return done[0], done[1]
    weight, bias = in_dtype_of(lower, upper, weight, bias)
    tensors = (lower, upper, weight, bias)
    _check_linear(lower, upper, weight, bias, rounding)
    if rectified and not (lower.dtype == torch.float32 and plain_eager(*tensors)):
        lower, upper, rectified = *clipped_at_zero(lower, upper), False
    if plain:
        return _linear_cpu(lower, upper, weight, bias, rounding, rectified)
    if taken_by_torch(rounding, lower, weight, bias):
        return nearest_image(lower, upper, weight, bias, torch.nn.functional.linear)
    refuse_forward_mode("interval_linear", *tensors)
    ends: Ends = torch.ops.pyrobust.interval_linear(lower, upper, weight, bias, rounding, rectified)
    return ends


def _check_linear(
    lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor | None, rounding: str
) -> None:
    subject = "interval_linear"
    check_box(subject, lower, upper, rounding)
    kept = weight.dtype if weight.dtype == torch.bfloat16 else lower.dtype  # in_dtype_of
    check_operand(subject, "weight", weight, kept)
    for name, value in (("upper", upper), ("bias", bias)):
        check_operand(subject, name, value, lower.dtype)
    if weight.ndim != 2:
        raise ValueError(f"{subject}: weight must have shape (N, K); got {tuple(weight.shape)}.")
    if lower.ndim < 1 or lower.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{subject}: lower must have last size {weight.shape[1]} (weight is "
            f"{tuple(weight.shape)}); got shape {tuple(lower.shape)}."
        )
    check_terms(subject, weight.shape[1])
    check_weight_range(subject, "weight", weight, rounding, 2.0**126)
    check_bias(subject, bias, weight.shape[0])


def _linear_cpu(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rounding: str,
    rectified: bool = False,
) -> Ends:
    if lower.dtype != torch.float32:
        return _linear_fallback(lower, upper, weight, bias, rounding, rectified)
    shape, low, high = flat_ends(lower, upper)
    out_low, out_high = new_ends(low, (low.shape[0], weight.shape[0]))
    finite = _native.interval_linear(
        low,
        high,
        dense(weight),
        None if bias is None else dense(bias),
        rounding,
        rectified,
        out_low,
        out_high,
        torch.get_num_threads(),
    )
    finite_ends.note(finite)
    if len(shape) == 1:
        return out_low, out_high
    return out_low.reshape(*shape, weight.shape[0]), out_high.reshape(*shape, weight.shape[0])


def _linear_cuda(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rounding: str,
    rectified: bool = False,
) -> Ends:
    if lower.dtype != torch.float32 or not has_cuda_module() or operand_error(rounding):
        return _linear_fallback(lower, upper, weight, bias, rounding, rectified)
    if rectified:
        lower, upper = clipped_at_zero(lower, upper)
    shape, low, high = flat_ends(lower, upper)
    shift = None if bias is None else dense(bias)
    ends = _cuda_interval.linear(low, high, dense(weight), shift, rounding)
    return ends[0].reshape(*shape, weight.shape[0]), ends[1].reshape(*shape, weight.shape[0])


def flat_ends(lower: Tensor, upper: Tensor) -> tuple[torch.Size, Tensor, Tensor]:
    """Leading axes, and both ends as dense matrices."""
    leading, terms = lower.shape[:-1], lower.shape[-1]
    if len(leading) == 1:
        return leading, dense(lower), dense(upper)
    count = leading.numel()  # reshape(-1, 0) would be ambiguous
    return leading, dense(lower.reshape(count, terms)), dense(upper.reshape(count, terms))


def _linear_fallback(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rounding: str,
    rectified: bool = False,
) -> Ends:
    if rectified:
        lower, upper = clipped_at_zero(lower, upper)
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
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rounding: str,
    rectified: bool = False,
) -> Ends:
    out = lower.new_empty((*lower.shape[:-1], weight.shape[0]))
    return out, torch.empty_like(out)


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Ends) -> None:
    lower, upper, weight, bias, _, rectified = inputs
    ctx.save_for_backward(lower, upper, weight)
    ctx.has_bias, ctx.rectified = bias is not None, rectified
    ctx.coarse = _interval_precision.coarse_gradients


def _linear_backward(ctx: Any, grad_lower: Tensor, grad_upper: Tensor) -> tuple[Any, ...]:
    """Derivative of ``c W' -+ r |W|'`` at ``c = (u + l) / 2``, ``r = (u - l) / 2``."""
    lower, upper, weight = ctx.saved_tensors
    rows, terms = weight.shape
    products = grad_lower.numel() * terms
    coarse = ctx.coarse and coarse_serves(products, lower, upper, weight, grad_lower, grad_upper)
    to_centre, to_radius = split_gradients(grad_lower, grad_upper, coarse=coarse)
    grads: list[Tensor | None] = [None, None, None, None]
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        before_relu = (lower, upper) if ctx.rectified else None
        grads[0], grads[1] = grad_of_ends(to_centre, to_radius, weight, before_relu)
    flat_centre = to_centre.reshape(-1, rows)
    if ctx.needs_input_grad[2]:
        centre, radius = split_ends(lower, upper, ctx.rectified, coarse=coarse)
        from_centre = product(flat_centre.T, centre.reshape(-1, terms))
        from_radius = product(to_radius.reshape(-1, rows).T, radius.reshape(-1, terms))
        grads[2] = weight_gradient(from_centre, from_radius, weight)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        grads[3] = flat_centre.sum(0)
    return *grads, None, None


def grad_of_ends(
    to_centre: Tensor, to_radius: Tensor, weight: Tensor, before_relu: Ends | None = None
) -> Ends:
    """Gradients of the input's ends from those of the output's centre and radius.

    The radius's may be bfloat16, and is multiplied as such then.
    """
    rows = weight.shape[0]
    shape = (*to_centre.shape[:-1], weight.shape[1])
    centre = product(to_centre.reshape(-1, rows), weight).reshape(shape)
    size = size_of_weight(weight, coarse=to_radius.dtype == torch.bfloat16)
    radius = product(to_radius.reshape(-1, rows), size).reshape(shape)
    return join_gradients(centre, radius, before_relu)


def map_boxes(operator: Any, info: Any, in_dims: tuple[Any, ...], args: Any) -> Any:
    """Vmap rule: mapped ends become one more leading axis; a mapped weight is looped over."""
    if any(dim is not None for dim in in_dims[2:]):
        return map_one_by_one(operator, info, in_dims, args)
    low, high = (
        end.movedim(dim, 0) if dim is not None else end.expand(info.batch_size, *end.shape)
        for end, dim in zip(args[:2], in_dims[:2], strict=True)
    )
    return operator(low, high, *args[2:]), (0, 0)


def _linear_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    return map_boxes(torch.ops.pyrobust.interval_linear, info, in_dims, args)


define(
    "interval_linear(Tensor lower, Tensor upper, Tensor weight, Tensor? bias, str rounding,"
    " bool rectified=False) -> (Tensor, Tensor)",
    _linear_cpu,
    _linear_fake,
    backward=_linear_backward,
    setup_context=_linear_context,
    vmap=_linear_vmap,
    fallback=_linear_fallback,
    cuda=_linear_cuda,
)
