"""Passes over the weights: task vectors, plain and packed, against a copy; spectra in batches.

python -m pytest bench/test_weight_passes.py --benchmark-only
"""

from __future__ import annotations

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

    def copy():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    benchmark(copy)


@pytest.mark.benchmark(group="16.8 million weights")
def test_apply(benchmark, model, vector):
    benchmark(vector.apply_to, model, 1e-6)


@pytest.mark.benchmark(group="16.8 million weights")
@pytest.mark.parametrize("scheme", ["linear", "tanh"])
@pytest.mark.parametrize("bits", [4, 8])
def test_patch_packed(benchmark, model, vector, bits, scheme):
    """Put on only; taking off is outside the clock."""
    packed = quantize_delta(vector, bits, scheme)
    patcher = Patcher(model)
    benchmark.pedantic(
        patcher.apply, (packed, 1.0, "one"), teardown=lambda *_: patcher.clear(), rounds=5
    )


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
