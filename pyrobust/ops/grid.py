"""The rounded Gaussian on an integer grid, correctly rounded: sound noise for 8-bit images.

For an image of integers ``x``, ``x + round(s z)`` is ``round(x + s z)``: a classifier of rounded
inputs under exactly Gaussian noise. A certificate of smoothing for that classifier needs no word
about floating point, since the noise is exact (``csrc/core/grid_normal.h``).

Source: V. Voracek, M. Hein, "Sound randomized smoothing in floating-point arithmetics", ICLR 2023,
arXiv 2207.07209. Departures: the sampler decides by lazily drawn bits against proven thresholds
(Ziv's method) instead of exact rationals, and every value is drawn anew.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from pyrobust import _native
from pyrobust._checks import check_integer, check_positive
from pyrobust.ops import _cuda_sampling
from pyrobust.ops._grid_thresholds import grid_thresholds
from pyrobust.ops._library import define, dispatcher_needed, slice_by_slice
from pyrobust.ops._sampling_checks import FLOATS, check_positions, rows_of

__all__ = ["grid_samples"]

_DTYPES = (torch.int16, *FLOATS)
_MOST_STEPS = 2400.0  # of sigma: 13.1 standard deviations and a pixel must fit 16 bits


def grid_samples(
    x: Tensor,
    sigma: float,
    n: int,
    *,
    seed: int,
    grid: int = 255,
    first_sample: int = 0,
    first_index: int = 0,
    dtype: torch.dtype = torch.int16,
) -> Tensor:
    """Noisy copies ``x + round(grid * sigma * z)`` of 8-bit inputs, ``z`` exactly standard normal.

    The integer is the correctly rounded one but for a probability below ``2**-114`` per value, the
    same on every machine; it rounds the very noise of :func:`gaussian_samples`. Nothing is clamped.

    Args:
        x: ``(B, ...)`` uint8 inputs on the CPU or a CUDA device, in grid steps.
        sigma: standard deviation in units of ``grid`` steps, ``> 0``: with ``grid=255`` that of
            images scaled to [0, 1]. At most ``2400 / grid``.
        n: number of samples per input, ``>= 0``.
        seed: key of the noise, in ``[0, 2**63)``.
        grid: grid steps per unit, in [1, 65535]; 255 for 8-bit images.
        first_sample: sample index of the first copy, in ``[0, 2**40)``.
        first_index: image index of ``x[0]``, in ``[0, 2**48)``.
        dtype: int16 for the integers; float32, bfloat16 or float16 for the integers divided by
            ``grid``, rounded to float32 and then to ``dtype``.

    Returns:
        ``(B, n, ...)`` of ``dtype``.

    Raises:
        TypeError: ``x`` is not uint8, or another ``dtype``.
        ValueError: ``sigma`` or ``grid`` out of range, or ``n``, ``seed`` or an index.
        NotImplementedError: ``x`` is on a device without kernels.

    Example:
        >>> image = torch.full((1, 2), 128, dtype=torch.uint8)
        >>> whole = grid_samples(image, 0.25, 3, seed=0)
        >>> torch.equal(grid_samples(image, 0.25, 3, seed=0, dtype=torch.float32), whole / 255)
        True
    """
    subject = "grid_samples"
    if has_torch_function((x,)):
        options = {"seed": seed, "first_sample": first_sample, "first_index": first_index}
        result: Tensor = handle_torch_function(
            grid_samples, (x,), x, sigma, n, grid=grid, dtype=dtype, **options
        )
        return result
    if not isinstance(x, Tensor) or x.dtype != torch.uint8:
        seen = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{subject}: x must be a uint8 tensor of grid steps; got {seen}.")
    check_positions(subject, x, n, seed, first_sample, first_index)
    check_positive(subject, "sigma", sigma)
    check_integer(subject, "grid", grid, 1)
    if grid > 65535:
        raise ValueError(f"{subject}: grid must be at most 65535; got {grid}.")
    if sigma * grid > _MOST_STEPS:
        raise ValueError(
            f"{subject}: sigma must be at most {_MOST_STEPS / grid:g} for grid={grid}; got {sigma}."
        )
    if dtype not in _DTYPES:
        raise TypeError(
            f"{subject}: dtype must be int16, float32, bfloat16 or float16; got {dtype}."
        )
    position = (n, seed, first_sample, first_index)
    if not dispatcher_needed(x):
        return _grid_cpu(x, float(sigma), grid, *position, dtype)
    samples: Tensor = torch.ops.pyrobust.grid_samples(x, float(sigma), grid, *position, dtype)
    return samples


def _grid_cpu(
    x: Tensor,
    sigma: float,
    grid: int,
    n: int,
    seed: int,
    first_sample: int,
    first_index: int,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty((x.shape[0], n, *x.shape[1:]), dtype=dtype)
    flat = rows_of(x, torch.uint8)
    _native.grid_samples(
        flat,
        grid_thresholds(sigma, grid),
        sigma * grid,
        grid,
        out.view(x.shape[0], n, flat.shape[1]),
        seed,
        first_sample,
        first_index,
        torch.get_num_threads(),
    )
    return out


def _grid_fake(
    x: Tensor,
    sigma: float,
    grid: int,
    n: int,
    seed: int,
    first_sample: int,
    first_index: int,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], n, *x.shape[1:]), dtype=dtype)


define(
    "grid_samples(Tensor x, float sigma, int grid, int n, int seed, int first_sample,"
    " int first_index, ScalarType dtype) -> Tensor",
    _grid_cpu,
    _grid_fake,
    cuda=_cuda_sampling.grid,
    vmap=slice_by_slice("grid_samples"),
)
