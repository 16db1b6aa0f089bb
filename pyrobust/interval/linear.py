"""Rules of linear layers and of packed ones, and what the rules of all linear maps share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrobust import _native
from pyrobust.interval.arithmetic import add
from pyrobust.interval.deferred import may_wait, run_or_wait
from pyrobust.interval.errors import check_shape, name_of
from pyrobust.interval.finite import check_result
from pyrobust.interval.operands import Rule, refuse, require_box
from pyrobust.interval.outward import (
    bound_of_roundings,
    enclose,
    infinite_where_beyond,
    straight_through,
)
from pyrobust.interval.type import Interval, adopt, unclipped, wrap
from pyrobust.ops import matmul as packed_matmul
from pyrobust.ops import packed_conv
from pyrobust.ops._conv_window import check_input, window_of
from pyrobust.ops._interval_checks import Ends, finite_ends, is_deployed
from pyrobust.ops._interval_fallback import outward_image
from pyrobust.ops._library import differentiation_transforms
from pyrobust.ops.interval import (
    interval_linear,
    interval_packed_conv2d,
    interval_packed_linear,
)
from pyrobust.ops.packed_weight import WeightExtras

__all__ = [
    "RULES",
    "UNCHECKED",
    "affine",
    "image",
    "linear",
    "looked_at",
    "plain",
    "transformed",
]

UNCHECKED: dict[str, Any] = {"allow_infinite": True}  # refused here, with the place in the model


def plain(what: str, *values: Any) -> None:
    """Refuse boxes as weight or bias of ``what``."""
    if any(isinstance(value, Interval) for value in values):
        raise refuse(f"{what} with intervals as weight or bias")


def transformed() -> bool:
    """Whether torch.func is at work, whose gradients custom operators do not support."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is not None and not torch.compiler.is_compiling() and bool(active())


def _quick_linear(input: Any, weight: Any, bias: Any = None) -> Interval | None:
    done: Interval | None = _native.box_linear(
        input, weight, bias, torch.get_num_threads(), torch.is_grad_enabled()
    )
    return done


def linear(input: Any, weight: Any, bias: Any = None) -> Interval:
    """``x W^T + b``."""
    box = require_box(input, "linear")
    if isinstance(weight, Interval) or isinstance(bias, Interval):
        raise refuse("linear with intervals as weight or bias")
    if transformed():
        result = affine(box, weight, bias, F.linear, weight.shape[1])
        return looked_at(box, F.linear, result)
    lower, upper, rectified = unclipped(box)
    rounding = box.rounding
    options: dict[str, Any] = {"rounding": rounding, "rectified": rectified, **UNCHECKED}
    return image(box, F.linear, lambda: interval_linear(lower, upper, weight, bias, **options))


def image(
    box: Interval, function: Any, call: Callable[[], tuple[Tensor, Tensor]], *, waits: bool = False
) -> Interval:
    """The image of ``box`` under ``function`` that an operator gives; it may ``wait`` if it can.

    Kernels of ours say whether its ends are finite; those of others must be looked at.
    """
    if torch.compiler.is_compiling():
        return looked_at(box, function, wrap(*call(), box.rounding))
    finite_ends.start()
    if waits and may_wait():
        ends, waiting = run_or_wait(call, name_of(function), box.rounding)
        if waiting is not None:
            return waiting
        assert ends is not None
        lower, upper = ends
    else:
        lower, upper = call()
    if finite_ends.all:
        return adopt(lower, upper, box.rounding)
    return looked_at(box, function, wrap(lower, upper, box.rounding))


def looked_at(box: Interval, function: Any, result: Interval) -> Interval:
    """``result`` of ``function``, refused where its ends are infinite."""
    check_result(name_of(function), result.lower, result.upper, (box,), takes_infinity=False)
    return result


def affine(
    box: Interval,
    weight: Tensor,
    bias: Tensor | None,
    product: Callable[[Tensor, Tensor], Tensor],
    terms: int,
) -> Interval:
    """Image under ``product(x, weight) + bias``, for a product linear in both arguments.

    Args:
        box: the input.
        weight: dtype of the box.
        bias: of a shape that broadcasts to the product, or None.
        product: works in any float dtype.
        terms: at most so many products are summed into one output.
    """
    if weight.dtype != box.dtype:
        raise TypeError(
            f"Interval: weight must have the dtype of the box, {box.dtype}; got {weight.dtype}."
        )
    graded = box.requires_grad or weight.requires_grad or getattr(bias, "requires_grad", False)
    if not graded and not differentiation_transforms():
        ends = outward_image(
            box.lower, box.upper, weight, bias, product, terms=terms, rounding=box.rounding
        )
        return wrap(*ends, box.rounding)
    centre, radius = box.center, box.radius
    middle, reach = product(centre, weight), product(radius, weight.abs())
    middle = middle if bias is None else middle + bias
    with torch.no_grad():
        low, high = outward_image(
            box.lower.detach(),
            box.upper.detach(),
            weight.detach(),
            None if bias is None else bias.detach(),
            product,
            terms=terms,
            rounding=box.rounding,
        )
    return wrap(
        straight_through(middle - reach, low), straight_through(middle + reach, high), box.rounding
    )


def _packed_linear(
    x: Any,
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
    extras: WeightExtras | None = None,
) -> Interval:
    box = require_box(x, "packed_linear")
    lower, upper, rectified = unclipped(box)
    shift = None if bias is None else bias.to(box.dtype)
    options: dict[str, Any] = {
        "in_features": in_features,
        "bits": bits,
        "group_size": group_size,
        "group_dim": group_dim,
        "activations": activations,
        "rounding": box.rounding,
        "extras": extras,
        "rectified": rectified,
        **UNCHECKED,
    }
    return image(
        box,
        packed_matmul.packed_linear,
        lambda: interval_packed_linear(lower, upper, codes, scale, zero, shift, **options),
    )


def _packed_conv(function: Any, axes: int) -> Rule:
    """The rule of a packed convolution of lines or of images; lines are images of height 1."""
    subject = function.__name__

    def rule(
        x: Any,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        bias: Tensor | None = None,
        **options: Any,
    ) -> Interval:
        box = require_box(x, subject)
        shift = None if bias is None else bias.to(box.dtype)
        lower, upper, options["rectified"] = unclipped(box)
        options |= {"rounding": box.rounding, **UNCHECKED}
        if axes == 1:
            options |= _image_window(subject, lower, codes.shape[0], options)
            lower, upper = lower.unsqueeze(-2), upper.unsqueeze(-2)

        def call() -> Ends:
            ends = interval_packed_conv2d(lower, upper, codes, scale, zero, shift, **options)
            return (ends[0].squeeze(-2), ends[1].squeeze(-2)) if axes == 1 else ends

        return image(box, function, call, waits=box.ndim == axes + 2)

    return rule


def _image_window(subject: str, x: Tensor, rows: int, options: dict[str, Any]) -> dict[str, Any]:
    """The window that lines ``x`` are given, as that of images; checked in the words of lines."""
    names = ("kernel_size", "stride", "padding", "dilation")
    window, pad = window_of(subject, 1, *(options[name] for name in names))
    channels, groups = options["in_channels"], options["groups"]
    check_input(subject, 1, x, channels, groups, rows, window, pad)
    kernel, stride, dilation = window
    same = options["padding"] if isinstance(options["padding"], str) else (0, pad[0])
    return dict(zip(names, (kernel, stride, same, dilation), strict=True))


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Interval:
    if beta != 1 or alpha != 1 or isinstance(mat2, Interval):
        raise refuse("addmm with beta, alpha or an interval as second matrix")
    matrices = mat1.ndim == 2 and mat2.ndim == 2
    check_shape("addmm", matrices, "a matrix as mat1", mat1.shape)
    spread = torch.broadcast_shapes(input.shape, (mat1.shape[0], mat2.shape[1]))
    fits = tuple(spread) == (mat1.shape[0], mat2.shape[1])
    check_shape("addmm", fits, "an input that expands to the product", input.shape)
    if isinstance(input, Tensor) and input.shape == mat2.shape[1:]:
        return linear(mat1, mat2.mT, input)
    total = add(linear(mat1, mat2.mT), input)
    return _summed_in_any_order(total, input, int(mat2.shape[0]))


def _summed_in_any_order(total: Interval, term: Any, products: int) -> Interval:
    """``total`` of a product and ``term``, also where evaluations start their sums with the term.

    By the proof of ``csrc/interval/interval.h`` a term b adds H |b| to the error, and at most
    another H |b| to that of the sum, which is no larger than |sum W x| + |b|.
    """
    if not is_deployed(total.rounding):
        return total
    with torch.no_grad():
        ends = (term.lower, term.upper) if isinstance(term, Interval) else (term, term)
        size = torch.maximum(ends[0].abs(), ends[1].abs()).double()
        error = bound_of_roundings(products + 2, total.dtype) * size + torch.finfo(total.dtype).tiny
        error = error + infinite_where_beyond(size * products, total.dtype)
    low, high = enclose(total.lower.double(), total.upper.double(), error, total.dtype)
    return wrap(low, high, total.rounding)


RULES: dict[str, Rule] = {"linear": linear, "addmm": _addmm}

QUICK: dict[Any, Rule] = {F.linear: _quick_linear}
"""Asked before the rule in plain eager mode: one native call that gives the box, or None."""

PACKED_RULES: dict[Any, Rule] = {
    packed_matmul.packed_linear: _packed_linear,
    packed_conv.packed_conv1d: _packed_conv(packed_conv.packed_conv1d, 1),
    packed_conv.packed_conv2d: _packed_conv(packed_conv.packed_conv2d, 2),
}
