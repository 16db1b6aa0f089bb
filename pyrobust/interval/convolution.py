"""Rules of convolutions: the kernels of two dimensions serve one and three, and transposed ones.

A line is an image of height 1. Slices under a window of three dimensions count as more channels of
images. A transposed convolution is one convolution for each remainder of the output's place modulo
the stride, with the taps that reach such places. Padding, moves of elements and further zeros in a
sum are exact, so the promises are those of ``interval_conv2d``. Float64 boxes and functorch's
transforms take the same method in torch operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrobust.interval.errors import check_shape
from pyrobust.interval.linear import UNCHECKED, affine, image, looked_at, plain, transformed
from pyrobust.interval.operands import Rule, require_box
from pyrobust.interval.type import Interval, unclipped, with_flushed
from pyrobust.ops._interval_checks import Ends, finite_ends, is_deployed
from pyrobust.ops.interval import interval_conv2d

__all__ = ["RULES"]

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class _Window:
    """Geometry of a convolution, one number an axis; zeros ``(before, after)``, cut if negative."""

    stride: Sizes
    zeros: tuple[tuple[int, int], ...]
    dilation: Sizes
    groups: int


@dataclass(frozen=True)
class _Kernel:
    """What a convolution is called with beside the ends and their window."""

    weight: Tensor
    bias: Tensor | None
    rounding: str
    rectified: bool


def _sizes(value: Any, dimensions: int) -> Sizes:
    if isinstance(value, int):
        return (value,) * dimensions
    sizes = tuple(value)
    return sizes * dimensions if len(sizes) == 1 else sizes


def _zeros(padding: Any, kernel: Sequence[int], dilation: Sizes) -> tuple[tuple[int, int], ...]:
    if padding == "same":
        reach = [gap * (size - 1) for size, gap in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in reach)
    sizes = _sizes(0 if padding == "valid" else padding, len(dilation))
    return tuple((size, size) for size in sizes)


# --- ends by the kernels ----------------------------------------------------------------------


def _framed(end: Tensor, zeros: Sequence[tuple[int, int]]) -> Tensor:
    if not any(before or after for before, after in zeros):
        return end
    return F.pad(end, [size for pair in reversed(zeros) for size in pair])


def _image(ends: Ends, kernel: _Kernel, window: _Window) -> Ends:
    """Ends of the convolution of ``(B, C, ...)``, of one to three dimensions."""
    even = all(before == after >= 0 for before, after in window.zeros)
    dimensions = len(window.stride)
    if dimensions == 3 or not even:
        low, high = (_framed(end, window.zeros) for end in ends)
        ends, padding = (low, high), (0,) * dimensions
    else:
        padding = tuple(before for before, _ in window.zeros)
    if dimensions == 3:
        return _image_of_slices(ends, kernel, window)
    weight, stride, dilation = kernel.weight, window.stride, window.dilation
    if dimensions == 1:
        ends = ends[0].unsqueeze(-2), ends[1].unsqueeze(-2)
        weight, stride, dilation = weight.unsqueeze(-2), (1, *stride), (1, *dilation)
        padding = (0, *padding)
    low, high = interval_conv2d(
        *ends,
        weight,
        kernel.bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=window.groups,
        rounding=kernel.rounding,
        rectified=kernel.rectified,
        **UNCHECKED,
    )
    return (low.squeeze(-2), high.squeeze(-2)) if dimensions == 1 else (low, high)


def _image_of_slices(ends: Ends, kernel: _Kernel, window: _Window) -> Ends:
    """Three dimensions, without padding: the slices under a window as channels of one image."""
    weight, step, gap = kernel.weight, window.stride[0], window.dilation[0]
    reach = gap * (weight.shape[2] - 1)

    def slices(end: Tensor) -> Tensor:
        last = end.shape[2] - reach
        parts = [end[:, :, i * gap : i * gap + last : step] for i in range(weight.shape[2])]
        joined = torch.stack(parts, 2).movedim(3, 1)  # (B, depth, C, taps, H, W)
        return joined.flatten(2, 3).flatten(0, 1)

    flat = _Kernel(weight.flatten(1, 2), kernel.bias, kernel.rounding, kernel.rectified)
    inner = _Window(window.stride[1:], ((0, 0),) * 2, window.dilation[1:], window.groups)
    low, high = _image((slices(ends[0]), slices(ends[1])), flat, inner)
    count = ends[0].shape[0]
    low, high = (end.unflatten(0, (count, -1)).movedim(1, 2) for end in (low, high))
    return low.contiguous(), high.contiguous()


# --- transposed -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Phase:
    """Of one axis: the outputs ``first``, ``first + stride``, ..., and the taps that reach them."""

    first: int
    count: int
    taps: tuple[int, ...]  # in the order of the inputs that they meet
    gap: int
    zeros: tuple[int, int]


def _phases(
    inputs: int, outputs: int, taps: int, stride: int, padding: int, gap: int
) -> list[_Phase]:
    """Output o is reached from input i by tap t where ``o = i stride - padding + t gap``."""
    phases, common = [], gcd(stride, gap)
    for first in range(min(stride, outputs)):
        reached = [t for t in range(taps) if (first + padding - t * gap) % stride == 0]
        reached.reverse()
        count = (outputs - first + stride - 1) // stride
        start = (first + padding - reached[0] * gap) // stride if reached else 0
        end = start + count - 1 + (len(reached) - 1) * (gap // common)
        zeros = -start, end - inputs + 1
        phases.append(_Phase(first, count, tuple(reached), gap // common, zeros))
    return phases


def _transposed_image(
    ends: Ends, kernel: _Kernel, axes: Sequence[Sequence[_Phase]], stride: Sizes, groups: int
) -> Ends:
    """Ends of the transposed convolution of ``(B, C, ...)``; finite where all parts are."""
    weight = kernel.weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    channels, dimensions = weight.shape[0], len(stride)
    shape = (ends[0].shape[0], channels, *(sum(phase.count for phase in axis) for axis in axes))
    shift = ends[0].new_zeros(channels) if kernel.bias is None else kernel.bias.to(ends[0].dtype)
    shift = shift.reshape(-1, *[1] * dimensions)
    alone = shift, shift  # where no tap reaches
    if is_deployed(kernel.rounding):
        alone = with_flushed(shift, shift, shift.dtype)
    reached = all(phase.taps for axis in axes for phase in axis)
    out = [end.new_empty(shape) if reached else end.expand(shape).clone() for end in alone]
    finite: bool | None = True
    for phases in product(*axes):
        if not all(phase.taps for phase in phases):
            continue
        taps = weight
        for axis, phase in enumerate(phases):
            taps = taps.index_select(2 + axis, torch.tensor(phase.taps, device=taps.device))
        window = _Window(
            (1,) * dimensions,
            tuple(phase.zeros for phase in phases),
            tuple(phase.gap for phase in phases),
            groups,
        )
        part = _Kernel(taps, kernel.bias, kernel.rounding, kernel.rectified)
        places = [slice(p.first, None, s) for p, s in zip(phases, stride, strict=True)]
        at: tuple[Any, ...] = (..., *places)
        for whole, end in zip(out, _image(ends, part, window), strict=True):
            whole[at] = end
        if not torch.compiler.is_compiling():
            finite = finite_ends.all and finite
            finite_ends.all = finite
    return out[0], out[1]


# --- rules ------------------------------------------------------------------------------------


def _conv2d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Interval:
    box = require_box(input, "conv2d")
    plain("conv2d", weight, bias)
    if transformed():
        return _by_torch("conv2d", box, weight, bias, stride, padding, dilation, groups)
    lower, upper, rectified = unclipped(box)
    options: dict[str, Any] = {
        "stride": _pair(stride),
        "padding": padding if isinstance(padding, str) else _pair(padding),
        "dilation": _pair(dilation),
        "groups": groups,
        "rounding": box.rounding,
        "rectified": rectified,
        **UNCHECKED,
    }
    return image(
        box,
        torch.conv2d,
        lambda: interval_conv2d(lower, upper, weight, bias, **options),
        waits=box.ndim == 4,
    )


def _pair(value: Any) -> Any:
    if isinstance(value, int):
        return value
    sizes = tuple(value)
    return sizes[0] if len(sizes) == 1 else sizes


def _by_torch(name: str, box: Interval, weight: Any, bias: Any, *args: Any) -> Interval:
    """In torch operations, which word what they refuse; ``args`` after the bias as torch's."""
    function, dimensions = getattr(F, name), weight.ndim - 2
    transposed = "transpose" in name
    groups = args[3] if transposed else args[-1]
    channels = weight.shape[0] // groups if transposed else weight.shape[1]
    per_channel = None if bias is None else bias.reshape(-1, *[1] * dimensions)
    result = affine(
        box,
        weight,
        per_channel,
        lambda x, w: function(x, w, None, *args),
        channels * weight[0, 0].numel(),
    )
    return looked_at(box, function, result)


def _check_bias(name: str, bias: Any, outputs: int) -> None:
    if bias is not None:
        check_shape(name, bias.shape == (outputs,), f"a bias of {outputs} numbers", bias.shape)


_WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)  # exact in float32


def _kernels_serve(box: Interval, weight: Tensor, dimensions: int, channels: int) -> bool:
    """Whether the kernels take the box; what has another shape is refused by torch."""
    return (
        not transformed()
        and box.dtype == torch.float32
        and weight.dtype in _WEIGHTS
        and weight.ndim == dimensions + 2
        and box.ndim in (dimensions + 1, dimensions + 2)
        and box.shape[-1 - dimensions] == channels
        and 0 not in (*box.shape, *weight.shape)
    )


def _positive(*sizes: Sizes, dimensions: int) -> bool:
    return all(len(size) == dimensions and min(size) >= 1 for size in sizes)


def _of_lines_or_slices(name: str, dimensions: int) -> Rule:
    """The rule of ``conv1d`` or ``conv3d``."""

    def rule(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Interval:
        box = require_box(input, name)
        plain(name, weight, bias)
        _check_bias(name, bias, weight.shape[0])
        steps, gaps = _sizes(stride, dimensions), _sizes(dilation, dimensions)
        fits = _kernels_serve(box, weight, dimensions, weight.shape[1] * groups)
        fits = fits and groups >= 1 and weight.shape[0] % groups == 0
        fits = fits and _positive(steps, gaps, dimensions=dimensions)
        if not fits or (padding == "same" and max(steps) > 1):
            return _by_torch(name, box, weight, bias, stride, padding, dilation, groups)
        window = _Window(steps, _zeros(padding, weight.shape[2:], gaps), gaps, groups)
        if not _fits_inside(box.shape[-dimensions:], weight.shape[2:], window):
            return _by_torch(name, box, weight, bias, stride, padding, dilation, groups)
        return _batched(
            box,
            getattr(F, name),
            lambda ends, rectified: _image(
                ends, _Kernel(weight, bias, box.rounding, rectified), window
            ),
            dimensions,
            waits=dimensions == 1,
        )

    return rule


def _fits_inside(inputs: Sequence[int], kernel: Sequence[int], window: _Window) -> bool:
    return all(
        min(zeros) >= 0 and size + sum(zeros) > gap * (taps - 1)
        for size, taps, zeros, gap in zip(
            inputs, kernel, window.zeros, window.dilation, strict=True
        )
    )


def _of_transposed(name: str, dimensions: int) -> Rule:
    """The rule of a transposed convolution."""

    def rule(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Interval:
        box = require_box(input, name)
        plain(name, weight, bias)
        _check_bias(name, bias, weight.shape[1] * groups)
        steps, gaps = _sizes(stride, dimensions), _sizes(dilation, dimensions)
        fits = _kernels_serve(box, weight, dimensions, weight.shape[0])
        fits = fits and groups >= 1 and weight.shape[0] % groups == 0
        if not fits or not _positive(steps, gaps, dimensions=dimensions):
            args = stride, padding, output_padding, groups, dilation
            return _by_torch(name, box, weight, bias, *args)
        inputs, taps = box.shape[-dimensions:], weight.shape[2:]
        pads, more = _sizes(padding, dimensions), _sizes(output_padding, dimensions)
        axes, allowed = [], len(pads) == len(more) == dimensions
        for i in range(dimensions if allowed else 0):
            outputs = (inputs[i] - 1) * steps[i] - 2 * pads[i] + gaps[i] * (taps[i] - 1)
            outputs += more[i] + 1
            allowed &= 0 <= more[i] < max(steps[i], gaps[i]) and pads[i] >= 0 and outputs > 0
            axes.append(_phases(inputs[i], outputs, taps[i], steps[i], pads[i], gaps[i]))
        if not allowed:
            args = stride, padding, output_padding, groups, dilation
            return _by_torch(name, box, weight, bias, *args)
        return _batched(
            box,
            getattr(F, name),
            lambda ends, rectified: _transposed_image(
                ends, _Kernel(weight, bias, box.rounding, rectified), axes, steps, groups
            ),
            dimensions,
        )

    return rule


def _batched(
    box: Interval,
    function: Any,
    call: Callable[[Ends, bool], Ends],
    dimensions: int,
    *,
    waits: bool = False,
) -> Interval:
    """The image of ``box`` by ``call``, which takes ends with a batch."""
    lower, upper, rectified = unclipped(box)
    if box.ndim == dimensions + 2:
        return image(box, function, lambda: call((lower, upper), rectified), waits=waits)

    def single() -> Ends:
        low, high = call((lower.unsqueeze(0), upper.unsqueeze(0)), rectified)
        return low.squeeze(0), high.squeeze(0)

    return image(box, function, single)


RULES: dict[str, Rule] = {
    "conv1d": _of_lines_or_slices("conv1d", 1),
    "conv2d": _conv2d,
    "conv3d": _of_lines_or_slices("conv3d", 3),
    **{f"conv_transpose{n}d": _of_transposed(f"conv_transpose{n}d", n) for n in (1, 2, 3)},
}
