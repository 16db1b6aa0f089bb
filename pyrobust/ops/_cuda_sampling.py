"""The sampling operators on CUDA tensors: outputs from torch, one launch each, the CPU's bits."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from pyrobust.ops._cuda_module import FLOAT_CODES, cuda_module, where
from pyrobust.ops._cuda_streams import capturing
from pyrobust.ops._grid_thresholds import grid_thresholds
from pyrobust.ops._sampling_checks import rows_of

__all__ = ["count_votes", "grid", "masked", "noise", "split", "substituted"]

_KINDS = {"gaussian_samples": 0, "uniform_samples": 1, "laplace_samples": 2}


def noise(
    name: str,
    x: Tensor,
    scale: Tensor,
    n: int,
    seed: int,
    first_sample: int,
    first_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """Gaussian, uniform or Laplace copies, by the operator's ``name``."""
    out = x.new_empty((x.shape[0], n, *x.shape[1:]), dtype=dtype)
    flat, scale = rows_of(x, torch.float32), scale.detach().contiguous()
    cuda_module(name).noise_samples(
        _KINDS[name],
        flat.data_ptr(),
        scale.data_ptr(),
        out.data_ptr(),
        FLOAT_CODES[dtype],
        (x.shape[0], n, flat.shape[1], first_sample, first_index),
        seed,
        where(x),
    )
    return out


def split(
    x: Tensor,
    mask: Tensor,
    sigma_left: float,
    sigma_right: float,
    n: int,
    seed: int,
    first_sample: int,
    first_index: int,
) -> tuple[Tensor, Tensor]:
    """Gaussian copies of the two parts that ``mask`` (one bool per element) makes."""
    left = x.new_empty((x.shape[0], n, *x.shape[1:]))
    right = torch.empty_like(left)
    flat, mask = rows_of(x, torch.float32), mask.contiguous()
    cuda_module("split_gaussian_samples").split_gaussian_samples(
        flat.data_ptr(),
        mask.data_ptr(),
        sigma_left,
        sigma_right,
        left.data_ptr(),
        right.data_ptr(),
        (x.shape[0], n, flat.shape[1], first_sample, first_index),
        seed,
        where(x),
    )
    return left, right


def masked(
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
    """Copies with positions hidden; channels share a coin where ``pixels``."""
    out = x.new_empty((x.shape[0], n, *x.shape[1:]), dtype=dtype)
    if out.numel() == 0:
        return out
    flat = rows_of(x, torch.float32)
    channels = x.shape[1] if pixels else 1
    cuda_module("masked_samples").masked_samples(
        flat.data_ptr(),
        channels,
        int(Fraction(keep) * 2**64),  # rounds down
        fill,
        out.data_ptr(),
        FLOAT_CODES[dtype],
        (x.shape[0], n, flat.shape[1] // channels, first_sample, first_index),
        seed,
        where(x),
    )
    return out


@lru_cache(maxsize=16)
def _thresholds_on(sigma: float, grid: int, device: torch.device) -> Tensor:
    return grid_thresholds(sigma, grid).to(device)


def grid(
    x: Tensor,
    sigma: float,
    grid: int,
    n: int,
    seed: int,
    first_sample: int,
    first_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """Copies with the correctly rounded Gaussian on a grid.

    The first call with a sigma moves its table to the device; make it before capturing a graph.
    """
    out = x.new_empty((x.shape[0], n, *x.shape[1:]), dtype=dtype)
    flat, thresholds = rows_of(x, torch.uint8), _thresholds_on(sigma, grid, x.device)
    if x.is_cuda and not capturing(x):  # it may be forgotten while the kernel reads it
        thresholds.record_stream(torch.cuda.current_stream(x.device))
    cuda_module("grid_samples").grid_samples(
        flat.data_ptr(),
        thresholds.data_ptr(),
        thresholds.shape[1],
        sigma * grid,
        float(grid),
        out.data_ptr(),
        -1 if dtype == torch.int16 else FLOAT_CODES[dtype],
        (x.shape[0], n, flat.shape[1], first_sample, first_index),
        seed,
        where(x),
    )
    return out


def substituted(
    tokens: Tensor,
    offsets: Tensor,
    candidates: Tensor,
    n: int,
    seed: int,
    first_sample: int,
    first_index: int,
) -> Tensor:
    """Copies of texts; a list that does not lie within ``candidates`` counts as empty."""
    out = tokens.new_empty((tokens.shape[0], n, *tokens.shape[1:]))
    flat, offsets = rows_of(tokens, torch.int64), offsets.contiguous()
    candidates = candidates.contiguous()
    cuda_module("substituted_tokens").substituted_tokens(
        flat.data_ptr(),
        offsets.data_ptr(),
        candidates.data_ptr(),
        len(offsets) - 1,
        len(candidates),
        out.data_ptr(),
        (tokens.shape[0], n, flat.shape[1], first_sample, first_index),
        seed,
        where(tokens),
    )
    return out


def count_votes(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Histograms, and ``(1,)`` int64: the first row with a NaN less the number of rows, or 0.

    A row with a NaN votes for no class. Both results are filled with zeros by one launch.
    """
    rows = logits.detach().reshape(-1, logits.shape[-1]).contiguous()
    shape = (*logits.shape[:-2], logits.shape[-1])
    both = logits.new_zeros(math.prod(shape) + 1, dtype=torch.int64)
    counts, first_nan = both[:-1].view(shape), both[-1:]
    if rows.numel() != 0:
        cuda_module("count_votes").count_votes(
            rows.data_ptr(),
            FLOAT_CODES[logits.dtype],
            rows.shape[0],
            logits.shape[-2],
            logits.shape[-1],
            counts.data_ptr(),
            first_nan.data_ptr(),
            where(logits),
        )
    return counts, first_nan
