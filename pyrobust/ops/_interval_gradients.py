"""Elementwise passes of the interval operators' backward, fused where autograd records nothing.

The products of a layer work on centres and radii, autograd on ends. In plain eager mode on the CPU
each conversion is one native pass over memory (``csrc/interval/gradients.h``); under transforms,
compilation and double backward it is written in torch operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust.ops._interval_checks import Ends, clipped_at_zero, dense
from pyrobust.ops._library import dispatcher_needed

__all__ = ["join_gradients", "native_serves", "split_ends", "split_gradients", "weight_gradient"]


_MOST_DIMENSIONS = 8  # of the binding


def native_serves(*tensors: Tensor) -> bool:
    """Whether the native passes take these: float32 in plain eager mode, no gradients recorded."""
    first = tensors[0]
    if dispatcher_needed(*tensors) or first.numel() == 0 or first.ndim > _MOST_DIMENSIONS:
        return False
    return all(tensor.dtype == torch.float32 for tensor in tensors)


def split_ends(lower: Tensor, upper: Tensor, rectified: bool) -> tuple[Tensor, Tensor]:
    """Centre and radius, to nearest; ``rectified``: of the box after a ReLU."""
    if native_serves(lower, upper):
        lower, upper = dense(lower), dense(upper)
        centre, radius = torch.empty_like(lower), torch.empty_like(lower)
        threads = torch.get_num_threads()
        _native.interval_split_ends(lower, upper, rectified, centre, radius, threads)
        return centre, radius
    if rectified:
        lower, upper = clipped_at_zero(lower, upper)
    return (lower + upper) * 0.5, (upper - lower) * 0.5


def split_gradients(grad_lower: Tensor, grad_upper: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of centre and radius from those of the ends."""
    if native_serves(grad_lower, grad_upper):
        grad_lower, grad_upper = dense(grad_lower), dense(grad_upper)
        to_centre, to_radius = torch.empty_like(grad_lower), torch.empty_like(grad_lower)
        threads = torch.get_num_threads()
        _native.interval_split_gradients(grad_lower, grad_upper, to_centre, to_radius, threads)
        return to_centre, to_radius
    return grad_lower + grad_upper, grad_upper - grad_lower


def join_gradients(
    to_centre: Tensor,
    to_radius: Tensor,
    before_relu: Ends | None = None,
    out: Ends | None = None,
) -> Ends:
    """Gradients of the ends from those of centre and radius, whose memory they may take.

    ``before_relu``: the ends before a ReLU, which stops the gradient where they are not positive.
    ``out``: where the native pass writes; only where :func:`native_serves`.
    """
    if native_serves(to_centre, to_radius, *(before_relu or ())):
        to_centre, to_radius = dense(to_centre), dense(to_radius)
        lower, upper = (dense(end) for end in before_relu) if before_relu else (None, None)
        out = out or (to_centre, to_radius)
        threads = torch.get_num_threads()
        _native.interval_join_gradients(to_centre, to_radius, lower, upper, *out, threads)
        return out
    lower_grad, upper_grad = (to_centre - to_radius) * 0.5, (to_centre + to_radius) * 0.5
    if before_relu is None:
        return lower_grad, upper_grad
    return lower_grad * (before_relu[0] > 0), upper_grad * (before_relu[1] > 0)


def weight_gradient(from_centre: Tensor, from_radius: Tensor, weight: Tensor) -> Tensor:
    """``from_centre + sign(weight) * from_radius``, which may take the first one's memory."""
    if native_serves(from_centre, from_radius, weight):
        total = dense(from_centre)
        _native.interval_add_weight_gradient(
            total, dense(from_radius), dense(weight), torch.get_num_threads()
        )
        return total
    return from_centre + weight.sign() * from_radius
