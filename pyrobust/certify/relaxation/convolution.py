"""Coefficients of a convolution's result pulled back to its input, as fast as torch allows.

torch's own transposed convolution and gradient of the input are slow for few channels (12 ms where
the same sums as a convolution with flipped weights take 3, 576 images of 2 x 28 x 28 on one core).
So a stride of 1 becomes that convolution, and a larger stride with few channels becomes one
convolution per phase of the result, whose results are interleaved.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight

__all__ = ["is_plain", "pull_convolution", "pulled_convolution"]

# Channels of all phases up to which interleaving pays: 2.3 times faster at 8, slower at 64.
_PHASE_CHANNELS = 32


def is_plain(options: dict[str, Any] | None) -> bool:
    """Whether a convolution reads a solid window of every channel."""
    return options is not None and options["groups"] == 1 and set(options["dilation"]) == {1}


def pull_convolution(a: Tensor, weight: Tensor, options: dict[str, Any], size: list[int]) -> Tensor:
    """``(N, C, H, W)`` coefficients of the input from ``(N, C', H', W')`` of the result.

    Args:
        a: coefficients of the result.
        weight: ``(C', C / groups, h, w)``.
        options: ``stride``, ``padding``, ``dilation``, ``groups`` of the layer.
        size: ``[H, W]``.
    """
    if torch.is_grad_enabled() and (a.requires_grad or weight.requires_grad):
        pulled: Tensor = _Pulled.apply(a, weight, options, size)  # type: ignore[no-untyped-call]
        return pulled
    return pulled_convolution(a, weight, options, size)


class _Pulled(torch.autograd.Function):
    """The gradient of a pull is the convolution itself, which torch computes fastest."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, weight: Tensor, options: dict[str, Any], size: list[int]
    ) -> Tensor:
        ctx.save_for_backward(a, weight)
        ctx.options = options
        return pulled_convolution(a, weight, options, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_pulled: Tensor) -> tuple[Tensor | None, ...]:
        a, weight = ctx.saved_tensors
        by_a = by_weight = None
        if ctx.needs_input_grad[0]:
            by_a = F.conv2d(by_pulled, weight, None, **ctx.options)
        if ctx.needs_input_grad[1]:
            by_weight = conv2d_weight(by_pulled, list(weight.shape), a, **ctx.options)
        return by_a, by_weight, None, None


def pulled_convolution(
    a: Tensor, weight: Tensor, options: dict[str, Any], size: list[int]
) -> Tensor:
    """:func:`pull_convolution` without a gradient written out."""
    stride, padding, dilation = options["stride"], options["padding"], options["dilation"]
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    border = [r - p for r, p in zip(reach, padding, strict=True)]
    if set(stride) == {1} and min(border) >= 0:
        flipped = _flipped(weight, options["groups"])
        if a.is_contiguous(memory_format=torch.channels_last):
            flipped = flipped.contiguous(memory_format=torch.channels_last)
        return F.conv2d(a, flipped, None, 1, border, dilation, options["groups"])
    few = weight.shape[1] * stride[0] * stride[1] <= _PHASE_CHANNELS
    if few and stride[0] == stride[1] > 1 and is_plain(options):
        return _interleaved(a, weight, stride[0], padding, size)
    channels = weight.shape[1] * options["groups"]
    pulled: Tensor = conv2d_input((len(a), channels, *size), weight, a, **options)
    return pulled


def _flipped(weight: Tensor, groups: int) -> Tensor:
    """Weights of the convolution that pulls back: reversed in space, channels exchanged."""
    apart = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    flipped: Tensor = apart.flip(2, 3)
    return flipped


def _interleaved(a: Tensor, weight: Tensor, s: int, padding: Any, size: list[int]) -> Tensor:
    """Place ``s q + r`` of the padded input meets taps ``r + s t`` of results ``q - t``."""
    taps = [-(-k // s) for k in weight.shape[2:]]
    missing = [t * s - k for t, k in zip(taps, weight.shape[2:], strict=True)]
    filled = F.pad(weight, (0, missing[1], 0, missing[0]))
    phases = filled.unflatten(3, (taps[1], s)).unflatten(2, (taps[0], s))
    kernels = phases.permute(1, 3, 5, 0, 2, 4).flip(4, 5).flatten(0, 2)
    counts = [-(-(n + p) // s) for n, p in zip(size, padding, strict=True)]
    after = [max(c - n, 0) for c, n in zip(counts, a.shape[2:], strict=True)]
    wide = F.pad(a, (taps[1] - 1, after[1], taps[0] - 1, after[0]))
    spread = F.pixel_shuffle(F.conv2d(wide, kernels), s)
    top, left = padding
    return spread[:, :, top : top + size[0], left : left + size[1]]
