"""Elementwise passes of the interval operators' backward, fused where autograd records nothing.

The products of a layer work on centres and radii, autograd on ends. In plain eager mode on the CPU
each conversion is one native pass over memory (``csrc/interval/gradients.h``); under transforms,
compilation and double backward it is written in torch operations. What belongs to radii may be
bfloat16 (``radius_precision(gradients=)``): torch's own products take it then, on AVX512_BF16 or on
the tiles of AMX.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust.ops._interval_checks import Ends, clipped_at_zero, dense
from pyrobust.ops._library import dispatcher_needed

__all__ = [
    "coarse_serves",
    "join_gradients",
    "native_serves",
    "size_of_weight",
    "split_ends",
    "split_gradients",
    "weight_gradient",
]


_MOST_DIMENSIONS = 8  # of the binding
# Multiplications from which torch gives products of bfloat16 to oneDNN.
_COARSE_WORTH = 1 << 16


def native_serves(*tensors: Tensor) -> bool:
    """Whether the native passes take these: float32 in plain eager mode, no gradients recorded."""
    first = tensors[0]
    if dispatcher_needed(*tensors) or first.numel() == 0 or first.ndim > _MOST_DIMENSIONS:
        return False
    return all(tensor.dtype == torch.float32 for tensor in tensors)


def coarse_serves(products: int, *tensors: Tensor) -> bool:
    """Whether products of radii of so many multiplications may be made in bfloat16 here."""
    if products < _COARSE_WORTH or not _processor_multiplies_bfloat16():
        return False
    onednn: bool = torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()
    return onednn and native_serves(*tensors)


def _processor_multiplies_bfloat16() -> bool:
    """Where the kernels of the bounds would do so too: PYROBUST_ISA counts for both."""
    isa = _native.isa()
    if isa == "amx" and _native.has_bfloat16_tiles():
        return True
    return isa in ("avx512", "amx") and _native.has_bfloat16_products()


def _radii_like(values: Tensor, coarse: bool) -> Tensor:
    return torch.empty_like(values, dtype=torch.bfloat16 if coarse else values.dtype)


def split_ends(
    lower: Tensor, upper: Tensor, rectified: bool, *, coarse: bool = False
) -> tuple[Tensor, Tensor]:
    """Centre and radius, to nearest; ``rectified``: of the box after a ReLU.

    ``coarse``: the radius in bfloat16; only where :func:`coarse_serves`, here and below.
    """
    if native_serves(lower, upper):
        lower, upper = dense(lower), dense(upper)
        centre, radius = torch.empty_like(lower), _radii_like(lower, coarse)
        threads = torch.get_num_threads()
        _native.interval_split_ends(lower, upper, rectified, centre, radius, threads)
        return centre, radius
    if rectified:
        lower, upper = clipped_at_zero(lower, upper)
    return (lower + upper) * 0.5, (upper - lower) * 0.5


def split_gradients(
    grad_lower: Tensor, grad_upper: Tensor, *, coarse: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of centre and radius from those of the ends."""
    if native_serves(grad_lower, grad_upper):
        grad_lower, grad_upper = dense(grad_lower), dense(grad_upper)
        to_centre, to_radius = torch.empty_like(grad_lower), _radii_like(grad_lower, coarse)
        threads = torch.get_num_threads()
        _native.interval_split_gradients(grad_lower, grad_upper, to_centre, to_radius, threads)
        return to_centre, to_radius
    return grad_lower + grad_upper, grad_upper - grad_lower


def size_of_weight(weight: Tensor, *, coarse: bool = False) -> Tensor:
    """``|weight|``, which radii are multiplied with."""
    if native_serves(weight):
        weight = dense(weight)
        size = _radii_like(weight, coarse)
        _native.interval_size_of_weight(weight, size, torch.get_num_threads())
        return size
    return weight.abs()


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
    if native_serves(to_centre, *(before_relu or ())) and _radii_suit(to_centre, to_radius):
        to_centre, to_radius = dense(to_centre), dense(to_radius)
        lower, upper = (dense(end) for end in before_relu) if before_relu else (None, None)
        in_place = to_radius.dtype == torch.float32
        out = out or (to_centre, to_radius if in_place else torch.empty_like(to_centre))
        threads = torch.get_num_threads()
        _native.interval_join_gradients(to_centre, to_radius, lower, upper, *out, threads)
        return out
    lower_grad, upper_grad = (to_centre - to_radius) * 0.5, (to_centre + to_radius) * 0.5
    if before_relu is None:
        return lower_grad, upper_grad
    return lower_grad * (before_relu[0] > 0), upper_grad * (before_relu[1] > 0)


def weight_gradient(from_centre: Tensor, from_radius: Tensor, weight: Tensor) -> Tensor:
    """``from_centre + sign(weight) * from_radius``, which may take the first one's memory."""
    if native_serves(from_centre, weight) and _radii_suit(from_centre, from_radius):
        total = dense(from_centre)
        _native.interval_add_weight_gradient(
            total, dense(from_radius), dense(weight), torch.get_num_threads()
        )
        return total
    return from_centre + weight.sign() * from_radius


def _radii_suit(values: Tensor, radii: Tensor) -> bool:
    return radii.dtype == torch.bfloat16 or native_serves(values, radii)
