"""Noise: ours against torch's and numpy's generators and the textbook loop, in one run.

    python -m pytest bench/test_sampling.py --benchmark-only -s

prints nanoseconds per element and the ratio to the textbook loop, for 400 noisy copies of a
3 x 32 x 32 image, on as many threads as torch uses.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyrobust import _native
from pyrobust.nn import SmoothedClassifier
from pyrobust.ops import count_votes, gaussian_samples

N, SHAPE, SIGMA = 400, (3, 32, 32), 0.5
ELEMENTS = N * 3 * 32 * 32
X = torch.rand(1, *SHAPE)
GENERATOR = np.random.Generator(np.random.SFC64(0))


def textbook():
    batch = X.repeat(N, 1, 1, 1)
    return batch + torch.randn_like(batch) * SIGMA


def ours(dtype):
    with torch.no_grad():
        return gaussian_samples(X, SIGMA, N, seed=0, dtype=dtype)


NOISE = {
    "textbook: repeat + randn * sigma + add": textbook,
    "torch.randn, noise only": lambda: torch.randn(N, *SHAPE),
    "numpy SFC64 float32, noise only": lambda: GENERATOR.standard_normal(ELEMENTS, np.float32),
    "pyrobust float32": lambda: ours(torch.float32),
    "pyrobust bfloat16": lambda: ours(torch.bfloat16),
    "pyrobust float16": lambda: ours(torch.float16),
}


@pytest.fixture(scope="module")
def table():
    rows: dict[str, float] = {}
    yield rows
    if rows:
        reference = next(iter(rows.values()))
        print(f"\nx + sigma z, {torch.get_num_threads()} threads, {_native.isa()}")
        for name, nanoseconds in rows.items():
            print(f"{name:40} {nanoseconds:8.3f} ns per element {reference / nanoseconds:6.2f}x")


@pytest.mark.parametrize("name", NOISE)
@pytest.mark.benchmark(group="noise, 400 copies of 3x32x32")
def test_noise(benchmark, table, name):
    benchmark(NOISE[name])
    if benchmark.stats is not None:
        table[name] = benchmark.stats.stats.min / ELEMENTS * 1e9
        benchmark.extra_info["ns_per_element"] = table[name]


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
                for vote in base(textbook()).argmax(1).numpy():
                    counts[vote] += 1
        return counts

    smoothed = SmoothedClassifier(base, SIGMA, 10)
    ours = lambda: smoothed.certify(X, n0=1, n=10_000, batch_size=N)  # noqa: E731
    benchmark.pedantic(loop if who.startswith("textbook") else ours, rounds=3)
