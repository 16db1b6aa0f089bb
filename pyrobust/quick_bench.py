"""A short measurement of the three kernel families against plain torch, in one run.

For a first impression of a machine; ``make bench`` measures with care.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn import functional as F

from pyrobust._checks import check_choice
from pyrobust.info import info
from pyrobust.ops import gaussian_samples, packed_linear
from pyrobust.ops.interval import interval_linear
from pyrobust.quantize import BITS, round_to_nearest

__all__ = ["bench_table", "run_bench"]

_LARGE = 4096  # a float weight of 64 MiB: larger than caches, as where packing pays
_SIZE = 1024
_ROUNDS = 30
_MATMUL_ROUNDS = 10


def run_bench(*, seed: int = 0, family: str | None = None) -> dict[str, Any]:
    """Time each family and its plain counterpart, interleaved; the best of 30 counts.

    Args:
        seed: of the random inputs.
        family: None for one line of each family; ``"matmul"`` for the packed product at every width
            and both kinds of activations (the best of 10 counts).

    Returns:
        ``machine`` and ``rows``; a row has ``family``, ``work``, ``plain``, ``seconds``,
        ``plain_seconds`` and ``speed`` (plain over ours).
    """
    check_choice("run_bench", "family", family, (None, "matmul"))
    rows = []
    pairs, rounds = (_pairs, _ROUNDS) if family is None else (_matmul_pairs, _MATMUL_ROUNDS)
    with torch.inference_mode():
        for kind, work, plain, ours, reference in pairs(torch.Generator().manual_seed(seed)):
            seconds, plain_seconds = _best(ours, reference, rounds)
            rows.append(
                {
                    "family": kind,
                    "work": work,
                    "plain": plain,
                    "seconds": seconds,
                    "plain_seconds": plain_seconds,
                    "speed": plain_seconds / seconds,
                }
            )
    return {"machine": info().to_dict(), "rows": rows}


def bench_table(result: Mapping[str, Any]) -> str:
    """The result of :func:`run_bench` for people."""
    machine = result["machine"]
    lines = [
        f"{machine['isa']}, {machine['threads']} threads, torch {machine['torch']}; "
        "speed is against the plain torch on the right"
    ]
    for row in result["rows"]:
        lines.append(
            f"{row['family']:<9} {row['work']:<32} {1e6 * row['seconds']:>9.1f} us "
            f"{row['speed']:>6.2f}x  {row['plain']} ({1e6 * row['plain_seconds']:.1f} us)"
        )
    return "\n".join(lines)


_Pair = tuple[str, str, str, Callable[[], Any], Callable[[], Any]]


def _matmul_pairs(generator: torch.Generator) -> Iterator[_Pair]:
    """The packed product at every width, in both modes, for 1 and 16 rows."""
    large = torch.randn(_LARGE, _LARGE, generator=generator)
    for bits in BITS:
        packed = round_to_nearest(large, bits=bits, group_size=128)
        for rows in (1, 16):
            x = torch.randn(rows, _LARGE, generator=generator)
            for activations in ("int8", None):
                work = f"{bits} bits, {activations or 'float'}, {rows} x {_LARGE} x {_LARGE}"
                ours = functools.partial(
                    packed_linear,
                    x,
                    packed.codes,
                    packed.scale,
                    packed.zero,
                    in_features=_LARGE,
                    bits=bits,
                    group_size=128,
                    activations=activations,
                )
                yield "matmul", work, "float F.linear", ours, functools.partial(F.linear, x, large)


def _pairs(generator: torch.Generator) -> list[_Pair]:
    """Family, work, plain counterpart, and the two functions."""
    large = torch.randn(_LARGE, _LARGE, generator=generator)
    packed = round_to_nearest(large, bits=4, group_size=128)
    wide = torch.randn(1, _LARGE, generator=generator)
    weight = torch.randn(_SIZE, _SIZE, generator=generator)
    one = torch.randn(1, _SIZE, generator=generator)
    low, high = one - 0.1, one + 0.1
    image = torch.rand(1, 3, 32, 32, generator=generator)
    return [
        (
            "matmul",
            f"4 bits, 1 x {_LARGE} x {_LARGE}",
            "float F.linear",
            lambda: packed_linear(
                wide,
                packed.codes,
                packed.scale,
                packed.zero,
                in_features=_LARGE,
                bits=4,
                group_size=128,
            ),
            lambda: F.linear(wide, large),
        ),
        (
            "sampling",
            "100 noisy copies of 3 x 32 x 32",
            "repeat + randn + add",
            lambda: gaussian_samples(image, 0.25, 100, seed=0),
            lambda: _noisy_copies(image),
        ),
        (
            "interval",
            f"outward, 1 x {_SIZE} x {_SIZE}",
            "centre and radius, not outward",
            lambda: interval_linear(low, high, weight),
            lambda: _centre_radius(low, high, weight),
        ),
    ]


def _noisy_copies(image: torch.Tensor) -> torch.Tensor:
    batch = image.repeat(100, 1, 1, 1)
    return batch + torch.randn_like(batch) * 0.25


def _centre_radius(
    low: torch.Tensor, high: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    centre = F.linear((low + high) / 2, weight)
    radius = F.linear((high - low) / 2, weight.abs())
    return centre - radius, centre + radius


def _best(ours: Callable[[], Any], plain: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Shortest time of each, measured in turn so that both see the same machine."""
    best = [float("inf"), float("inf")]
    for _ in range(rounds):
        for i, function in enumerate((ours, plain)):
            start = time.perf_counter()
            function()
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0], best[1]
