"""Linear relaxation against auto_LiRPA: time and peak memory, in one run.

    python -m pytest bench/test_bounds.py -s

needs auto_LiRPA importable (it is not a dependency) and prints a table: seconds of CPU of the
fastest of interleaved rounds, the peak of what torch's allocator handed out during a call, and the
largest difference of the lower ends. Ours is timed in float32 without outward rounding, as the peer
works, and in sound mode (float64). Batch 32, the margins of all classes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench.bound_peers import auto_lirpa
from pyrobust import Interval
from pyrobust.certify import bound, margin_specification
from pyrobust.train import crown_ibp_loss

BATCH = 32
ROUNDS = 2


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [784, 1024, 1024, 1024, 10]
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def cnn7(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    double = 2 * width
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(width, double, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(double, double, 3, padding=1), nn.ReLU(),
        nn.Conv2d(double, double, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(double * 196, 512), nn.ReLU(), nn.Linear(512, 10),
    ).eval()  # fmt: skip


# name, model, radius, method; the narrow CNN7 keeps CROWN within memory and minutes on a CPU
CASES = {
    "MLP, CROWN": (mlp, 0.001, "crown"),
    "CNN7 width 2, CROWN": (lambda: cnn7(2), 0.002, "crown"),
    "CNN7 width 2, wide box, CROWN": (lambda: cnn7(2), 0.03, "crown"),
    "CNN7 width 4, wide box, CROWN": (lambda: cnn7(4), 0.03, "crown"),
    "MLP, CROWN-IBP": (mlp, 0.001, "crown-ibp"),
    "CNN7 width 16, CROWN-IBP": (lambda: cnn7(16), 0.002, "crown-ibp"),
}
TRAINING = {
    "MLP, CROWN-IBP step": (mlp, 0.001),
    "CNN7 width 16, CROWN-IBP step": (lambda: cnn7(16), 0.002),
}


def peak(call: Callable[[], object]) -> float:
    """MiB that torch's allocator held at most beyond the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held, most = 0, 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


def table(name: str, calls: dict[str, Callable[[], object]], difference: float) -> None:
    seconds = {key: float("inf") for key in calls}
    for _ in range(ROUNDS):
        for key, call in calls.items():
            start = time.process_time()
            call()
            seconds[key] = min(seconds[key], time.process_time() - start)
    memory = {key: peak(call) for key, call in calls.items()}
    last = list(calls)[-1]
    for key in calls:
        ratios = seconds[key] / seconds[last], memory[key] / memory[last]
        print(
            f"\n{name:30} {key:20} {seconds[key]:8.3f} s {ratios[0]:5.2f}x {memory[key]:8.1f} MiB "
            f"{ratios[1]:5.2f}x  differs by {difference:.1e}",
            end="",
        )


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(BATCH, 1, 28, 28, generator=generator), torch.arange(BATCH) % 10


@pytest.mark.parametrize("name", CASES)
def test_bounds(name):
    make, eps, method = CASES[name]
    model, (x, labels) = make(), images()
    spec = margin_specification(labels, 10)
    peer = auto_lirpa(model, x, eps, spec, method.upper())
    if peer is None:
        pytest.skip("auto_LiRPA is not importable")

    def ours(rounding: str) -> Interval:
        box = Interval((x - eps).clamp(0, 1), (x + eps).clamp(0, 1), rounding=rounding)
        return bound(model, box, spec, method)

    with torch.no_grad():
        difference = float((ours("nearest").lower - peer()[0]).abs().max())
        calls = {
            "pyrobust, nearest": lambda: ours("nearest"),
            "pyrobust, real": lambda: ours("real"),
            "auto_LiRPA": peer,
        }
        table(name, calls, difference)
    # ours is cut by intervals as well: at random weights nothing is gained by it
    assert difference < 1e-3


@pytest.mark.parametrize("name", TRAINING)
def test_training_step(name):
    make, eps = TRAINING[name]
    model, (x, labels) = make(), images()
    peer = auto_lirpa(model, x, eps, margin_specification(labels, 10), "CROWN-IBP", lower_only=True)
    if peer is None:
        pytest.skip("auto_LiRPA is not importable")

    def ours() -> Tensor:
        loss = crown_ibp_loss(model, x, labels, eps=eps)
        model.zero_grad()
        loss.backward()
        return loss.detach()

    def theirs() -> Tensor:
        lower = peer()[0]
        against = torch.cat([torch.zeros(len(lower), 1), -lower], 1)
        loss = against.logsumexp(1).mean()
        peer.module.zero_grad()
        loss.backward()
        return loss.detach()

    difference = abs(float(ours()) - float(theirs()))
    table(name, {"pyrobust": ours, "auto_LiRPA": theirs}, difference)
    assert difference < 1e-3
