"""Interval propagation: ours and other libraries' against one plain forward or step, in one run.

    python -m pytest bench/test_interval.py -s
    BENCH_THREADS=1,2 BENCH_ROUNDS=20 python -m pytest bench/test_interval.py -s -k MLP

All passes of a table take turns, so that a busy moment of the machine meets all of them; the table
gives the fastest and the median round, and the ratio of the fastest to plain torch. Peers that are
not installed (auto_LiRPA, JAX) are left out.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pyrobust
from pyrobust import _native

from . import interval_peers as peers
from .depthwise_networks import NETWORKS as DEPTHWISE

THREADS = [int(n) for n in os.environ.get("BENCH_THREADS", "1,2").split(",")]
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "15"))
COMPILED = os.environ.get("BENCH_COMPILED", "1") == "1"


def forward_passes(model: Any, x: torch.Tensor) -> dict[str, Callable[[torch.Tensor], Any]]:
    packed = pyrobust.pack(model, bits=4, group_size=128)
    passes: dict[str, Any] = {
        "torch, plain forward": model,
        "pyrobust, nearest (unsound)": peers.ours(model, "nearest"),
        "pyrobust, real": peers.ours(model, "real"),
        "pyrobust, real, bfloat16 radii": peers.ours(model, "real", "bfloat16"),
        "pyrobust, deployed": peers.ours(model, "deployed"),
        "pyrobust, real, 4-bit weights": peers.ours(packed, "real"),
        "torch, centre and radius": peers.centre_radius(model),
    }
    if COMPILED:
        passes["torch.compile, plain forward"] = torch.compile(model)
        passes["torch.compile, centre and radius"] = torch.compile(peers.centre_radius(model))
    passes["auto_LiRPA, IBP"] = peers.auto_lirpa(model, x)
    passes |= peers.jax_passes(model)
    return {name: run for name, run in passes.items() if run is not None}


def training_steps(model: Any, x: torch.Tensor) -> dict[str, Callable[[torch.Tensor], Any]]:
    target = torch.arange(len(x)) % 10

    def step(ends: Any) -> Any:
        return None if ends is None else peers.worst_case_step(model, ends, target)

    steps: dict[str, Any] = {
        "torch, plain step": peers.plain_step(model, target),
        "pyrobust, nearest (unsound)": step(peers.ours(model, "nearest")),
        "pyrobust, real": step(peers.ours(model, "real")),
        "pyrobust, real, bfloat16 radii": step(peers.ours(model, "real", "bfloat16")),
        "the same, gradients too": step(peers.ours(model, "real", "bfloat16", "bfloat16")),
        "torch, centre and radius": step(peers.centre_radius(model)),
        "auto_LiRPA, IBP": step(peers.auto_lirpa(model, x)),
    }
    if COMPILED:
        steps["torch.compile, centre and radius"] = step(torch.compile(peers.centre_radius(model)))
    return {name: run for name, run in steps.items() if run is not None}


def show(title: str, passes: dict[str, Callable[[torch.Tensor], Any]], x: torch.Tensor) -> None:
    """Time all passes in turn and print one row each."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for run in passes.values():
        for _ in range(2):
            run(x)
    calls = {}
    for name, run in passes.items():  # short passes repeat within a round
        begin = time.perf_counter()
        run(x)
        calls[name] = max(1, min(20, int(0.005 / max(time.perf_counter() - begin, 1e-6))))
    for _ in range(ROUNDS):
        for name, run in passes.items():
            for _ in range(calls[name]):
                begin = time.perf_counter()
                run(x)
                seconds[name].append(time.perf_counter() - begin)
    base = min(seconds[next(iter(passes))])
    print(f"\n{title}, {torch.get_num_threads()} threads, {_native.isa()}: fastest, median, ratio")
    for name, times in seconds.items():
        least, middle = min(times) * 1e3, statistics.median(times) * 1e3
        print(f"{name:34} {least:9.3f} ms {middle:9.3f} ms {least / base / 1e3:6.2f}x")


@pytest.fixture
def network(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    make, shape = peers.NETWORKS[request.param]
    return request.param, make().eval(), shape


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", THREADS, indirect=True)
@pytest.mark.parametrize("batch", [1, 128])
@pytest.mark.parametrize("network", peers.NETWORKS, indirect=True)
def test_forward(network: Any, batch: int, threads: int) -> None:
    name, model, shape = network
    x = torch.rand(batch, *shape)
    with torch.no_grad():
        show(f"{name}, forward, batch {batch}", forward_passes(model, x), x)


def roundings_and_peer(model: Any, x: torch.Tensor) -> dict[str, Any]:
    passes: dict[str, Any] = {
        "torch, plain forward": model,
        "pyrobust, nearest (unsound)": peers.ours(model, "nearest"),
        "pyrobust, real": peers.ours(model, "real"),
        "pyrobust, deployed": peers.ours(model, "deployed"),
        "auto_LiRPA, IBP": peers.auto_lirpa(model, x),
    }
    return {name: run for name, run in passes.items() if run is not None}


@pytest.mark.parametrize("threads", THREADS, indirect=True)
@pytest.mark.parametrize("batch", [1, 32])
def test_residual(batch: int, threads: int) -> None:
    torch.manual_seed(0)
    model, x = peers.resnet(), torch.rand(batch, 3, 32, 32)
    with torch.no_grad():
        show(f"ResNet, forward, batch {batch}", roundings_and_peer(model, x), x)


@pytest.mark.parametrize("threads", THREADS, indirect=True)
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("network", DEPTHWISE)
def test_depthwise(network: str, batch: int, threads: int) -> None:
    torch.manual_seed(0)
    model, x = DEPTHWISE[network](), torch.rand(batch, 3, 96, 96)
    with torch.no_grad():
        show(f"{network}, forward, batch {batch}", roundings_and_peer(model, x), x)


@pytest.mark.parametrize("threads", THREADS, indirect=True)
@pytest.mark.parametrize("network", peers.NETWORKS, indirect=True)
def test_training_step(network: Any, threads: int) -> None:
    name, model, shape = network
    x = torch.rand(128, *shape)
    show(f"{name}, training step, batch 128", training_steps(model, x), x)
