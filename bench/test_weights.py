"""Whole-model weight operations against a plain copy of the same weights.

python -m pytest bench/test_weights.py --benchmark-only -s
"""

from __future__ import annotations

import pytest
import torch

from pyrobust.weights import apply_permutation, resnet_spec, weight_match

STAGES = ((64, 256, 3), (128, 512, 4), (256, 1024, 6), (512, 2048, 3))


def resnet50_state(seed):
    """Random weights with the names and shapes of a ResNet-50 (25.6 million)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv1.weight": (64, 3, 7, 7), "bn1.weight": (64,), "bn1.bias": (64,)}
    before = 64
    for stage, (width, out, blocks) in enumerate(STAGES, 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            convolutions = [(width, before, 1, 1), (width, width, 3, 3), (out, width, 1, 1)]
            for i, shape in enumerate(convolutions, 1):
                shapes[f"{name}.conv{i}.weight"] = shape
                shapes[f"{name}.bn{i}.weight"] = shapes[f"{name}.bn{i}.bias"] = shape[:1]
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (out, before, 1, 1)
                shapes[f"{name}.downsample.1.weight"] = (out,)
                shapes[f"{name}.downsample.1.bias"] = (out,)
            before = out
    shapes |= {"fc.weight": (1000, 2048), "fc.bias": (1000,)}
    return {n: torch.randn(s, generator=generator) * 0.05 for n, s in shapes.items()}


@pytest.mark.benchmark(group="weight matching, ResNet-50 shapes, planted permutation and noise")
def test_match_resnet50(benchmark):
    a = resnet50_state(0)
    spec = resnet_spec(a)
    noise = resnet50_state(1)
    plant = {name: torch.randperm(size) for name, size in spec.sizes.items()}
    b = apply_permutation({n: v + 0.5 * noise[n] for n, v in a.items()}, plant, spec)
    found = benchmark.pedantic(weight_match, (a, b, spec), rounds=1)
    print(f"\n{len(found.objective) - 1} sweeps, {len(spec.sizes)} permutations")
