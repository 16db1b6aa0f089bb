"""Training for smoothing under DistributedDataParallel: two processes end as one would."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pyrobust.train import (
    ConsistencyTraining,
    GaussianAugmentation,
    MacerTraining,
    SmoothAdvTraining,
    StabilityTraining,
)

from ..two_processes import run_two_processes

OBJECTIVES = {
    "gaussian": lambda g: GaussianAugmentation(0.25, copies=2, generator=g),
    "stability": lambda g: StabilityTraining(0.25, copies=2, generator=g),
    "macer": lambda g: MacerTraining(0.25, copies=4, generator=g),
    "consistency": lambda g: ConsistencyTraining(0.25, generator=g),
    "smooth_adv": lambda g: SmoothAdvTraining(0.25, steps=2, consistency=2.0, generator=g),
}
STEPS = 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3))


def batches():
    """``STEPS`` batches of eight inputs; each process takes half of every one."""
    torch.manual_seed(1)
    return [(torch.rand(8, 1, 3, 3), torch.arange(8) % 3) for _ in range(STEPS)]


def half(batch, rank):
    x, labels = batch
    return x[4 * rank : 4 * rank + 4], labels[4 * rank : 4 * rank + 4]


def noise_of_rank(rank):
    return torch.Generator().manual_seed(50 + rank)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def one_process(make):
    """The same steps without processes: the mean of the gradients of both halves."""
    model = network()
    objectives = [make(noise_of_rank(rank)) for rank in (0, 1)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for batch in batches():
        optimizer.zero_grad()
        for rank, objective in enumerate(objectives):
            (objective(model, *half(batch, rank), 1.0) / 2).backward()
        optimizer.step()
    return weights(model)


def one_of_two(rank):
    ended = {}
    for name, make in OBJECTIVES.items():
        model = DistributedDataParallel(network())
        objective = make(noise_of_rank(rank))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for batch in batches():
            optimizer.zero_grad()
            objective(model, *half(batch, rank), 1.0).backward()
            optimizer.step()
        ended[name] = weights(model)
    return ended


def test_two_processes_end_with_the_weights_of_one(tmp_path):
    first, second = run_two_processes(one_of_two, tmp_path)
    start = weights(network())
    for name, make in OBJECTIVES.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], one_process(make), rtol=1e-5, atol=1e-6, msg=name)
        assert (first[name] - start).abs().max() > 1e-3, name
