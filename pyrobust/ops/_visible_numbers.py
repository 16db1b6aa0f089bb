"""Whether and how the numbers of tensors may be looked at: plain, transformed, or compiled.

Looking is free of charge on the CPU only; it stops a GPU, and in compiled code it is an assertion.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust.ops._library import assert_all

__all__ = ["all_finite", "assert_in_graph", "count_of", "holds", "physical", "visible"]

_functorch = getattr(torch._C, "_functorch", None)


def visible(*tensors: Tensor) -> bool:
    """Whether control flow may depend on the numbers of ``tensors``."""
    return not torch.compiler.is_compiling() and all(_readable(tensor) for tensor in tensors)


def _readable(tensor: Tensor) -> bool:
    if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
        return False  # a fake tensor, as torch.export makes
    while _functorch is not None and _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return not tensor.is_meta


def physical(tensor: Tensor) -> Tensor | None:
    """What transforms of torch.func wrap, all slices of ``torch.vmap`` together.

    None where there are no numbers to look at: fake and meta tensors, and while compiling.
    """
    if torch.compiler.is_compiling():
        return None
    while _functorch is not None and _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    plain = type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
    return tensor.detach() if plain and not tensor.is_meta else None


def holds(mask: Tensor) -> bool:
    """Whether ``mask`` is true anywhere, in any slice of ``torch.vmap``."""
    values = physical(mask)
    return values is not None and bool(values.any())


def count_of(mask: Tensor) -> str:
    """``"3 of 8"``, over all slices of ``torch.vmap``; empty where it cannot be looked at."""
    values = physical(mask)
    return "" if values is None else f"{int(values.sum())} of {values.numel()}"


def assert_in_graph(condition: Tensor, message: str) -> None:
    """While compiling for the CPU: let the compiled code raise RuntimeError where it is false.

    Left out on a GPU, where it would end the process's work with the device.
    """
    if not condition.is_cuda:
        assert_all(condition, message)


def all_finite(lower: Tensor, upper: Tensor) -> bool:
    """Whether no end is infinite or NaN."""
    if _native.box_is_finite(lower, upper):
        return True
    lower, upper = lower.detach(), upper.detach()
    # two sums read the memory once, five times as fast as isfinite; they may overflow themselves
    if math.isfinite(float(lower.sum())) and math.isfinite(float(upper.sum())):
        return True
    return bool(torch.isfinite(lower).all()) and bool(torch.isfinite(upper).all())
