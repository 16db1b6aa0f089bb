"""Packed matmul against torch and other low-bit products, interleaved, medians of one run.

    python -m pytest bench/test_matmul.py --benchmark-only -s

One test per shape and number of rows M; each round calls every kind once, so that a busy moment of
the machine falls on all. With one thread (OMP_NUM_THREADS=1) the time that the thread ran is taken,
which other processes stretch less. The table tells microseconds, packed bytes a second, and the
time of the best other product of the same width (or dense) over ours. ``PYROBUST_BENCH_SHAPES`` (as
4096x4096,11008x4096) and ``PYROBUST_BENCH_ROWS`` (as 1,16) choose.
"""

from __future__ import annotations

import os
import statistics
import time

import pytest
import torch

from pyrobust import _native
from pyrobust.ops import packed_linear
from pyrobust.quantize import BITS, QTensor, round_to_codebook, round_to_two_level

from .peers import Peer, dense_peers, packed_peers

GROUP = 128
LEVELS = {1: 2, 1.58: 3, 2: 4, 3: 8, 4: 16, 8: 256}
SHAPES = os.environ.get("PYROBUST_BENCH_SHAPES", "4096x4096").split(",")
BATCHES = [int(m) for m in os.environ.get("PYROBUST_BENCH_ROWS", "1,4,16,64,256").split(",")]


def packed_weight(bits: float, rows: int, cols: int) -> QTensor:
    codes = torch.randint(0, LEVELS[bits], (rows, cols), dtype=torch.uint8)
    shape = (rows, -(-cols // GROUP))
    zero = None
    if bits not in (1, 1.58):
        zero = torch.randint(0, LEVELS[bits], shape, dtype=torch.uint8)
    scale = (torch.rand(shape) + 0.5).half() / 64
    return QTensor.from_codes(codes, scale, zero, bits=bits, group_size=GROUP)


def ours(name: str, packed: QTensor, mode: str) -> Peer:
    options = {
        "in_features": packed.shape[1],
        "bits": packed.bits,
        "group_size": packed.group_size,
        "activations": "int8" if mode == "int8" else None,
        "extras": packed.extras,
    }
    parts = (packed.codes, packed.scale, packed.zero)

    def prepare(x):
        return lambda: packed_linear(x, *parts, **options)

    label = f"pyrobust {name}, {mode}"
    return Peer(label, packed.bits, prepare, packed.dequantize(), packed.nbytes)


@pytest.fixture(scope="module", params=SHAPES)
def kinds(request):
    rows, cols = (int(size) for size in request.param.split("x"))
    weight = torch.randn(rows, cols)
    every = list(dense_peers(weight))
    for bits in BITS:
        packed = packed_weight(bits, rows, cols)
        every += packed_peers(packed)
        every += [ours(f"{bits} bits", packed, mode) for mode in ("int8", "float")]
    two_level = round_to_two_level(weight, bits=4, group_size=GROUP)
    every.append(ours("4 bits, two-level", two_level, "int8"))
    every.append(ours("NF4", round_to_codebook(weight, group_size=GROUP), "int8"))
    return request.param, every


@pytest.mark.parametrize("batch", BATCHES)
def test_linear(benchmark, kinds, batch):
    shape, every = kinds
    cols = every[0].weight.shape[1]
    x = torch.randn(batch, cols)
    calls = {kind: kind.prepare(x) for kind in every}
    times: dict[Peer, list[float]] = {kind: [] for kind in every}

    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def round_of_all():
        for kind, call in calls.items():
            start = clock()
            call()
            times[kind].append(clock() - start)

    with torch.inference_mode():
        for kind, call in calls.items():  # a peer that computes something else is none
            result = torch.as_tensor(call()).float()
            expected = x @ kind.weight.t()
            assert (result - expected).norm() < 0.05 * expected.norm(), kind.name
        times = {kind: [] for kind in every}
        rounds = 31 if batch <= 4 else 9 if batch <= 16 else 3
        benchmark.pedantic(round_of_all, rounds=rounds)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    benchmark.extra_info |= {kind.name: 1e6 * seconds for kind, seconds in medians.items()}
    print(f"\n{shape}, M={batch}, {torch.get_num_threads()} threads, {_native.isa()}")
    for kind, seconds in medians.items():
        others = [
            t
            for other, t in medians.items()
            if not other.name.startswith("pyrobust") and other.bits in (kind.bits, 16, 32)
        ]
        speed = f"{min(others) / seconds:6.2f}x the best peer" if "pyrobust" in kind.name else ""
        rate = kind.nbytes / seconds / 1e9
        print(f"{kind.name:28} {1e6 * seconds:10.0f} us {rate:7.1f} GB/s {speed}")
