"""Copies of each input in which coordinates are hidden: coins per pixel, or two fixed halves.

Counter-based like :mod:`pyrobust.ops.sampling`: a coin is a pure function of (seed, image index,
sample index, position).
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from pyrobust import _native
from pyrobust._checks import check_choice, check_float_tensor, check_open_unit, check_positive
from pyrobust.ops import _cuda_sampling
from pyrobust.ops._library import (
    define,
    differentiation_transforms,
    dispatcher_needed,
    slice_by_slice,
)
from pyrobust.ops._sampling_checks import FLOATS, check_positions, rows_of
from pyrobust.ops.sampling import gaussian_samples

__all__ = ["masked_samples", "split_gaussian_samples"]


def masked_samples(
    x: Tensor,
    keep: float,
    n: int,
    *,
    seed: int,
    fill: float = 0.0,
    per: str = "element",
    first_sample: int = 0,
    first_index: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Copies of each input in which every position is kept with probability ``keep``, else filled.

    The coins are independent and exact: the probability is the double ``keep`` itself, rounded
    down to a multiple of 2**-64 where it is below 2**-11. Randomized ablation certifies l0 radii
    with them. A mask alone is ``masked_samples(torch.ones_like(x), ...)``.

    Args:
        x: ``(B, ...)`` float32, bfloat16 or float16 inputs on the CPU or a CUDA device.
        keep: probability that a position is kept, in the open interval (0, 1).
        n: number of samples per input, ``>= 0``.
        seed: key of the coins, in ``[0, 2**63)``.
        fill: what stands at positions that are not kept; may be NaN.
        per: ``"element"``: each element has its coin; ``"pixel"``: ``x`` is ``(B, C, ...)`` and the
            channels of a pixel share one.
        first_sample: sample index of the first copy, in ``[0, 2**40)``.
        first_index: image index of ``x[0]``, in ``[0, 2**48)``.
        dtype: float32, bfloat16 or float16; None takes that of ``x``.

    Returns:
        ``(B, n, ...)`` of ``dtype``. Differentiable in ``x``.

    Raises:
        TypeError: ``x`` or ``dtype`` is not one of the three floating-point types.
        ValueError: ``keep`` outside (0, 1), an unknown ``per``, no channel axis, or ``n``,
            ``seed`` or an index out of range.
        NotImplementedError: ``x`` is on a device without kernels.

    Example:
        >>> masked = masked_samples(torch.ones(1, 3, 4, 4), 0.25, 5, seed=0, per="pixel")
        >>> torch.equal(masked[:, :, 0], masked[:, :, 2]), masked.unique().tolist()
        (True, [0.0, 1.0])
    """
    subject = "masked_samples"
    if has_torch_function((x,)):
        options = {"seed": seed, "first_sample": first_sample, "first_index": first_index}
        result: Tensor = handle_torch_function(
            masked_samples, (x,), x, keep, n, fill=fill, per=per, dtype=dtype, **options
        )
        return result
    check_float_tensor(subject, "x", x)
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{subject}: x must have dtype float32, bfloat16 or float16; got {x.dtype}."
        )
    check_positions(subject, x, n, seed, first_sample, first_index)
    check_open_unit(subject, "keep", keep)
    check_choice(subject, "per", per, ("element", "pixel"))
    if per == "pixel" and x.ndim < 3:
        raise ValueError(
            f"{subject}: x must be (B, C, ...) where per='pixel'; got shape {tuple(x.shape)}."
        )
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"{subject}: dtype must be float32, bfloat16 or float16; got {dtype}.")
    out_dtype = x.dtype if dtype is None else dtype
    pixels = per == "pixel"
    position = (n, seed, first_sample, first_index)
    if not dispatcher_needed(x):
        return _masked_cpu(x, keep, float(fill), pixels, *position, out_dtype)
    operator = torch.ops.pyrobust.masked_samples
    if differentiation_transforms():
        coins = operator(
            torch.ones(x.shape, device=x.device), keep, 0.0, pixels, *position, torch.float32
        )
        return torch.where(coins > 0, x[:, None], fill).to(out_dtype)
    samples: Tensor = operator(x, keep, float(fill), pixels, *position, out_dtype)
    return samples


def split_gaussian_samples(
    x: Tensor,
    mask: Tensor,
    sigma: float | tuple[float, float],
    n: int,
    *,
    seed: int,
    first_sample: int = 0,
    first_index: int = 0,
) -> tuple[Tensor, Tensor]:
    """Noisy copies of two complementary parts of each input, in one pass over the noise.

    The first result holds ``x + sigma[0] * z`` where ``mask`` is True and zeros elsewhere, the
    second ``x + sigma[1] * z`` where it is False. ``z`` is that of :func:`gaussian_samples`, to the
    bit; since the parts share no element, their noise is independent.

    Args:
        x: ``(B, ...)`` float32 inputs on the CPU or a CUDA device.
        mask: bool, broadcastable to the shape of one input.
        sigma: standard deviation, ``> 0``, of both parts or of each.
        n: number of samples per input, ``>= 0``.
        seed: key of the noise, in ``[0, 2**63)``.
        first_sample: sample index of the first copy, in ``[0, 2**40)``.
        first_index: image index of ``x[0]``, in ``[0, 2**48)``.

    Returns:
        Two float32 tensors ``(B, n, ...)``. Differentiable in ``x``.

    Raises:
        TypeError: ``x`` is not float32, or ``mask`` is not a bool tensor.
        ValueError: a ``sigma`` not positive, a mask of another shape, or ``n``, ``seed`` or an
            index out of range.
        NotImplementedError: ``x`` is on a device without kernels.

    Example:
        >>> mask = torch.tensor([True, False])
        >>> left, right = split_gaussian_samples(torch.ones(1, 2), mask, 0.5, 1, seed=0)
        >>> left[0, 0, 1].item(), right[0, 0, 0].item()
        (0.0, 0.0)
    """
    subject = "split_gaussian_samples"
    if has_torch_function((x,)):
        options = {"seed": seed, "first_sample": first_sample, "first_index": first_index}
        result: tuple[Tensor, Tensor] = handle_torch_function(
            split_gaussian_samples, (x,), x, mask, sigma, n, **options
        )
        return result
    check_float_tensor(subject, "x", x)
    if x.dtype != torch.float32:
        raise TypeError(f"{subject}: x must have dtype float32; got {x.dtype}.")
    check_positions(subject, x, n, seed, first_sample, first_index)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{subject}: mask must be a bool tensor; got {mask!r:.80}.")
    pair = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    for value in pair:
        check_positive(subject, "sigma", value)
    try:
        flat_mask = mask.broadcast_to(x.shape[1:]).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"{subject}: mask must be broadcastable to one input, {tuple(x.shape[1:])}; "
            f"got {tuple(mask.shape)}."
        ) from None
    position = (n, seed, first_sample, first_index)
    if not dispatcher_needed(x, flat_mask):
        return _split_cpu(x, flat_mask, *pair, *position)
    if differentiation_transforms():
        where = flat_mask.view(x.shape[1:])
        halves = [
            gaussian_samples(x, s, n, seed=seed, first_sample=first_sample, first_index=first_index)
            for s in pair
        ]
        return torch.where(where, halves[0], 0.0), torch.where(where, 0.0, halves[1])
    left, right = torch.ops.pyrobust.split_gaussian_samples(x, flat_mask, *pair, *position)
    return left, right


def _masked_cpu(
    x: Tensor,
    keep: float,
    fill: float,
    pixels: bool,
    n: int,
    seed: int,
    first_sample: int,
    first_index: int,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty((x.shape[0], n, *x.shape[1:]), dtype=dtype)
    flat = rows_of(x, torch.float32)
    channels = x.shape[1] if pixels else 1
    if out.numel() == 0:
        return out
    threshold = int(Fraction(keep) * 2**64)  # rounds down
    _native.masked_samples(
        flat.view(x.shape[0], channels, -1),
        threshold,
        fill,
        out.view(x.shape[0], n, channels, -1),
        seed,
        first_sample,
        first_index,
        torch.get_num_threads(),
    )
    return out


def _masked_fake(
    x: Tensor,
    keep: float,
    fill: float,
    pixels: bool,
    n: int,
    seed: int,
    first_sample: int,
    first_index: int,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], n, *x.shape[1:]), dtype=dtype)


def _masked_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.x_shape, ctx.x_dtype = inputs[0].shape, inputs[0].dtype
    ctx.coins = (inputs[1], 0.0, *inputs[3:8])


def _masked_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ones = grad.new_ones(ctx.x_shape, dtype=torch.float32)
    kept = torch.ops.pyrobust.masked_samples(ones, *ctx.coins, torch.float32)
    grad_x = (grad.float() * kept).sum(dim=1).to(ctx.x_dtype)
    return (grad_x, *(None,) * 8)


def _split_cpu(
    x: Tensor,
    mask: Tensor,
    sigma_left: float,
    sigma_right: float,
    n: int,
    seed: int,
    first_sample: int,
    first_index: int,
) -> tuple[Tensor, Tensor]:
    left = torch.empty((x.shape[0], n, *x.shape[1:]))
    right = torch.empty_like(left)
    flat = rows_of(x, torch.float32)
    shape = (x.shape[0], n, flat.shape[1])
    _native.split_gaussian_samples(
        flat,
        mask.contiguous(),
        sigma_left,
        sigma_right,
        left.view(shape),
        right.view(shape),
        seed,
        first_sample,
        first_index,
        torch.get_num_threads(),
    )
    return left, right


def _split_fake(
    x: Tensor,
    mask: Tensor,
    sigma_left: float,
    sigma_right: float,
    n: int,
    seed: int,
    first_sample: int,
    first_index: int,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], n, *x.shape[1:])
    return x.new_empty(shape), x.new_empty(shape)


def _split_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[1].view(inputs[0].shape[1:]))


def _split_backward(ctx: Any, left: Tensor, right: Tensor) -> tuple[Tensor | None, ...]:
    (mask,) = ctx.saved_tensors
    grad_x = torch.where(mask, left.sum(dim=1), right.sum(dim=1))
    return (grad_x, *(None,) * 7)


define(
    "masked_samples(Tensor x, float keep, float fill, bool pixels, int n, int seed,"
    " int first_sample, int first_index, ScalarType dtype) -> Tensor",
    _masked_cpu,
    _masked_fake,
    backward=_masked_backward,
    setup_context=_masked_save,
    cuda=_cuda_sampling.masked,
    vmap=slice_by_slice("masked_samples"),
)
define(
    "split_gaussian_samples(Tensor x, Tensor mask, float sigma_left, float sigma_right, int n,"
    " int seed, int first_sample, int first_index) -> (Tensor, Tensor)",
    _split_cpu,
    _split_fake,
    backward=_split_backward,
    setup_context=_split_save,
    cuda=_cuda_sampling.split,
    vmap=slice_by_slice("split_gaussian_samples"),
)
