"""Images of boxes under packed layers: ``interval_packed_linear``, ``interval_packed_conv2d``.

The packed weight is a float32 matrix exactly, so its codes are decoded a block of rows at a time
and the float kernels do the rest. With ``activations="int8"`` the dynamic rounding of the input
(half a step of the largest scale that the box allows) is part of the interval.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from pyrobust import _native
from pyrobust._checks import check_choice, check_integer
from pyrobust.ops import _cuda_interval, _interval_precision
from pyrobust.ops import _interval_conv as conv
from pyrobust.ops import _interval_linear as linear
from pyrobust.ops._cuda_matmul import gpu_weight
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
    operand_error,
    settled,
)
from pyrobust.ops._interval_fallback import half_step_of_int8, outward_image
from pyrobust.ops._interval_gradients import coarse_serves, split_gradients
from pyrobust.ops._kept_memory import new_ends
from pyrobust.ops._late_products import Product, hand_over
from pyrobust.ops._library import define, dispatcher_needed, refuse_forward_mode
from pyrobust.ops.formats import levels_of
from pyrobust.ops.matmul import dequantize_codes
from pyrobust.ops.packed_weight import (
    EXTRAS_SCHEMA,
    NO_EXTRAS,
    WeightExtras,
    check_weight,
    native_extras,
)

__all__ = ["interval_packed_conv2d", "interval_packed_linear"]

_ACTIVATIONS = (None, "int8")


def interval_packed_linear(
    lower: Tensor,
    upper: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    in_features: int,
    bits: float,
    group_size: int,
    group_dim: int = 1,
    activations: str | None = None,
    rounding: str = "real",
    extras: WeightExtras | None = None,
    rectified: bool = False,
    allow_infinite: bool = False,
) -> Ends:
    """Image of a box under :func:`pyrobust.ops.matmul.packed_linear`.

    Args:
        lower: ``(..., in_features)`` lower ends, float32 or float64.
        upper: upper ends, same dtype and shape. ``lower <= upper`` is not checked.
        codes: packed codes, as for ``packed_linear``; so are the next two.
        scale: scales of the groups.
        zero: zero-points, or None where symmetric.
        bias: ``(out_features,)`` of the dtype of ``lower``, or None.
        in_features: columns of the weight, at most ``2**21``.
        bits: 1, 1.58, 2, 3, 4 or 8.
        group_size: weights that share a scale.
        group_dim: 1 groups along ``in_features``, 0 along the outputs.
        activations: None bounds the float product; ``"int8"`` the layer that rounds each row of its
            input to 8 bits first.
        rounding: ``"real"``, ``"deployed"`` or ``"nearest"``.
        extras: row scales, codebook and sparse remainder, where the weight has them.
        rectified: whether a ReLU stands before the layer: the box is that of ``max(0, x)``. The
            kernels clip on the way in.
        allow_infinite: whether ends may be infinite: then an operand that is infinite or NaN and a
            bound that overflows give ``[-inf, inf]``. On a GPU nobody looks, and they always do.

    Returns:
        ``(lower, upper)``, each ``(..., out_features)``; differentiable in both ends and ``bias``.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes disagree, an option is out of range, or an operand is infinite or NaN.
        OverflowError: the result leaves the range of its dtype.
    """
    subject = "interval_packed_linear"
    tensors = (lower, upper, codes, scale, zero, bias)
    operands = {"lower": lower, "upper": upper, "scale": scale, "bias": bias}
    through_torch = dispatcher_needed(*tensors)
    finite_ends.start()
    if not through_torch:
        done = _native.eager_interval_packed(
            *tensors, in_features, bits, group_size, group_dim, activations, extras, rounding,
            rectified, torch.get_num_threads(), False, False,
        )  # fmt: skip
        if done is not None:
            finite_ends.note(done[2])
            return settled(subject, (done[0], done[1]), operands, allow_infinite)
    if through_torch and has_torch_function(tensors):
        options: dict[str, Any] = {"in_features": in_features, "bits": bits, "group_dim": group_dim}
        options |= {"group_size": group_size, "activations": activations, "rounding": rounding}
        options |= {"extras": extras, "rectified": rectified, "allow_infinite": allow_infinite}
        result: Ends = handle_torch_function(interval_packed_linear, tensors, *tensors, **options)
        return result
    extras = extras or NO_EXTRAS
    check_choice(subject, "activations", activations, _ACTIVATIONS)
    _check_packed(subject, tensors, in_features, bits, group_size, group_dim, rounding, extras)
    if lower.ndim < 1 or lower.shape[-1] != in_features:
        raise ValueError(
            f"{subject}: lower must have in_features = {in_features} values on its last axis; "
            f"got shape {tuple(lower.shape)}."
        )
    packed = (in_features, float(bits), group_size, group_dim, activations)
    if rectified and (through_torch or lower.dtype != torch.float32):
        lower, upper = clipped_at_zero(lower, upper)
    arguments = (lower, upper, *tensors[2:], *packed, rounding, *extras)
    if through_torch:
        refuse_forward_mode(subject, *tensors)
        ends: Ends = torch.ops.pyrobust.interval_packed_linear(*arguments)
    else:
        ends = _linear_cpu(*arguments, rectified=rectified)
    return settled(subject, ends, operands, allow_infinite)


def interval_packed_conv2d(
    lower: Tensor,
    upper: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    in_channels: int,
    kernel_size: conv.Pair,
    stride: conv.Pair = 1,
    padding: conv.Pair | str = 0,
    dilation: conv.Pair = 1,
    groups: int = 1,
    bits: float,
    group_size: int,
    group_dim: int = 1,
    activations: str | None = None,
    rounding: str = "real",
    extras: WeightExtras | None = None,
    rectified: bool = False,
    allow_infinite: bool = False,
) -> Ends:
    """Image of a box of images under a convolution whose weight is packed.

    The weight is the packed matrix ``(O, in_channels / groups * kh * kw)`` in torch's order; with
    ``activations="int8"`` the layer rounds each unfolded patch with a scale of its own.

    Args:
        lower: ``(B, in_channels, H, W)`` or unbatched lower ends, float32 or float64.
        upper: upper ends, same dtype and shape. ``lower <= upper`` is not checked.
        codes: packed codes, uint8 ``(O, row_bytes)``.
        scale: scales of the groups.
        zero: zero-points, or None where symmetric.
        bias: ``(O,)`` of the dtype of ``lower``, or None.
        in_channels: channels of the images.
        kernel_size: ``kh, kw`` or one number for both, like the next three.
        stride: steps of the window, ``>= 1``.
        padding: zeros on both sides, ``"same"`` (stride 1 only) or ``"valid"``.
        dilation: steps inside the window, ``>= 1``.
        groups: divides ``in_channels`` and ``O``.
        bits: 1, 1.58, 2, 3, 4 or 8.
        group_size: weights that share a scale.
        group_dim: 1 groups along a row of the weight, 0 along the output channels.
        activations: None or ``"int8"``.
        rounding: ``"real"``, ``"deployed"`` or ``"nearest"``.
        extras: row scales, codebook and sparse remainder, where the weight has them.
        rectified: whether a ReLU stands before the layer: the box is that of ``max(0, x)``. The
            kernels clip on the way in.
        allow_infinite: whether ends may be infinite: then an operand that is infinite or NaN and a
            bound that overflows give ``[-inf, inf]``. On a GPU nobody looks, and they always do.

    Returns:
        ``(lower, upper)``, each ``(B, O, H', W')``; differentiable in both ends and ``bias``.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes disagree, an option is out of range, or an operand is infinite or NaN.
        OverflowError: the result leaves the range of its dtype.
    """
    subject = "interval_packed_conv2d"
    tensors = (lower, upper, codes, scale, zero, bias)
    if has_torch_function(tensors):
        options: dict[str, Any] = {"in_channels": in_channels, "kernel_size": kernel_size}
        options |= {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        options |= {"bits": bits, "group_size": group_size, "group_dim": group_dim}
        options |= {"activations": activations, "rounding": rounding, "extras": extras}
        options |= {"rectified": rectified, "allow_infinite": allow_infinite}
        result: Ends = handle_torch_function(interval_packed_conv2d, tensors, *tensors, **options)
        return result
    kernel = conv.pair(subject, "kernel_size", kernel_size)
    step, gap = conv.pair(subject, "stride", stride), conv.pair(subject, "dilation", dilation)
    pad = conv.four_sides(subject, padding, kernel, step, gap)
    check_integer(subject, "groups", groups, 1)
    terms = in_channels // groups * kernel[0] * kernel[1]
    extras = extras or NO_EXTRAS
    check_choice(subject, "activations", activations, _ACTIVATIONS)
    _check_packed(subject, tensors, terms, bits, group_size, group_dim, rounding, extras)
    shape = (codes.shape[0], in_channels // groups, *kernel)
    conv.check_images(subject, lower, shape, groups)
    conv.output_size(subject, lower.shape, kernel, step, pad, gap)
    low, high = (lower, upper) if lower.ndim == 4 else (lower.unsqueeze(0), upper.unsqueeze(0))
    packed = (terms, float(bits), group_size, group_dim, activations)
    window = (kernel, step, pad, gap, groups)
    through_torch = dispatcher_needed(*tensors)
    finite_ends.start()
    if rectified and (through_torch or lower.dtype != torch.float32):
        low, high = clipped_at_zero(low, high)
    arguments = (low, high, *tensors[2:], *packed, *window, rounding, *extras)
    if through_torch:
        refuse_forward_mode(subject, *tensors)
        ends: Ends = torch.ops.pyrobust.interval_packed_conv2d(*arguments)
    else:
        ends = _conv_cpu(*arguments, rectified=rectified, may_wait=True)
    operands = {"lower": lower, "upper": upper, "scale": scale, "bias": bias}
    ends = settled(subject, ends, operands, allow_infinite)
    return ends if lower.ndim == 4 else (ends[0].squeeze(0), ends[1].squeeze(0))


def _check_packed(
    subject: str,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    terms: int,
    bits: float,
    group_size: int,
    group_dim: int,
    rounding: str,
    extras: WeightExtras,
) -> None:
    lower, upper, codes, scale, zero, bias = tensors
    check_box(subject, lower, upper, rounding)
    check_operand(subject, "upper", upper, lower.dtype)
    check_operand(subject, "bias", bias, lower.dtype)
    check_terms(subject, terms)
    check_weight(subject, codes, scale, zero, terms, bits, group_size, group_dim, extras)
    check_bias(subject, bias, codes.shape[0])
    check_weight_range(subject, "scale", scale, rounding, 2.0**116)


# --- operators --------------------------------------------------------------------------------


def _optional(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else dense(tensor)


def _linear_cpu(
    lower: Tensor,
    upper: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    bits: float,
    group_size: int,
    group_dim: int,
    activations: str | None,
    rounding: str,
    *extras: Tensor | None,
    rectified: bool = False,
) -> Ends:
    weight_format = [in_features, levels_of(bits), group_size, group_dim]
    if lower.dtype != torch.float32 or not lower.is_cpu:
        weight = _weight(codes, scale, zero, in_features, bits, group_size, group_dim, extras)
        moved = half_step_of_int8(lower, upper, (-1,)) if activations else None
        return outward_image(
            lower,
            upper,
            weight,
            bias,
            F.linear,
            terms=in_features,
            rounding=rounding,
            half_step=moved,
            packed=True,
        )
    shape, low, high = linear.flat_ends(lower, upper)
    out_low, out_high = new_ends(low, (low.shape[0], codes.shape[0]))
    finite = _native.interval_packed_linear(
        low,
        high,
        dense(codes),
        dense(scale),
        _optional(zero),
        _optional(bias),
        weight_format,
        native_extras(extras),
        activations == "int8",
        rounding,
        rectified,
        out_low,
        out_high,
        torch.get_num_threads(),
    )
    finite_ends.note(finite)
    if len(shape) == 1:
        return out_low, out_high
    return out_low.reshape(*shape, codes.shape[0]), out_high.reshape(*shape, codes.shape[0])


def _linear_cuda(
    lower: Tensor,
    upper: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    terms: int,
    bits: float,
    group_size: int,
    group_dim: int,
    activations: str | None,
    rounding: str,
    *extras: Tensor | None,
) -> Ends:
    """Codes go to the kernel as stored where it takes the format, else decoded."""
    packed = (codes, scale, zero, bias, terms, bits, group_size, group_dim, activations)
    if lower.dtype != torch.float32 or operand_error(rounding):
        return _linear_cpu(lower, upper, *packed, rounding, *extras)
    shape, low, high = linear.flat_ends(lower, upper)
    ends = _packed_product(low, high, *packed, rounding, extras)
    return ends[0].reshape(*shape, codes.shape[0]), ends[1].reshape(*shape, codes.shape[0])


def _packed_product(
    low: Tensor,
    high: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    terms: int,
    bits: float,
    group_size: int,
    group_dim: int,
    activations: str | None,
    rounding: str,
    extras: tuple[Tensor | None, ...],
) -> Ends:
    has_extras = any(part is not None for part in extras)
    codes, shift = dense(codes), _optional(bias)
    fits = _cuda_interval.packed_fits(codes, terms, bits, group_size, group_dim, has_extras)
    if _cuda_interval.decodes_in_blocks(low, codes, terms, fits=fits):
        weight = gpu_weight(codes, scale, zero, terms, bits, group_size, group_dim, *extras)
        int8 = activations == "int8"
        return _cuda_interval.decoded_linear(low, high, weight, shift, rounding, int8)
    if fits:
        parts = (codes, dense(scale), _optional(zero), shift, terms, bits, group_size)
        return _cuda_interval.packed_linear(low, high, *parts, activations == "int8", rounding)
    matrix = _weight(codes, scale, zero, terms, bits, group_size, group_dim, extras)
    return _cuda_interval.linear(
        low, high, matrix, shift, rounding, int8=activations == "int8", packed=True
    )


def _conv_cuda(
    lower: Tensor,
    upper: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    terms: int,
    bits: float,
    group_size: int,
    group_dim: int,
    activations: str | None,
    kernel: list[int],
    stride: list[int],
    pad: list[int],
    dilation: list[int],
    groups: int,
    rounding: str,
    *extras: Tensor | None,
) -> Ends:
    """Convolutions decode the weight: its rows rarely suit the kernel, and patches are many."""
    packed = (codes, scale, zero, bias, terms, bits, group_size, group_dim, activations)
    window = (kernel, stride, pad, dilation, groups)
    if lower.dtype != torch.float32 or lower.shape[0] == 0 or operand_error(rounding):
        return _conv_cpu(lower, upper, *packed, *window, rounding, *extras)
    size = conv.output_size("interval_packed_conv2d", lower.shape, kernel, stride, pad, dilation)
    weight = _weight(codes, scale, zero, terms, bits, group_size, group_dim, extras)
    low, high = conv.padded(lower, pad), conv.padded(upper, pad)
    shift, int8 = _optional(bias), activations == "int8"
    return _cuda_interval.convolve(
        low, high, weight, shift, kernel, stride, dilation, groups, size, rounding,
        int8=int8, packed=True,
    )  # fmt: skip


def _weight(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    terms: int,
    bits: float,
    group_size: int,
    group_dim: int,
    extras: tuple[Tensor | None, ...] = (),
) -> Tensor:
    return dequantize_codes(
        codes,
        scale,
        zero,
        in_features=terms,
        bits=bits,
        group_size=group_size,
        group_dim=group_dim,
        extras=WeightExtras(*extras),
    )


def _linear_fake(lower: Tensor, upper: Tensor, codes: Tensor, *_: Any) -> Ends:
    out = lower.new_empty((*lower.shape[:-1], codes.shape[0]))
    return out, torch.empty_like(out)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Ends) -> None:
    lower, _, codes, scale, zero, bias, *options = inputs
    ctx.save_for_backward(lower, codes, scale, zero, *options[-5:])
    ctx.has_bias, ctx.options = bias is not None, options
    ctx.coarse = _interval_precision.coarse_gradients


def _split(ctx: Any, lower: Tensor, grad_lower: Tensor, grad_upper: Tensor) -> Ends:
    """Gradients of centre and radius, the radius's in bfloat16 where its products may be."""
    products = grad_lower.numel() * ctx.options[0]
    coarse = ctx.coarse and coarse_serves(products, lower, grad_lower, grad_upper)
    return split_gradients(grad_lower, grad_upper, coarse=coarse)


def _linear_backward(ctx: Any, grad_lower: Tensor, grad_upper: Tensor) -> tuple[Any, ...]:
    lower, codes, scale, zero, *extras = ctx.saved_tensors
    to_centre, to_radius = _split(ctx, lower, grad_lower, grad_upper)
    grads: list[Tensor | None] = [None] * 17
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        packed: tuple[int, float, int, int] = tuple(ctx.options[:4])
        weight = _weight(codes, scale, zero, *packed, tuple(extras)).to(lower.dtype)
        grads[0], grads[1] = linear.grad_of_ends(to_centre, to_radius, weight)
    if ctx.has_bias and ctx.needs_input_grad[5]:
        grads[5] = to_centre.reshape(-1, to_centre.shape[-1]).sum(0)
    return tuple(grads)


def _linear_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    return linear.map_boxes(torch.ops.pyrobust.interval_packed_linear, info, in_dims, args)


def _conv_cpu(
    lower: Tensor,
    upper: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    terms: int,
    bits: float,
    group_size: int,
    group_dim: int,
    activations: str | None,
    kernel: list[int],
    stride: list[int],
    pad: list[int],
    dilation: list[int],
    groups: int,
    rounding: str,
    *extras: Tensor | None,
    rectified: bool = False,
    may_wait: bool = False,
) -> Ends:
    if lower.dtype != torch.float32 or not lower.is_cpu:
        weight = _weight(codes, scale, zero, terms, bits, group_size, group_dim, extras)

        def product(images: Tensor, matrix: Tensor) -> Tensor:
            filters = matrix.reshape(matrix.shape[0], -1, *kernel)
            return F.conv2d(conv.padded(images, pad), filters, None, stride, 0, dilation, groups)

        return outward_image(
            lower,
            upper,
            weight,
            None if bias is None else bias.reshape(-1, 1, 1),
            product,
            terms=terms,
            rounding=rounding,
            half_step=half_step_of_int8(lower, upper, (1, 2, 3)) if activations else None,
            packed=True,
        )
    size = conv.output_size("interval_packed_conv2d", lower.shape, kernel, stride, pad, dilation)
    before = (
        dense(lower),
        dense(upper),
        dense(codes),
        dense(scale),
        _optional(zero),
        _optional(bias),
        [terms, levels_of(bits), group_size, group_dim],
        native_extras(extras),
        activations == "int8",
        kernel,
        stride,
        [pad[0], pad[2]],
        dilation,
        groups,
        rounding,
        rectified,
    )
    shape = (lower.shape[0], codes.shape[0], *size)
    late = Product(_native.interval_packed_conv2d, before, (2, 3, 4, 5, 7), shape)
    if may_wait and hand_over(late):
        return late.form, late.form
    ends, finite = late.run()
    finite_ends.note(finite)
    return ends


def _conv_fake(lower: Tensor, upper: Tensor, codes: Tensor, *rest: Any) -> Ends:
    kernel, stride, pad, dilation = rest[8:12]
    size = conv.output_size("interval_packed_conv2d", lower.shape, kernel, stride, pad, dilation)
    out = lower.new_empty((lower.shape[0], codes.shape[0], *size))
    return out, torch.empty_like(out)


def _conv_backward(ctx: Any, grad_lower: Tensor, grad_upper: Tensor) -> tuple[Any, ...]:
    lower, codes, scale, zero, *extras = ctx.saved_tensors
    kernel, stride, pad, dilation, groups = ctx.options[5:10]
    to_centre, to_radius = _split(ctx, lower, grad_lower, grad_upper)
    grads: list[Tensor | None] = [None] * 22
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        packed: tuple[int, float, int, int] = tuple(ctx.options[:4])
        weight = _weight(codes, scale, zero, *packed, tuple(extras)).to(lower.dtype)
        weight = weight.reshape(weight.shape[0], -1, *kernel)
        window = (stride, pad, dilation, groups)
        grads[0], grads[1] = conv.grad_of_ends(to_centre, to_radius, lower, weight, window)
    if ctx.has_bias and ctx.needs_input_grad[5]:
        grads[5] = to_centre.sum((0, 2, 3))
    return tuple(grads)


def _conv_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    return conv.map_images(torch.ops.pyrobust.interval_packed_conv2d, info, in_dims, args)


_INPUTS = (
    "Tensor lower, Tensor upper, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias,"
    " int terms, float bits, int group_size, int group_dim, str? activations"
)
define(
    f"interval_packed_linear({_INPUTS}, str rounding, {EXTRAS_SCHEMA}) -> (Tensor, Tensor)",
    _linear_cpu,
    _linear_fake,
    backward=_linear_backward,
    setup_context=_context,
    vmap=_linear_vmap,
    cuda=_linear_cuda,
)
define(
    f"interval_packed_conv2d({_INPUTS}, int[] kernel, int[] stride, int[] pad, int[] dilation,"
    f" int groups, str rounding, {EXTRAS_SCHEMA}) -> (Tensor, Tensor)",
    _conv_cpu,
    _conv_fake,
    backward=_conv_backward,
    setup_context=_context,
    vmap=_conv_vmap,
    cuda=_conv_cuda,
)
