"""Votes of a classifier on noisy copies of its inputs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyrobust import _native
from pyrobust._checks import check_eval_mode, check_float_tensor, check_integer
from pyrobust.certify.noise import GridGaussianNoise, Noise
from pyrobust.ops._sampling_checks import FLOATS
from pyrobust.ops.sampling import uniform_samples

_TILE = 4 << 20  # bytes of copies in a forward pass on the CPU; see forward_rows
_MOST_ROWS = 512

__all__ = [
    "check_voting",
    "classify",
    "count_noisy_votes",
    "count_parts",
    "device_of",
    "forward_rows",
    "uniform_shares",
]


def check_voting(
    subject: str, base: nn.Module, x: Tensor, batch_size: int | None, noise: Noise | None = None
) -> None:
    """Raise unless ``x`` is a batch that ``noise`` accepts and ``base`` is in evaluation mode."""
    if isinstance(noise, GridGaussianNoise):
        if not isinstance(x, Tensor) or x.dtype != torch.uint8:
            seen = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"{subject}: x must be a uint8 tensor of grid steps with grid={noise.grid}; "
                f"got {seen}."
            )
    elif isinstance(x, Tensor) and not x.is_floating_point():
        raise TypeError(
            f"{subject}: x must be a floating-point tensor, got {x.dtype}; noise on real values "
            "does not fit integer images, so scale them first, as in x.float() / 255, or keep "
            "them and give grid=255."
        )
    else:
        check_float_tensor(subject, "x", x)
    if noise is not None and x.is_floating_point() and x.dtype not in FLOATS:
        raise TypeError(
            f"{subject}: x must have dtype float32, bfloat16 or float16, as the noise has; got "
            f"{x.dtype}."
        )
    if x.ndim < 2:
        raise ValueError(f"{subject}: x must be a batch (B, ...); got shape {tuple(x.shape)}.")
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise ValueError(f"{subject}: x must be finite; it holds NaN or infinite values.")
    if batch_size is not None:
        check_integer(subject, "batch_size", batch_size, 1)
    check_eval_mode(subject, base)


def device_of(base: nn.Module) -> torch.device:
    """Where the base computes: the device of its first parameter or buffer, else the CPU."""
    for tensor in (*base.parameters(), *base.buffers()):
        return tensor.device
    return torch.device("cpu")


def forward_rows(batch_size: int | None, base: nn.Module, copy: tuple[int, ...]) -> int:
    """Copies per forward pass; None chooses them from the shape of one copy.

    On the CPU the copies of a pass take at most 4 MiB, so that the first layer reads from the cache
    what the sampler wrote: a power of two from 8 to 512 (256 for 3 x 32 x 32). The size does not
    follow the caches of the machine, since a base may round differently in another batch and a job
    moved to another machine must go on with the same votes. On other devices it is 512.
    """
    if batch_size is not None:
        return batch_size
    if device_of(base).type != "cpu":
        return _MOST_ROWS
    fitting = max(1, _TILE // (4 * max(1, math.prod(copy))))
    return min(_MOST_ROWS, max(8, 1 << (fitting.bit_length() - 1)))


def classify(base: nn.Module, noisy: Tensor, num_classes: int, subject: str) -> tuple[Tensor, int]:
    """``(N,)`` int64 classes of ``(N, ...)`` CPU inputs, and the first row with a NaN, or -1.

    Raises:
        ValueError: the base does not return ``(N, num_classes)``.
    """
    with torch.no_grad():
        logits = base(noisy.to(device_of(base)))
    if logits.shape != (noisy.shape[0], num_classes):
        raise ValueError(
            f"{subject}: the base must return shape ({noisy.shape[0]}, {num_classes}) for "
            f"num_classes={num_classes}; got {tuple(logits.shape)}."
        )
    halves = (torch.float16, torch.bfloat16)
    logits = logits if logits.dtype in halves else logits.to(torch.float32)
    votes = torch.empty(noisy.shape[0], dtype=torch.int64)
    nan = _native.find_votes(logits.cpu().contiguous(), votes, torch.get_num_threads())
    return votes, nan


def count_noisy_votes(
    base: nn.Module,
    x: Tensor,
    noise: Noise,
    n: int,
    *,
    num_classes: int,
    seed: int,
    first_sample: int = 0,
    first_index: int = 0,
    batch_size: int = 512,
    subject: str = "count_noisy_votes",
    bar: Any = None,
) -> Tensor:
    """Class counts of ``n`` noisy copies of each input.

    Every forward batch holds copies of one image only and starts at a multiple of ``batch_size``
    copies, so an image meets the same batches whatever other images stand beside it.

    Args:
        base: classifier, ``(N, ...)`` to ``(N, num_classes)``, in evaluation mode, any device.
        x: ``(B, ...)`` inputs of a kind that the noise accepts.
        noise: what is added to them.
        n: copies per input.
        num_classes: ``K``.
        seed: key of the noise.
        first_sample: sample index of the first copy.
        first_index: image index of ``x[0]``.
        batch_size: copies per forward pass.
        subject: who asks, for error messages.
        bar: a tqdm bar to advance by the copies done, or None.

    Returns:
        ``(B, K)`` int64 counts on the CPU; each row sums to ``n``.

    Raises:
        ValueError: the base returns another shape, or NaN for a sample (which is named).
    """
    counts = torch.zeros(x.shape[0], num_classes, dtype=torch.int64)
    images = x.detach().cpu()
    for b in range(x.shape[0]):
        for start in range(0, n, batch_size):
            size = min(batch_size, n - start)
            sample, index = first_sample + start, first_index + b
            with torch.no_grad():
                noisy = noise.samples(
                    images[b : b + 1],
                    size,
                    seed=seed,
                    first_sample=sample,
                    first_index=index,
                )
            votes, nan = classify(base, noisy[0], num_classes, subject)
            if nan >= 0:
                raise ValueError(
                    f"{subject}: the base must not return NaN; it does for sample {sample + nan} "
                    f"of image {index} (seed {seed})."
                )
            counts[b] += torch.bincount(votes, minlength=num_classes)
            if bar is not None:
                bar.update(size)
    return counts


def count_parts(
    base: nn.Module,
    x: Tensor,
    noise: Noise,
    parts: list[tuple[int, int]],
    *,
    num_classes: int,
    seed: int,
    first_index: int,
    batch_size: int,
    subject: str,
    progress: bool,
) -> list[Tensor]:
    """:func:`count_noisy_votes` for each (first sample, number of samples), under one bar.

    Returns:
        ``(B, K)`` int64 counts for each part; parts that do not overlap are independent.
    """
    total = x.shape[0] * sum(n for _, n in parts)
    with tqdm(total=total, disable=not progress, unit="sample", desc=subject) as bar:
        return [
            count_noisy_votes(
                base,
                x,
                noise,
                n,
                num_classes=num_classes,
                seed=seed,
                first_sample=first,
                first_index=first_index,
                batch_size=batch_size,
                subject=subject,
                bar=bar,
            )
            for first, n in parts
        ]


def uniform_shares(inputs: int, seed: int, first_index: int) -> Tensor:
    """``(B,)`` uniform numbers, one per input, from a sample index that no copy has.

    Rounded up, which lowers the bounds of :func:`pyrobust.certify.randomised_lower`.
    """
    last = 2**40 - 1
    drawn = uniform_samples(
        torch.zeros(inputs, 1), 1.0, 1, seed=seed, first_sample=last, first_index=first_index
    )
    return ((1 + drawn.double().flatten()) / 2 + 2**-23).clamp(max=1.0)
