"""Reproducible continuous noise: Gaussian, uniform and Laplace copies of each input.

The noise is counter-based: each value is a pure function of (seed, image index, sample index,
element), so batch splits, threads, processes and instruction sets give the same bits. The generator
is Philox4x32-10; the transforms are inverse distribution functions with the errors and tails of
``docs/guide/noise.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from pyrobust import _native
from pyrobust._checks import check_float_tensor
from pyrobust.ops import _cuda_sampling
from pyrobust.ops._library import (
    define,
    differentiation_transforms,
    dispatcher_needed,
    slice_by_slice,
)
from pyrobust.ops._sampling_checks import FLOATS, check_positions, per_input, rows_of

__all__ = ["gaussian_samples", "laplace_samples", "uniform_samples"]


def gaussian_samples(
    x: Tensor,
    sigma: float | Tensor,
    n: int,
    *,
    seed: int,
    first_sample: int = 0,
    first_index: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Noisy copies ``x + sigma * z`` of each input, ``z`` standard normal.

    Value ``[b, j]`` depends only on ``x[b]``, ``sigma``, ``seed``, the image index
    ``first_index + b`` and the sample index ``first_sample + j``. Sum and product are rounded to
    float32, then to ``dtype``. The error of ``z`` is at most 4e-6; its tail reaches 9 standard
    deviations.

    Args:
        x: ``(B, ...)`` float32, bfloat16 or float16 inputs on the CPU or a CUDA device.
        sigma: standard deviation, ``> 0``; one number, or a tensor ``(B,)`` of them.
        n: number of samples per input, ``>= 0``.
        seed: key of the noise, in ``[0, 2**63)``.
        first_sample: sample index of the first copy, in ``[0, 2**40)``.
        first_index: image index of ``x[0]``, in ``[0, 2**48)``.
        dtype: float32, bfloat16 or float16; None takes that of ``x``.

    Returns:
        ``(B, n, ...)`` of ``dtype``. Differentiable in ``x`` and in a tensor ``sigma``.

    Raises:
        TypeError: ``x`` or ``dtype`` is not one of the three floating-point types.
        ValueError: ``sigma`` not positive, or ``n``, ``seed`` or an index out of range.
        NotImplementedError: ``x`` is on a device without kernels.

    Example:
        >>> x = torch.zeros(2, 3)
        >>> whole = gaussian_samples(x, 0.5, 4, seed=0)
        >>> part = gaussian_samples(x[1:], 0.5, 2, seed=0, first_sample=2, first_index=1)
        >>> torch.equal(whole[1:, 2:], part)
        True
    """
    if has_torch_function((x,)):
        options = {"seed": seed, "first_sample": first_sample, "first_index": first_index}
        result: Tensor = handle_torch_function(
            gaussian_samples, (x,), x, sigma, n, dtype=dtype, **options
        )
        return result
    return _noisy("gaussian_samples", "sigma", x, sigma, n, seed, first_sample, first_index, dtype)


def uniform_samples(
    x: Tensor,
    half_width: float | Tensor,
    n: int,
    *,
    seed: int,
    first_sample: int = 0,
    first_index: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Noisy copies ``x + half_width * u`` of each input, ``u`` uniform on ``[-1, 1]``.

    Positions, rounding, arguments, gradients and errors are those of :func:`gaussian_samples`; the
    error of ``u`` is at most 2**-25 + 2**-31. Smoothing with it certifies l1 radii.

    Args:
        x: ``(B, ...)`` float32, bfloat16 or float16 inputs on the CPU or a CUDA device.
        half_width: half the width of the interval, ``> 0``; a number, or a tensor ``(B,)``. The
            standard deviation is ``half_width / sqrt(3)``.
        n: number of samples per input, ``>= 0``.
        seed: key of the noise, in ``[0, 2**63)``.
        first_sample: sample index of the first copy, in ``[0, 2**40)``.
        first_index: image index of ``x[0]``, in ``[0, 2**48)``.
        dtype: float32, bfloat16 or float16; None takes that of ``x``.

    Returns:
        ``(B, n, ...)`` of ``dtype``. Differentiable in ``x`` and in a tensor ``half_width``.

    Raises:
        TypeError: ``x`` or ``dtype`` is not one of the three floating-point types.
        ValueError: ``half_width`` not positive, or ``n``, ``seed`` or an index out of range.
        NotImplementedError: ``x`` is on a device without kernels.

    Example:
        >>> noisy = uniform_samples(torch.zeros(1, 1000), 0.5, 4, seed=0)
        >>> bool((noisy.abs() <= 0.5).all()), noisy.shape
        (True, torch.Size([1, 4, 1000]))
    """
    if has_torch_function((x,)):
        options = {"seed": seed, "first_sample": first_sample, "first_index": first_index}
        result: Tensor = handle_torch_function(
            uniform_samples, (x,), x, half_width, n, dtype=dtype, **options
        )
        return result
    return _noisy(
        "uniform_samples", "half_width", x, half_width, n, seed, first_sample, first_index, dtype
    )


def laplace_samples(
    x: Tensor,
    scale: float | Tensor,
    n: int,
    *,
    seed: int,
    first_sample: int = 0,
    first_index: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Noisy copies ``x + scale * z`` of each input, ``z`` with the density ``exp(-|z|) / 2``.

    Positions, rounding, arguments, gradients and errors are those of :func:`gaussian_samples`; the
    error of ``z`` is at most 3e-6 where ``|z| < 9``, 4.5e-6 beyond, and the tail reaches 43. The
    standard deviation is ``sqrt(2) * scale``. Smoothing with it certifies l1 radii.

    Args:
        x: ``(B, ...)`` float32, bfloat16 or float16 inputs on the CPU or a CUDA device.
        scale: mean of ``|z|``, ``> 0``; one number, or a tensor ``(B,)`` of them.
        n: number of samples per input, ``>= 0``.
        seed: key of the noise, in ``[0, 2**63)``.
        first_sample: sample index of the first copy, in ``[0, 2**40)``.
        first_index: image index of ``x[0]``, in ``[0, 2**48)``.
        dtype: float32, bfloat16 or float16; None takes that of ``x``.

    Returns:
        ``(B, n, ...)`` of ``dtype``. Differentiable in ``x`` and in a tensor ``scale``.

    Raises:
        TypeError: ``x`` or ``dtype`` is not one of the three floating-point types.
        ValueError: ``scale`` not positive, or ``n``, ``seed`` or an index out of range.
        NotImplementedError: ``x`` is on a device without kernels.

    Example:
        >>> laplace_samples(torch.zeros(1, 2), 1.0, 3, seed=0).shape
        torch.Size([1, 3, 2])
    """
    if has_torch_function((x,)):
        options = {"seed": seed, "first_sample": first_sample, "first_index": first_index}
        result: Tensor = handle_torch_function(
            laplace_samples, (x,), x, scale, n, dtype=dtype, **options
        )
        return result
    return _noisy("laplace_samples", "scale", x, scale, n, seed, first_sample, first_index, dtype)


def _noisy(
    name: str,
    scale_name: str,
    x: Tensor,
    scale: float | Tensor,
    n: int,
    seed: int,
    first_sample: int,
    first_index: int,
    dtype: torch.dtype | None,
) -> Tensor:
    check_float_tensor(name, "x", x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: x must have dtype float32, bfloat16 or float16; got {x.dtype}.")
    check_positions(name, x, n, seed, first_sample, first_index)
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"{name}: dtype must be float32, bfloat16 or float16; got {dtype}.")
    out_dtype = x.dtype if dtype is None else dtype
    scales = per_input(name, scale_name, scale, x)
    position = (n, seed, first_sample, first_index)
    if not dispatcher_needed(x, scales):
        return _KERNELS[name](x, scales, *position, out_dtype)
    operator = getattr(torch.ops.pyrobust, name)
    if differentiation_transforms():  # the same sum, of the same bits, in torch's operations
        z = operator(
            torch.zeros(x.shape, device=x.device),
            torch.ones(x.shape[0], device=x.device),
            *position,
            torch.float32,
        )
        wide = scales.view(-1, *[1] * x.ndim)
        sums: Tensor = (x.float()[:, None] + wide * z).to(out_dtype)
        return sums
    samples: Tensor = operator(x, scales, *position, out_dtype)
    return samples


def _kernel(native: Callable[..., None]) -> Callable[..., Tensor]:
    def samples(
        x: Tensor,
        scale: Tensor,
        n: int,
        seed: int,
        first_sample: int,
        first_index: int,
        dtype: torch.dtype,
    ) -> Tensor:
        out = torch.empty((x.shape[0], n, *x.shape[1:]), dtype=dtype)
        flat = rows_of(x, torch.float32)
        rows = out.view(x.shape[0], n, flat.shape[1])
        native(flat, scale, rows, seed, first_sample, first_index, torch.get_num_threads())
        return out

    return samples


def _fake(
    x: Tensor,
    scale: Tensor,
    n: int,
    seed: int,
    first_sample: int,
    first_index: int,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], n, *x.shape[1:]), dtype=dtype)


def _save_position(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.x_shape, ctx.x_dtype, ctx.position = inputs[0].shape, inputs[0].dtype, inputs[2:6]


def _backward(name: str) -> Callable[..., tuple[Tensor | None, ...]]:
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_scale = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.sum(dim=1, dtype=torch.float32).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:  # the noise itself, drawn again instead of kept
            zeros = grad.new_zeros(ctx.x_shape, dtype=torch.float32)
            ones = grad.new_ones(ctx.x_shape[:1], dtype=torch.float32)
            operator = getattr(torch.ops.pyrobust, name)
            z = operator(zeros, ones, *ctx.position, torch.float32)
            grad_scale = (grad.float() * z).flatten(1).sum(1)
        return grad_x, grad_scale, None, None, None, None, None

    return gradients


_KERNELS = {
    "gaussian_samples": _kernel(_native.gaussian_samples),
    "uniform_samples": _kernel(_native.uniform_samples),
    "laplace_samples": _kernel(_native.laplace_samples),
}

for _name, _function in _KERNELS.items():
    define(
        f"{_name}(Tensor x, Tensor scale, int n, int seed, int first_sample, int first_index,"
        " ScalarType dtype) -> Tensor",
        _function,
        _fake,
        backward=_backward(_name),
        setup_context=_save_position,
        cuda=partial(_cuda_sampling.noise, _name),
        vmap=slice_by_slice(_name),
    )
