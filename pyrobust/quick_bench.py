"""A short measurement of the three kernel families against plain torch, in one run.

For a first impression of a machine; ``make bench`` measures with care.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyrobust._checks import check_choice
from pyrobust._machine_limits import least_seconds
from pyrobust.info import info
from pyrobust.ops import gaussian_samples, packed_linear
from pyrobust.ops.interval import interval_linear
from pyrobust.quantize import BITS, QTensor, round_to_nearest

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
        ``plain_seconds`` and ``speed`` (plain over ours). Rows of ``"matmul"`` have ``peer`` and
        ``peer_seconds`` besides, the fastest product of the same width or of bfloat16 that torch
        holds, ``nbytes`` of the packed weight, and ``limit_seconds``: what this machine needs to
        read them or to multiply.
    """
    check_choice("run_bench", "family", family, (None, "matmul"))
    make, rounds = (_pairs, _ROUNDS) if family is None else (_matmul_pairs, _MATMUL_ROUNDS)
    rows = []
    with torch.inference_mode():
        for pair in make(torch.Generator().manual_seed(seed)):
            rows.append(_row(pair, rounds))
    return {"machine": info().to_dict(), "rows": rows}


def bench_table(result: Mapping[str, Any]) -> str:
    """The result of :func:`run_bench` for people."""
    machine = result["machine"]
    lines = [
        f"{machine['isa']}, {machine['threads']} threads, torch {machine['torch']}; "
        "speed is against the plain torch on the right"
    ]
    if any("limit_seconds" in row for row in result["rows"]):
        lines[0] += (
            "; GB/s of packed weights; share of this machine's limit, by reading or multiplying; "
            "ratio to the best of torch's products of the same width or in bfloat16"
        )
    lines += [_line(row) for row in result["rows"]]
    return "\n".join(lines)


def _line(row: Mapping[str, Any]) -> str:
    seconds, plain = row["seconds"], row["plain_seconds"]
    line = f"{row['family']:<9} {row['work']:<32} {1e6 * seconds:>9.1f} us {row['speed']:>6.2f}x  "
    line += f"{row['plain']} ({1e6 * plain:.1f} us)"
    if "limit_seconds" in row:
        line += (
            f"  {row['nbytes'] / seconds / 1e9:>6.1f} GB/s {row['limit_seconds'] / seconds:>5.0%}"
        )
        line += f" {row['peer_seconds'] / seconds:>6.2f}x  {row['peer']}"
    return line


_Call = Callable[[], Any]


@dataclass(frozen=True)
class _Pair:
    """One line: what is timed, its plain counterpart, other products of torch, and the work."""

    family: str
    work: str
    plain: str
    ours: _Call
    reference: _Call
    peers: Mapping[str, _Call] | None = None
    nbytes: int = 0
    operations: int = 0
    bits: float = 8


def _row(pair: _Pair, rounds: int) -> dict[str, Any]:
    peers = dict(pair.peers or {})
    seconds, plain_seconds, *others = _best((pair.ours, pair.reference, *peers.values()), rounds)
    row = {
        "family": pair.family,
        "work": pair.work,
        "plain": pair.plain,
        "seconds": seconds,
        "plain_seconds": plain_seconds,
        "speed": plain_seconds / seconds,
    }
    if peers:
        peer_seconds, peer = min(zip(others, peers, strict=True))
        threads = torch.get_num_threads()
        limit = least_seconds(pair.nbytes, pair.operations, threads, bits=pair.bits)
        row |= {"peer": peer, "peer_seconds": peer_seconds}
        row |= {"nbytes": pair.nbytes, "limit_seconds": limit}
    return row


def _matmul_pairs(generator: torch.Generator) -> Iterator[_Pair]:
    """The packed product at every width, in both modes, for 1 and 16 rows."""
    large = torch.randn(_LARGE, _LARGE, generator=generator)
    half = large.bfloat16()
    for bits in BITS:
        packed = round_to_nearest(large, bits=bits, group_size=128)
        of_width = _torch_products(packed)
        for rows in (1, 16):
            x = torch.randn(rows, _LARGE, generator=generator)
            own = x.bfloat16()
            peers = {"bfloat16 F.linear": functools.partial(F.linear, own, half)}
            peers |= {name: functools.partial(call, own) for name, call in of_width.items()}
            for activations in ("int8", None):
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
                yield _Pair(
                    "matmul",
                    f"{bits} bits, {activations or 'float'}, {rows} x {_LARGE} x {_LARGE}",
                    "float F.linear",
                    ours,
                    functools.partial(F.linear, x, large),
                    peers,
                    packed.nbytes,
                    2 * rows * large.numel(),
                    bits,
                )


def _torch_products(packed: QTensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """The products of the width of ``packed`` that torch itself holds, for bfloat16 inputs."""
    if packed.bits == 4:
        codes, group = packed.unpack_codes().int(), packed.group_size
        scale, zero = packed.scale.float(), _zero_point(packed)
        both = torch.stack([scale, (8 - zero) * scale], 2).transpose(0, 1).bfloat16().contiguous()
        own = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        return {"torch int4pack": lambda x: product(x, own, group, both)}
    if packed.bits == 8:
        weight = packed.dequantize()
        step = weight.abs().amax(1) / 127
        rounded, steps = (weight / step[:, None]).round().to(torch.int8), step.bfloat16()
        return {"torch int8pack": lambda x: torch.ops.aten._weight_int8pack_mm(x, rounded, steps)}
    return {}


def _zero_point(packed: QTensor) -> Tensor:
    return torch.full_like(packed.scale, 8.0) if packed.zero is None else packed.zero.float()


def _pairs(generator: torch.Generator) -> list[_Pair]:
    """One line of each family."""
    large = torch.randn(_LARGE, _LARGE, generator=generator)
    packed = round_to_nearest(large, bits=4, group_size=128)
    wide = torch.randn(1, _LARGE, generator=generator)
    weight = torch.randn(_SIZE, _SIZE, generator=generator)
    one = torch.randn(1, _SIZE, generator=generator)
    low, high = one - 0.1, one + 0.1
    image = torch.rand(1, 3, 32, 32, generator=generator)
    return [
        _Pair(
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
        _Pair(
            "sampling",
            "100 noisy copies of 3 x 32 x 32",
            "repeat + randn + add",
            lambda: gaussian_samples(image, 0.25, 100, seed=0),
            lambda: _noisy_copies(image),
        ),
        _Pair(
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


def _best(calls: Sequence[_Call], rounds: int) -> list[float]:
    """Shortest time of each, measured in turn so that all see the same machine."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, function in enumerate(calls):
            start = time.perf_counter()
            function()
            best[i] = min(best[i], time.perf_counter() - start)
    return best
