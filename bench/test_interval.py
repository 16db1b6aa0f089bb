"""Interval propagation: ours against one plain forward and centre-radius in torch, in one run.

    python -m pytest bench/test_interval.py --benchmark-only -s

prints milliseconds and the ratio to torch's plain forward for an MLP 784-1024-1024-1024-10, boxes
of radius 2/255, on as many threads as torch uses.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from pyrobust import _native
from pyrobust.ops.interval import interval_linear, interval_packed_linear
from pyrobust.quantize import round_to_nearest

SIZES = [784, 1024, 1024, 1024, 10]
GENERATOR = torch.Generator().manual_seed(0)
LAYERS = [
    (torch.randn(o, i, generator=GENERATOR) / i**0.5, torch.randn(o, generator=GENERATOR) * 0.1)
    for i, o in itertools.pairwise(SIZES)
]
PACKED = [(round_to_nearest(weight, bits=4, group_size=128), bias) for weight, bias in LAYERS]


def plain(x):
    for index, (weight, bias) in enumerate(LAYERS):
        x = F.linear(x if index == 0 else x.relu(), weight, bias)
    return x


def propagate(x, layer, layers):
    lower, upper = x - 2 / 255, x + 2 / 255
    for index, (weight, bias) in enumerate(layers):
        if index > 0:
            lower, upper = lower.relu(), upper.relu()
        lower, upper = layer(lower, upper, weight, bias)
    return lower, upper


def centre_radius(lower, upper, weight, bias):
    middle = F.linear((lower + upper) / 2, weight, bias)
    reach = F.linear((upper - lower) / 2, weight.abs())
    return middle - reach, middle + reach


def ours(rounding):
    return lambda *tensors: interval_linear(*tensors, rounding=rounding)


def packed(lower, upper, weight, bias):
    return interval_packed_linear(
        lower, upper, weight.codes, weight.scale, weight.zero, bias,
        in_features=weight.shape[1], bits=4, group_size=128,
    )  # fmt: skip


PASSES = {
    "torch, plain forward": plain,
    "torch, centre and radius": lambda x: propagate(x, centre_radius, LAYERS),
    "pyrobust, nearest (unsound)": lambda x: propagate(x, ours("nearest"), LAYERS),
    "pyrobust, real": lambda x: propagate(x, ours("real"), LAYERS),
    "pyrobust, deployed": lambda x: propagate(x, ours("deployed"), LAYERS),
    "pyrobust, real, 4-bit weights": lambda x: propagate(x, packed, PACKED),
}


@pytest.fixture(scope="module")
def table():
    rows: dict[tuple[int, str], float] = {}
    yield rows
    if rows:
        print(f"\nMLP {SIZES}, {torch.get_num_threads()} threads, {_native.isa()}, fastest round")
        for (batch, name), seconds in rows.items():
            ratio = seconds / rows[(batch, next(iter(PASSES)))]
            print(f"batch {batch:4} {name:32} {seconds * 1e3:8.3f} ms {ratio:6.2f}x")


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("batch", [1, 128])
def test_interval_forward(benchmark, table, batch, name):
    benchmark.group = f"interval forward, batch {batch}"
    x = torch.rand(batch, SIZES[0], generator=GENERATOR)
    with torch.no_grad():
        benchmark(PASSES[name], x)
    if benchmark.stats is not None:
        table[(batch, name)] = benchmark.stats.stats.min
