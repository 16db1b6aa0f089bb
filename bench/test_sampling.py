"""Noise: ours against torch's, numpy's and MKL's generators and the textbook loop, in one run.

    python -m pytest bench/test_sampling.py --benchmark-only -s

prints nanoseconds per element and the ratio to the textbook loop, for noisy copies of a 3 x 32 x 32
image. MKL, where it is installed, makes the noise only.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pyrobust import _native
from pyrobust.nn import SmoothedClassifier
from pyrobust.ops import (
    count_votes,
    gaussian_samples,
    grid_samples,
    laplace_samples,
    masked_samples,
    split_gaussian_samples,
    substituted_tokens,
    uniform_samples,
)

N, SHAPE, SIGMA = 400, (3, 32, 32), 0.5
FEW = 80
X = torch.rand(1, *SHAPE)
PIXELS = (X * 255).to(torch.uint8)
MASK = torch.arange(32 * 32).view(32, 32) % 2 == 0
TOKENS = torch.randint(0, 1000, (1, 3072))
OFFSETS, CANDIDATES = torch.arange(1001) * 20, torch.randint(0, 1000, (20_000,))

MKL_PHILOX, MKL_ARS5 = 16 << 20, 15 << 20
MKL_ICDF, MKL_BOX_MULLER = 2, 1


def textbook(x: torch.Tensor, n: int, sigma: float) -> torch.Tensor:
    """The loop of most published code: repeat, randn, multiply, add."""
    batch = x.repeat(n, *[1] * (x.ndim - 1))
    return batch + torch.randn_like(batch) * sigma


def numpy_generator(count: int) -> Callable[[], object]:
    """Standard normals of float32 from numpy's fastest generator."""
    generator = np.random.Generator(np.random.SFC64(0))
    return lambda: generator.standard_normal(count, np.float32)


def mkl_generator(count: int, bits: int, method: int) -> Callable[[], object] | None:
    """Standard normals of float32 from MKL on one thread; None where MKL is not installed.

    The library is that of the package ``mkl`` in this environment, or the one that the variable
    MKL_LIBRARY names.
    """
    folder = Path(sys.prefix) / "lib"
    found = sorted(folder.glob("libmkl_rt.so*")) if folder.is_dir() else []
    path = os.environ.get("MKL_LIBRARY") or (str(found[0]) if found else None)
    if path is None:
        return None
    os.environ.setdefault("MKL_THREADING_LAYER", "SEQUENTIAL")
    library = ctypes.CDLL(path)
    stream = ctypes.c_void_p()
    if library.vslNewStream(ctypes.byref(stream), bits, 1) != 0:
        raise RuntimeError("MKL refused the stream")
    out = np.empty(count, np.float32)
    pointer = out.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    zero, one = ctypes.c_float(0.0), ctypes.c_float(1.0)
    return lambda: library.vsRngGaussian(method, stream, count, pointer, zero, one)


PEERS = {
    "textbook: repeat + randn * sigma + add": lambda: textbook(X, FEW, SIGMA),
    "torch.randn, noise only": lambda: torch.randn(FEW, *SHAPE),
    "numpy SFC64 float32, noise only": numpy_generator(FEW * 3072),
    "MKL Philox ICDF, noise only": mkl_generator(FEW * 3072, MKL_PHILOX, MKL_ICDF),
    "MKL Philox Box-Muller, noise only": mkl_generator(FEW * 3072, MKL_PHILOX, MKL_BOX_MULLER),
    "MKL ARS5 ICDF, noise only": mkl_generator(FEW * 3072, MKL_ARS5, MKL_ICDF),
}
OURS = {
    "gaussian float32": lambda n: gaussian_samples(X, SIGMA, n, seed=0),
    "gaussian bfloat16": lambda n: gaussian_samples(X, SIGMA, n, seed=0, dtype=torch.bfloat16),
    "gaussian float16": lambda n: gaussian_samples(X, SIGMA, n, seed=0, dtype=torch.float16),
    "grid, int16": lambda n: grid_samples(PIXELS, SIGMA, n, seed=0),
    "grid, float32": lambda n: grid_samples(PIXELS, SIGMA, n, seed=0, dtype=torch.float32),
    "uniform float32": lambda n: uniform_samples(X, SIGMA, n, seed=0),
    "laplace float32": lambda n: laplace_samples(X, SIGMA, n, seed=0),
    "masked float32, coin per element": lambda n: masked_samples(X, 0.2, n, seed=0),
    "split halves float32": lambda n: split_gaussian_samples(X, MASK, SIGMA, n, seed=0),
    "tokens of 20 candidates": lambda n: substituted_tokens(TOKENS, OFFSETS, CANDIDATES, n, seed=0),
}
ROWS = [
    *((name, 1, FEW) for name in (*PEERS, *OURS)),
    *(("gaussian float32", threads, N) for threads in (1, 2)),
    *(("grid, int16", threads, N) for threads in (1, 2)),
]


@pytest.fixture(scope="module")
def table():
    rows: dict[tuple[str, int, int], float] = {}
    yield rows
    if rows:
        reference = next(iter(rows.values()))
        print(f"\nns per element, fastest round, {_native.isa()}; ratio to the first row")
        for (name, threads, copies), nanoseconds in rows.items():
            ratio = reference / nanoseconds
            words = f"{copies:3} copies, {threads} thread(s)"
            print(f"{name:40} {words} {nanoseconds:8.3f} {ratio:7.2f}x")


@pytest.mark.parametrize(("name", "threads", "copies"), ROWS)
@pytest.mark.benchmark(group="noise, copies of 3x32x32")
def test_noise(benchmark, table, name, threads, copies):
    """A few copies for all: on a busy machine only short rounds are ever undisturbed."""
    call = PEERS.get(name) if name in PEERS else lambda: OURS[name](copies)
    if call is None:
        pytest.skip("MKL is not installed")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            benchmark(call)
    finally:
        torch.set_num_threads(before)
    if benchmark.stats is not None:
        key = name, threads, copies
        table[key] = benchmark.stats.stats.min / (copies * 3072) * 1e9
        benchmark.extra_info["ns_per_element"] = table[key]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
@pytest.mark.benchmark(group="kernel alone: one image into a buffer in the cache")
def test_kernel(benchmark, isa, dtype):
    """Ten copies, 120 KB of float32: what a small first layer reads from the second-level cache."""
    if isa not in _native.supported_isas():
        pytest.skip(f"no {isa} here")
    x, scale = X.view(1, -1), torch.ones(1)
    out = torch.empty(1, 10, 3072, dtype=getattr(torch, dtype))
    before = _native.isa()
    _native.set_isa(isa)
    try:
        benchmark(_native.gaussian_samples, x, scale, out, 0, 0, 0, 1)
    finally:
        _native.set_isa(before)
    if benchmark.stats is not None:
        print(f"\n{isa} {dtype}: {benchmark.stats.stats.min / out.numel() * 1e9:.3f} ns")


@pytest.mark.parametrize("who", ["torch argmax + bincount", "pyrobust count_votes"])
@pytest.mark.benchmark(group="votes, 100000 rows of 10")
def test_votes(benchmark, who):
    logits = torch.randn(100_000, 10)
    with torch.no_grad():
        if who.startswith("torch"):
            benchmark(lambda: torch.bincount(logits.argmax(-1), minlength=10))
        else:
            benchmark(lambda: count_votes(logits))


def small_network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, stride=2), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, stride=2), torch.nn.ReLU(),
        torch.nn.Conv2d(32, 64, 3, stride=2), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(64 * 9, 10),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("who", ["textbook loop", "pyrobust certify"])
@pytest.mark.benchmark(group="whole certification loop, 10000 copies of 3x32x32, small CNN")
def test_certification_loop(benchmark, who):
    base = small_network()

    def loop():
        counts = np.zeros(10, dtype=np.int64)
        with torch.no_grad():
            for _ in range(10_000 // N):
                for vote in base(textbook(X, N, SIGMA)).argmax(1).numpy():
                    counts[vote] += 1
        return counts

    smoothed = SmoothedClassifier(base, SIGMA, 10)
    ours = lambda: smoothed.certify(X, n0=1, n=10_000, batch_size=N)  # noqa: E731
    benchmark.pedantic(loop if who.startswith("textbook") else ours, rounds=3)
