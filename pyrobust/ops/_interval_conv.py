"""The image of a box under a two-dimensional convolution: operator ``interval_conv2d``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from pyrobust import _native
from pyrobust._checks import check_choice, check_integer
from pyrobust.ops import _cuda_interval, _interval_precision
from pyrobust.ops._cuda_module import has_cuda_module
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
    native_serves,
    size_of_weight,
    split_ends,
    split_gradients,
    weight_gradient,
)
from pyrobust.ops._interval_nearest import nearest_image, taken_by_torch
from pyrobust.ops._late_products import Product, hand_over
from pyrobust.ops._library import define, dispatcher_needed, plain_eager, refuse_forward_mode

__all__ = [
    "Pair",
    "check_images",
    "four_sides",
    "grad_of_ends",
    "interval_conv2d",
    "map_images",
    "output_size",
    "padded",
    "pair",
]

Pair = int | Sequence[int]
# Values of a layer's larger side that the backward pass works on at once: the six arrays of a block
# stay in a last-level cache, and their memory is used again instead of being paged in for each.
_BLOCK = 1 << 21
_SUBJECT = "interval_conv2d"


def interval_conv2d(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    rounding: str = "real",
    rectified: bool = False,
    allow_infinite: bool = False,
) -> Ends:
    """Image of a box of images under a convolution, as ``torch.nn.functional.conv2d``.

    Patches are unfolded a few output pixels at a time; the unfolded input is never held whole.

    Args:
        lower: ``(B, C, H, W)`` or ``(C, H, W)`` lower ends, float32 or float64.
        upper: upper ends, same dtype and shape. ``lower <= upper`` is not checked.
        weight: ``(O, C / groups, kh, kw)``, same dtype or of 16 bits, which count as they are; at
            most ``2**21`` values per channel.
        bias: ``(O,)``, likewise, or None.
        stride: steps of the window, one number or ``(vertical, horizontal)``, ``>= 1``.
        padding: zeros on both sides, ``"same"`` (stride 1 only) or ``"valid"``.
        dilation: steps inside the window, ``>= 1``.
        groups: divides ``C`` and ``O``.
        rounding: ``"real"``, ``"deployed"`` or ``"nearest"``.
        rectified: whether a ReLU stands before the layer: the box is that of ``max(0, x)``. The
            kernels clip on the way in.
        allow_infinite: whether ends may be infinite: then an operand that is infinite or NaN and a
            bound that overflows give ``[-inf, inf]``. On a GPU nobody looks, and they always do.

    Returns:
        ``(lower, upper)``, each ``(B, O, H', W')``; differentiable in all four tensors (the exact
        derivative of centre-radius propagation; rounding counts as constant).

    Raises:
        TypeError: a dtype other than float32 or float64, or dtypes that differ.
        ValueError: shapes disagree, an option is out of range, or an operand is infinite or NaN.
        OverflowError: the result leaves the range of its dtype.
    """
    tensors = (lower, upper, weight, bias)
    if has_torch_function(tensors):
        options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        options |= {"groups": groups, "rounding": rounding, "rectified": rectified}
        options["allow_infinite"] = allow_infinite
        result: Ends = handle_torch_function(interval_conv2d, tensors, *tensors, **options)
        return result
    check_box(_SUBJECT, lower, upper, rounding)
    finite_ends.start()
    operands = {"lower": lower, "upper": upper, "weight": weight, "bias": bias}
    weight, bias = in_dtype_of(lower, upper, weight, bias)
    tensors = (lower, upper, weight, bias)
    kept = weight.dtype if weight.dtype == torch.bfloat16 else lower.dtype  # in_dtype_of
    check_operand(_SUBJECT, "weight", weight, kept)
    for name, value in (("upper", upper), ("bias", bias)):
        check_operand(_SUBJECT, name, value, lower.dtype)
    if weight.ndim != 4:
        raise ValueError(f"{_SUBJECT}: weight must have 4 dimensions; got {tuple(weight.shape)}.")
    check_bias(_SUBJECT, bias, weight.shape[0])
    check_terms(_SUBJECT, weight[0].numel() if weight.shape[0] else 0)
    check_weight_range(_SUBJECT, "weight", weight, rounding, 2.0**126)
    step, gap = pair(_SUBJECT, "stride", stride), pair(_SUBJECT, "dilation", dilation)
    pad = four_sides(_SUBJECT, padding, weight.shape[2:], step, gap)
    check_images(_SUBJECT, lower, weight.shape, groups)
    output_size(_SUBJECT, lower.shape, weight.shape[2:], step, pad, gap)
    low, high = (lower, upper) if lower.ndim == 4 else (lower.unsqueeze(0), upper.unsqueeze(0))
    through_torch = dispatcher_needed(*tensors)
    if rectified and not (lower.dtype == torch.float32 and plain_eager(*tensors)):
        low, high, rectified = *clipped_at_zero(low, high), False
    arguments = (low, high, weight, bias, step, pad, gap, groups, rounding, rectified)
    if taken_by_torch(rounding, lower, weight, bias):
        window = (step, pad, gap, groups)
        ends: Ends = nearest_image(low, high, weight, bias, _convolution(*window))
    elif through_torch:
        refuse_forward_mode(_SUBJECT, *tensors)
        ends = torch.ops.pyrobust.interval_conv2d(*arguments)
    else:
        ends = _conv_cpu(*arguments, may_wait=True)
    ends = settled(_SUBJECT, ends, operands, allow_infinite)
    return ends if lower.ndim == 4 else (ends[0].squeeze(0), ends[1].squeeze(0))


# --- geometry ---------------------------------------------------------------------------------


def pair(subject: str, name: str, value: Pair) -> list[int]:
    """One number or two, both ``>= 1``."""
    values = [value, value] if isinstance(value, int) else list(value)
    if len(values) != 2:
        raise ValueError(f"{subject}: {name} must be one number or two; got {value}.")
    for number in values:
        check_integer(subject, name, number, 1)
    return values


def four_sides(
    subject: str, padding: Pair | str, kernel: Sequence[int], stride: list[int], dilation: list[int]
) -> list[int]:
    """Zeros at ``[top, bottom, left, right]``."""
    if isinstance(padding, str):
        check_choice(subject, "padding", padding, ("valid", "same"))
        if padding == "valid":
            return [0, 0, 0, 0]
        if stride != [1, 1]:
            raise ValueError(f"{subject}: padding 'same' needs stride 1; got {tuple(stride)}.")
        reach = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
        return [side for total in reach for side in (total // 2, total - total // 2)]
    values = [padding, padding] if isinstance(padding, int) else list(padding)
    if len(values) != 2:
        raise ValueError(f"{subject}: padding must be one number or two; got {padding}.")
    for number in values:
        check_integer(subject, "padding", number, 0)
    return [values[0], values[0], values[1], values[1]]


def check_images(subject: str, images: Tensor, weight_shape: Sequence[int], groups: int) -> None:
    """Raise unless ``images`` is 3- or 4-dimensional with the channels that the weight needs."""
    check_integer(subject, "groups", groups, 1)
    channels = weight_shape[1] * groups
    if images.ndim not in (3, 4) or images.shape[-3] != channels or weight_shape[0] % groups:
        raise ValueError(
            f"{subject}: lower must have shape (B, {channels}, H, W) or ({channels}, H, W) for "
            f"weight {tuple(weight_shape)} in {groups} groups; got {tuple(images.shape)}."
        )


def output_size(
    subject: str,
    images_shape: Sequence[int],
    kernel: Sequence[int],
    stride: list[int],
    pad: list[int],
    dilation: list[int],
) -> list[int]:
    """``[H', W']``; raises ValueError where the window does not fit into the padded image."""
    sizes = []
    for axis in (0, 1):
        inside = images_shape[-2 + axis] + pad[2 * axis] + pad[2 * axis + 1]
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        if inside < reach:
            raise ValueError(
                f"{subject}: a kernel that spans {reach} must fit into the padded size; "
                f"got {inside}."
            )
        sizes.append((inside - reach) // stride[axis] + 1)
    return sizes


# --- operator ---------------------------------------------------------------------------------


def _conv_cpu(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    pad: list[int],
    dilation: list[int],
    groups: int,
    rounding: str,
    rectified: bool = False,
    *,
    may_wait: bool = False,
) -> Ends:
    if lower.dtype != torch.float32:
        window = (stride, pad, dilation, groups)
        return _conv_fallback(lower, upper, weight, bias, *window, rounding, rectified)
    size = output_size(_SUBJECT, lower.shape, weight.shape[2:], stride, pad, dilation)
    before = (
        dense(lower),
        dense(upper),
        dense(weight),
        None if bias is None else dense(bias),
        stride,
        [pad[0], pad[2]],
        dilation,
        groups,
        rounding,
        rectified,
    )
    shape = (lower.shape[0], weight.shape[0], *size)
    product = Product(_native.interval_conv2d, before, (2, 3), shape)
    if may_wait and hand_over(product):
        return product.form, product.form
    ends, finite = product.run()
    finite_ends.note(finite)
    return ends


def padded(images: Tensor, pad: list[int]) -> Tensor:
    """``images`` with zeros at ``[top, bottom, left, right]``."""
    return F.pad(images, (pad[2], pad[3], pad[0], pad[1]))


def _convolution(
    stride: list[int], pad: list[int], dilation: list[int], groups: int
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """``conv2d`` of images, weight and bias, with zeros at ``[top, bottom, left, right]``."""
    even = pad[0] == pad[1] and pad[2] == pad[3]
    inside = [pad[0], pad[2]] if even else [0, 0]

    def convolution(images: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        images = images if even else padded(images, pad)
        return F.conv2d(images, kernel, bias, stride, inside, dilation, groups)

    return convolution


def _conv_fallback(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    pad: list[int],
    dilation: list[int],
    groups: int,
    rounding: str,
    rectified: bool = False,
) -> Ends:
    if rectified:
        lower, upper = clipped_at_zero(lower, upper)

    convolution = _convolution(stride, pad, dilation, groups)

    def product(images: Tensor, kernel: Tensor) -> Tensor:
        return convolution(images, kernel, None)

    shift = None if bias is None else bias.reshape(-1, 1, 1)
    terms = weight[0].numel() if weight.shape[0] else 0
    return outward_image(lower, upper, weight, shift, product, terms=terms, rounding=rounding)


def _conv_cuda(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    pad: list[int],
    dilation: list[int],
    groups: int,
    rounding: str,
    rectified: bool = False,
) -> Ends:
    if rectified:
        lower, upper = clipped_at_zero(lower, upper)
    unsuited = not has_cuda_module() or lower.shape[0] == 0 or operand_error(rounding) > 0
    if lower.dtype != torch.float32 or unsuited:
        return _conv_fallback(lower, upper, weight, bias, stride, pad, dilation, groups, rounding)
    size = output_size(_SUBJECT, lower.shape, weight.shape[2:], stride, pad, dilation)
    low, high = padded(lower, pad), padded(upper, pad)
    shift = None if bias is None else dense(bias)
    kernel = weight.shape[2:]
    return _cuda_interval.convolve(
        low, high, dense(weight), shift, kernel, stride, dilation, groups, size, rounding
    )


def _conv_fake(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    pad: list[int],
    dilation: list[int],
    groups: int,
    rounding: str,
    rectified: bool = False,
) -> Ends:
    size = output_size(_SUBJECT, lower.shape, weight.shape[2:], stride, pad, dilation)
    out = lower.new_empty((lower.shape[0], weight.shape[0], *size))
    return out, torch.empty_like(out)


def _conv_context(ctx: Any, inputs: tuple[Any, ...], output: Ends) -> None:
    lower, upper, weight, bias, *window, _, rectified = inputs
    ctx.save_for_backward(lower, upper, weight)
    ctx.has_bias, ctx.window, ctx.rectified = bias is not None, window, rectified
    ctx.coarse = _interval_precision.coarse_gradients


def _conv_backward(ctx: Any, grad_lower: Tensor, grad_upper: Tensor) -> tuple[Any, ...]:
    """Gradients of the ends, weight and bias, by blocks of images that stay in the cache."""
    lower, upper, weight = ctx.saved_tensors
    wanted = (ctx.needs_input_grad[0] or ctx.needs_input_grad[1], ctx.needs_input_grad[2])
    to_ends: Ends | None = None
    step = lower.shape[0]
    tensors = (lower, upper, weight, grad_lower, grad_upper)
    products = grad_lower.numel() * (weight[0].numel() if weight.shape[0] else 0)
    coarse = ctx.coarse and coarse_serves(products, *tensors)
    size = size_of_weight(weight, coarse=coarse)
    if native_serves(*tensors):
        step = max(1, _BLOCK // max(lower[0].numel(), grad_lower[0].numel()))
        if wanted[0] and step < lower.shape[0]:
            to_ends = torch.empty_like(lower), torch.empty_like(upper)
    sums: list[Tensor] = []  # of both weight gradients and the bias's
    for block in _blocks(step, lower, upper, grad_lower, grad_upper, *(to_ends or ())):
        low, high = block[:2]
        out = (block[4], block[5]) if len(block) > 4 else None
        to_centre, to_radius = split_gradients(block[2], block[3], coarse=coarse)
        parts = []
        if any(wanted):
            # the images' values matter to the weight only
            centre, radius = low, high
            if wanted[1]:
                centre, radius = split_ends(low, high, ctx.rectified, coarse=coarse)
            elif coarse:
                radius = _unread(high)
            from_centre = _gradients(to_centre, centre, weight, ctx.window, wanted)
            from_radius = _gradients(to_radius, radius, size, ctx.window, wanted)
            if wanted[0]:
                before_relu = (low, high) if ctx.rectified else None
                joined = join_gradients(from_centre[0], from_radius[0], before_relu, out)
                to_ends = to_ends or joined
            if wanted[1]:
                # sums over blocks are float32
                parts += [from_centre[1], from_radius[1].to(weight.dtype)]
        if ctx.has_bias and ctx.needs_input_grad[3]:
            parts.append(to_centre.sum((0, 2, 3)))
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
    to_bias = sums.pop() if ctx.has_bias and ctx.needs_input_grad[3] else None
    to_weight = weight_gradient(sums[0], sums[1], weight) if wanted[1] else None
    return *(to_ends or (None, None)), to_weight, to_bias, None, None, None, None, None, None


def _blocks(step: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of ``step`` images of all tensors; one block of everything where ``step`` covers."""
    count = tensors[0].shape[0]
    if step >= count:
        yield tensors
        return
    for begin in range(0, count, step):
        yield tuple(tensor[begin : begin + step] for tensor in tensors)


def _gradients(
    grad: Tensor, images: Tensor, weight: Tensor, window: Sequence[Any], wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of a convolution's images and weight, those that are wanted, in one call."""
    stride, pad, dilation, groups = window
    even = pad[0] == pad[1] and pad[2] == pad[3]
    framed = images if even else padded(images, pad)
    to_images, to_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        framed,
        weight,
        None,
        stride,
        [pad[0], pad[2]] if even else [0, 0],
        dilation,
        False,
        [0, 0],
        groups,
        [*wanted, False],
    )
    if wanted[0] and not even:
        height, width = images.shape[-2:]
        to_images = to_images[..., pad[0] : pad[0] + height, pad[2] : pad[2] + width]
    return to_images, to_weight


def grad_of_ends(
    to_centre: Tensor, to_radius: Tensor, images: Tensor, weight: Tensor, window: Sequence[Any]
) -> Ends:
    """Gradients of the input's ends from those of the output's centre and radius.

    ``images`` gives the shape; ``window`` is stride, padding on four sides, dilation and groups.
    The radius's gradient may be bfloat16, and is multiplied as such then.
    """
    wanted, coarse = (True, False), to_radius.dtype == torch.bfloat16
    centre, _ = _gradients(to_centre, images, weight, window, wanted)
    size, shape = size_of_weight(weight, coarse=coarse), _unread(images) if coarse else images
    radius, _ = _gradients(to_radius, shape, size, window, wanted)
    return join_gradients(centre, radius)


def _unread(images: Tensor) -> Tensor:
    """Shape and dtype of images whose values do not matter to a gradient in bfloat16."""
    return torch.empty_like(images, dtype=torch.bfloat16)


def map_images(operator: Any, info: Any, in_dims: tuple[Any, ...], args: Any) -> Any:
    """Vmap rule: mapped images join the batch; a mapped weight is looped over."""
    dims = tuple(None if isinstance(dim, list) else dim for dim in in_dims)  # lists of numbers
    if any(dim is not None for dim in dims[2:]):
        return map_one_by_one(operator, info, dims, args)
    size = info.batch_size
    low, high = (
        end.movedim(dim, 0) if dim is not None else end.expand(size, *end.shape)
        for end, dim in zip(args[:2], dims[:2], strict=True)
    )
    ends = operator(low.flatten(0, 1), high.flatten(0, 1), *args[2:])
    return tuple(end.unflatten(0, (size, -1)) for end in ends), (0, 0)


def _conv_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    return map_images(torch.ops.pyrobust.interval_conv2d, info, in_dims, args)


define(
    "interval_conv2d(Tensor lower, Tensor upper, Tensor weight, Tensor? bias, int[] stride,"
    " int[] pad, int[] dilation, int groups, str rounding, bool rectified=False)"
    " -> (Tensor, Tensor)",
    _conv_cpu,
    _conv_fake,
    backward=_conv_backward,
    setup_context=_conv_context,
    vmap=_conv_vmap,
    fallback=_conv_fallback,
    cuda=_conv_cuda,
)
