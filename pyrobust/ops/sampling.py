"""Reproducible Gaussian noise and vote counting, the two kernels of randomized smoothing.

The noise is counter-based: each value is a pure function of (seed, image index, sample index,
element), so batch splits, threads, processes and instruction sets give the same bits. The generator
is Philox4x32-10; the normal transform is an inverse distribution function with an absolute error
of at most 4e-6 and a tail that reaches 9 standard deviations (``csrc/core/normal.h``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from pyrobust import _native
from pyrobust._checks import check_float_tensor, check_integer, check_positive
from pyrobust.ops._library import define, dispatcher_needed, refuse_forward_mode

__all__ = ["count_votes", "gaussian_samples"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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
    float32, then to ``dtype``.

    Args:
        x: ``(B, ...)`` float32, bfloat16 or float16 inputs on the CPU.
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
        NotImplementedError: ``x`` is not on the CPU.

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
    out_dtype = _check_samples(x, n, seed, first_sample, first_index, dtype)
    scale = _scale(sigma, x)
    if not dispatcher_needed(x, scale):
        return _samples_cpu(x, scale, n, seed, first_sample, first_index, out_dtype)
    refuse_forward_mode("gaussian_samples", x, scale)
    samples: Tensor = torch.ops.pyrobust.gaussian_samples(
        x, scale, n, seed, first_sample, first_index, out_dtype
    )
    return samples


def count_votes(logits: Tensor, *, num_classes: int | None = None) -> Tensor:
    """Histogram of the arg-max classes along the sample axis; ties go to the lowest class.

    Args:
        logits: ``(..., n, K)`` float32, bfloat16 or float16 on the CPU.
        num_classes: the expected ``K``; None accepts any.

    Returns:
        ``(..., K)`` int64 counts that sum to ``n``.

    Raises:
        TypeError: ``logits`` has another dtype.
        ValueError: ``K`` is 0 or not ``num_classes``, or a logit is NaN (the message names the
            sample).
        NotImplementedError: ``logits`` is not on the CPU.

    Example:
        >>> count_votes(torch.tensor([[0.0, 1.0], [2.0, 2.0], [0.0, 3.0]]))
        tensor([1, 2])
    """
    if has_torch_function((logits,)):
        result: Tensor = handle_torch_function(
            count_votes, (logits,), logits, num_classes=num_classes
        )
        return result
    subject = "count_votes"
    check_float_tensor(subject, "logits", logits)
    _check_place(subject, "logits", logits)
    if logits.ndim < 2:
        raise ValueError(
            f"{subject}: logits must have shape (..., n, K); got {tuple(logits.shape)}."
        )
    classes = logits.shape[-1]
    if num_classes is not None and classes != num_classes:
        raise ValueError(
            f"{subject}: logits must have {num_classes} classes on the last axis; "
            f"got shape {tuple(logits.shape)}."
        )
    if classes == 0:
        raise ValueError(f"{subject}: logits must have at least one class; got 0.")
    if not dispatcher_needed(logits):
        return _votes_cpu(logits)
    counts: Tensor = torch.ops.pyrobust.count_votes(logits)
    return counts


def _check_place(subject: str, name: str, value: Tensor) -> None:
    if value.dtype not in _FLOATS:
        raise TypeError(
            f"{subject}: {name} must have dtype float32, bfloat16 or float16; got {value.dtype}."
        )
    if value.device.type not in ("cpu", "meta"):
        raise NotImplementedError(
            f"{subject}: {name} is on {value.device}; the kernel runs on the CPU, "
            "so pass .cpu() tensors."
        )


def _check_samples(
    x: Tensor, n: int, seed: int, first_sample: int, first_index: int, dtype: torch.dtype | None
) -> torch.dtype:
    subject = "gaussian_samples"
    check_float_tensor(subject, "x", x)
    _check_place(subject, "x", x)
    if x.ndim < 1:
        raise ValueError(f"{subject}: x must have a batch axis, (B, ...); got a single number.")
    for name, value in (("n", n), ("first_sample", first_sample), ("first_index", first_index)):
        check_integer(subject, name, value, 0)
    check_integer(subject, "seed", seed, 0)
    limits = (("seed", seed, 63), ("first_sample + n", first_sample + n, 40))
    for name, value, bits in (*limits, ("first_index + B", first_index + x.shape[0], 48)):
        if value > 2**bits - (name == "seed"):
            raise ValueError(f"{subject}: {name} must not exceed 2**{bits}; got {value}.")
    if dtype is not None and dtype not in _FLOATS:
        raise TypeError(f"{subject}: dtype must be float32, bfloat16 or float16; got {dtype}.")
    return x.dtype if dtype is None else dtype


def _scale(sigma: float | Tensor, x: Tensor) -> Tensor:
    """Sigma as a float32 tensor, one value per input."""
    if isinstance(sigma, Tensor):
        if sigma.shape not in (torch.Size([]), x.shape[:1]):
            raise ValueError(
                f"gaussian_samples: sigma must be a number or have shape ({x.shape[0]},); "
                f"got {tuple(sigma.shape)}."
            )
        return sigma.to(torch.float32).expand(x.shape[:1]).contiguous()
    check_positive("gaussian_samples", "sigma", sigma)
    return torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)


def _samples_cpu(
    x: Tensor,
    sigma: Tensor,
    n: int,
    seed: int,
    first_sample: int,
    first_index: int,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty((x.shape[0], n, *x.shape[1:]), dtype=dtype)
    elements = x[0].numel() if x.shape[0] else 0
    flat = x.detach().to(torch.float32).reshape(x.shape[0], elements).contiguous()
    rows = out.view(x.shape[0], n, elements)
    threads = torch.get_num_threads()
    _native.gaussian_samples(flat, sigma, rows, seed, first_sample, first_index, threads)
    return out


def _votes_cpu(logits: Tensor) -> Tensor:
    rows = logits.detach().reshape(-1, logits.shape[-1]).contiguous()
    votes = torch.empty(rows.shape[0], dtype=torch.int64)
    nan = _native.find_votes(rows, votes, torch.get_num_threads())
    if nan >= 0:
        where: list[int] = []
        for size in reversed(logits.shape[:-1]):
            nan, position = divmod(nan, size)
            where.insert(0, position)
        raise ValueError(f"count_votes: logits must not be NaN; sample {tuple(where)} is.")
    counts = torch.zeros((*logits.shape[:-2], logits.shape[-1]), dtype=torch.int64)
    votes = votes.view(logits.shape[:-1])
    return counts.scatter_add_(-1, votes, torch.ones_like(votes))


def _samples_fake(
    x: Tensor,
    sigma: Tensor,
    n: int,
    seed: int,
    first_sample: int,
    first_index: int,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], n, *x.shape[1:]), dtype=dtype)


def _save_position(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.x_shape, ctx.x_dtype, ctx.position = inputs[0].shape, inputs[0].dtype, inputs[2:6]


def _samples_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_sigma = None
    if ctx.needs_input_grad[0]:
        grad_x = grad.sum(dim=1, dtype=torch.float32).to(ctx.x_dtype)
    if ctx.needs_input_grad[1]:  # the noise itself, drawn again instead of kept
        zeros = grad.new_zeros(ctx.x_shape, dtype=torch.float32)
        ones = grad.new_ones(ctx.x_shape[:1], dtype=torch.float32)
        z = torch.ops.pyrobust.gaussian_samples(zeros, ones, *ctx.position, torch.float32)
        grad_sigma = (grad.float() * z).flatten(1).sum(1)
    return grad_x, grad_sigma, None, None, None, None, None


def _votes_fake(logits: Tensor) -> Tensor:
    return logits.new_empty((*logits.shape[:-2], logits.shape[-1]), dtype=torch.int64)


define(
    "gaussian_samples(Tensor x, Tensor sigma, int n, int seed, int first_sample, int first_index,"
    " ScalarType dtype) -> Tensor",
    _samples_cpu,
    _samples_fake,
    backward=_samples_backward,
    setup_context=_save_position,
)
define("count_votes(Tensor logits) -> Tensor", _votes_cpu, _votes_fake)
