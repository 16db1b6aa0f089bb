"""What every sampling operator checks before any work."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrobust._checks import check_integer, check_positive
from pyrobust.ops._cuda_module import cuda_module

__all__ = ["FLOATS", "check_counters", "check_place", "check_positions", "per_input", "rows_of"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_place(subject: str, name: str, value: Tensor) -> None:
    """Raise unless ``value`` is on the CPU, on a CUDA device with kernels, or a meta tensor."""
    if value.device.type in ("cpu", "meta"):
        return
    if value.device.type == "cuda":
        if not torch.compiler.is_compiling():  # imports cannot be traced; the operator imports too
            cuda_module(subject)
        return
    raise NotImplementedError(
        f"{subject}: {name} is on {value.device}; the kernels run on CPU and CUDA, "
        "so pass .cpu() tensors."
    )


def check_positions(
    subject: str, x: Tensor, n: int, seed: int, first_sample: int, first_index: int
) -> None:
    """Raise unless ``x`` has a batch axis and the positions lie within the counter."""
    check_place(subject, "x", x)
    if x.ndim < 1:
        raise ValueError(f"{subject}: x must have a batch axis, (B, ...); got a single number.")
    check_counters(subject, x.shape[0], n, seed, first_sample, first_index)


def check_counters(
    subject: str, inputs: int, n: int, seed: int, first_sample: int, first_index: int
) -> None:
    """Raise unless the positions of ``n`` samples of some inputs lie within the counter."""
    for name, value in (("n", n), ("first_sample", first_sample), ("first_index", first_index)):
        check_integer(subject, name, value, 0)
    check_integer(subject, "seed", seed, 0)
    limits = (("seed", seed, 63), ("first_sample + n", first_sample + n, 40))
    for name, value, bits in (*limits, ("first_index + B", first_index + inputs, 48)):
        if value > 2**bits - (name == "seed"):
            raise ValueError(f"{subject}: {name} must not exceed 2**{bits}; got {value}.")


def per_input(subject: str, name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """A positive number, or a tensor of one per input, as float32 ``(B,)``."""
    if isinstance(value, Tensor):
        if value.shape not in (torch.Size([]), x.shape[:1]):
            raise ValueError(
                f"{subject}: {name} must be a number or have shape ({x.shape[0]},); "
                f"got {tuple(value.shape)}."
            )
        return value.to(torch.float32).expand(x.shape[:1]).contiguous()
    check_positive(subject, name, value)
    return torch.full((x.shape[0],), value, dtype=torch.float32, device=x.device)


def rows_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, elements)`` dense, without gradient."""
    elements = x[0].numel() if x.shape[0] else 0
    return x.detach().to(dtype).reshape(x.shape[0], elements).contiguous()
