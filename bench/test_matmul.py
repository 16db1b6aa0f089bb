"""Packed matmul against torch's dense products, in one run.

    python -m pytest bench/test_matmul.py --benchmark-only -s

One group per number of rows M; extra_info holds the packed bytes read per second and the ratio of
torch float32's median to ours. Weights are 4096 x 4096 in groups of 128.
"""

from __future__ import annotations

import pytest
import torch

from pyrobust import _native
from pyrobust.ops import packed_linear
from pyrobust.quantize import BITS, QTensor

SIZE, GROUP = 4096, 128
BATCHES = (1, 4, 16, 64, 256)
LEVELS = {1: 2, 1.58: 3, 2: 4, 3: 8, 4: 16, 8: 256}
KINDS = ["torch float32", "torch bfloat16"]
KINDS += [f"{bits} bits, {mode}" for bits in BITS for mode in ("float", "int8")]


def packed_weight(bits: float) -> QTensor:
    codes = torch.randint(0, LEVELS[bits], (SIZE, SIZE), dtype=torch.uint8)
    shape = (SIZE, SIZE // GROUP)
    zero = None
    if bits not in (1, 1.58):
        zero = torch.randint(0, LEVELS[bits], shape, dtype=torch.uint8)
    scale = (torch.rand(shape) + 0.5).half() / 64
    return QTensor.from_codes(codes, scale, zero, bits=bits, group_size=GROUP)


@pytest.fixture(scope="module")
def weights():
    dense = torch.randn(SIZE, SIZE)
    packed = {str(bits): packed_weight(bits) for bits in BITS}
    return {"torch float32": dense, "torch bfloat16": dense.bfloat16(), **packed}


@pytest.fixture(scope="module")
def medians():
    rows: dict[tuple[int, str], tuple[float, int]] = {}
    yield rows
    if rows:
        print(f"\n{SIZE} x {SIZE}, {torch.get_num_threads()} threads, {_native.isa()}")
    for (batch, kind), (seconds, size) in rows.items():
        reference = rows.get((batch, KINDS[0]), (float("nan"), 0))[0]
        print(
            f"M={batch:4} {kind:16} {1e6 * seconds:10.0f} us {size / seconds / 1e9:7.1f} GB/s "
            f"{reference / seconds:6.2f}x torch float32"
        )


def product(kind, weights, batch):
    """The call to time, and the bytes of weight that it reads."""
    if kind.startswith("torch"):
        weight = weights[kind]
        x = torch.randn(batch, SIZE).to(weight.dtype)
        return lambda: torch.nn.functional.linear(x, weight), weight.nbytes
    width, mode = kind.split(" bits, ")
    packed, x = weights[width], torch.randn(batch, SIZE)
    options = {
        "in_features": SIZE,
        "bits": packed.bits,
        "group_size": GROUP,
        "activations": "int8" if mode == "int8" else None,
    }
    parts = (packed.codes, packed.scale, packed.zero)
    return lambda: packed_linear(x, *parts, **options), packed.nbytes


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_linear(benchmark, weights, medians, batch, kind):
    call, size = product(kind, weights, batch)
    benchmark.group = f"linear {SIZE} x {SIZE}, M={batch}"
    with torch.inference_mode():
        benchmark(call)
    if benchmark.stats is None:
        return
    median = benchmark.stats.stats.median
    medians[batch, kind] = (median, size)
    benchmark.extra_info["GB/s"] = size / median / 1e9
    reference = medians.get((batch, KINDS[0]))
    if reference:
        benchmark.extra_info["ratio to torch float32"] = reference[0] / median
