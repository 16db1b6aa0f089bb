"""Passes over the weights: task vectors, plain and packed, against a copy; spectra in batches.

python -m pytest bench/test_weight_passes.py --benchmark-only
python -m pytest bench/test_weight_passes.py -s -k ratios
"""

from __future__ import annotations

import copy
import time
from functools import partial

import pytest
import torch
from torch import nn

from pyrobust.weights import Patcher, TaskVector, farms_esd, quantize_delta


@pytest.fixture(scope="module")
def model():
    """16.8 million weights in 16 matrices of 1024 x 1024."""
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(16)])


@pytest.fixture(scope="module")
def vector(model):
    deltas = {name: 0.01 * torch.randn_like(value) for name, value in model.named_parameters()}
    return TaskVector.from_deltas({name: value.detach() for name, value in deltas.items()})


@pytest.mark.benchmark(group="16.8 million weights")
def test_copy(benchmark, model):
    targets = [value.detach() for value in model.parameters()]
    sources = [value.clone() for value in targets]

    def copy_all():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    benchmark(copy_all)


@pytest.mark.benchmark(group="16.8 million weights")
def test_apply(benchmark, model, vector):
    benchmark(vector.apply_to, model, 1e-6)


PACKED = [("linear", bits) for bits in (1, 1.58, 2, 3, 4, 8)]
PACKED += [(scheme, bits) for scheme in ("log", "tanh") for bits in (4, 8)]


@pytest.mark.benchmark(group="16.8 million weights")
@pytest.mark.parametrize(("scheme", "bits"), PACKED)
def test_apply_packed(benchmark, model, vector, scheme, bits):
    """Codes decoded and added in one pass."""
    benchmark(quantize_delta(vector, bits, scheme).apply_to, model, 1e-6)


@pytest.mark.benchmark(group="16.8 million weights")
def test_patch_packed(benchmark, model, vector):
    """Put on by a patcher, which saves the originals first; taking off is outside the clock."""
    packed, patcher = quantize_delta(vector, 4), Patcher(model)
    benchmark.pedantic(
        patcher.apply,
        (packed, 1e-6, "one"),
        teardown=lambda *_: patcher.remove("one"),
        rounds=9,
        warmup_rounds=1,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ratios_to_a_copy(model, vector, dtype):
    """Least times of runs over that of as many copies of the same weights between them, printed.

    With one thread its processor time, so that a busy machine counts less; with more, wall time.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    model, vector = copy.deepcopy(model).to(dtype), vector.astype(dtype)
    targets = [value.detach() for value in model.parameters()]
    sources = [value.clone() for value in targets]

    def copy_all():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    def patch(patcher, packed):
        patcher.apply(packed, 1e-6, "one")

    jobs = {"float": lambda: vector.apply_to(model, 1e-6)}
    for scheme, bits in PACKED:
        packed = quantize_delta(vector, bits, scheme)
        jobs[f"{scheme}, {bits} bits"] = partial(packed.apply_to, model, 1e-6)
    patcher, four = Patcher(model), quantize_delta(vector, 4)
    jobs["patcher, linear, 4 bits"] = partial(patch, patcher, four)
    copies, times = ({name: [] for name in jobs} for _ in range(2))
    for _ in range(25):
        for name, job in jobs.items():
            for kind, timed in ((copies, copy_all), (times, job)):
                start = clock()
                timed()
                kind[name].append(clock() - start)
            if patcher.active:
                patcher.remove("one")
    least = [min(runs) for runs in copies.values()]
    count = sum(t.numel() for t in targets)
    span = f"{1e3 * min(least):.2f} to {1e3 * max(least):.2f} ms"
    print(f"\ncopy of {count} weights, {dtype}: {span}")
    for name in jobs:
        print(f"{name:24} {min(times[name]) / min(copies[name]):5.2f} copies")


@pytest.mark.benchmark(group="spectra of 512 x 2048, 100 windows")
@pytest.mark.parametrize("how", ["batched", "one by one"])
def test_spectra(benchmark, how):
    weight = torch.randn(512, 2048)
    if how == "batched":
        benchmark.pedantic(farms_esd, (weight,), {"rows": 100, "windows": 10}, rounds=3)
        return
    windows = [
        weight[i : i + 100, j : j + 100] for i in range(0, 410, 45) for j in range(0, 1940, 215)
    ]
    benchmark.pedantic(lambda: [torch.linalg.svdvals(w) for w in windows], rounds=3)
