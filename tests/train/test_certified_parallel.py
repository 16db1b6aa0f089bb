"""Certified training by two processes ends with the weights of one."""

import os

import torch
from torch import nn

from pyrobust.train import (
    FastRegularizer,
    IBPLoss,
    IntervalTraining,
    SmoothEpsSchedule,
    crown_ibp_loss,
    fit,
    interval_loss,
    mtl_ibp_loss,
    sabr_loss,
    taps_loss,
)

from ..two_processes import run_two_processes

RAMP = SmoothEpsSchedule(0.0, 0.5, eps=0.1)
# means over the batch: a batch in two parts is the batch
MEANS = {
    "interval": lambda m, x, y, done: interval_loss(m, x, y, eps=0.1),
    "gowal": IntervalTraining(0.1, begin=0.0, end=0.5),
    "ibp": IBPLoss(RAMP, None, kappa=0.3),
    "crown-ibp": lambda m, x, y, done: crown_ibp_loss(m, x, y, eps=0.1, share=0.5),
    "fused": lambda m, x, y, done: crown_ibp_loss(m, x, y, eps=0.1, fused=True),
}
# attacks that start at random within a part, a product of means, ratios over the part
OTHERS = {
    "sabr": lambda m, x, y, done: sabr_loss(m, x, y, eps=0.1, steps=2),
    "mtl-ibp": lambda m, x, y, done: mtl_ibp_loss(m, x, y, eps=0.1, steps=2),
    "taps": lambda m, x, y, done: taps_loss(m[:3], m[3:], x, y, eps=0.1, steps=2),
    "regularised": IBPLoss(RAMP, FastRegularizer()),
}
EPOCHS, BATCH, RATE = 2, 8, 0.3


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def data():
    """17 images: two batches of eight, and one image that one process has to itself."""
    torch.manual_seed(1)
    return torch.rand(17, 1, 4, 4), torch.arange(17) % 3


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def fitted(objective, seed=5, **more):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    options = {"epochs": EPOCHS, "batch_size": BATCH, "optimizer": optimizer}
    fit(model, *data(), objective=objective, generator=generator, **options, **more)
    return weights(model)


def averaged(objective):
    """One process that averages the gradients of the parts, image by image."""
    model, (images, labels) = network(), data()
    generator = torch.Generator().manual_seed(5)
    done, per_epoch = 0, -(-len(images) // BATCH)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            model.zero_grad()
            share = done / (EPOCHS * per_epoch)
            for part in batch.tensor_split(2):
                if len(part):
                    loss = objective(model, images[part], labels[part], share)
                    (loss * len(part) / len(batch)).backward()
            done += 1
            rate = RATE * (0.2 if share >= 0.7 else 1) * (0.2 if share >= 0.9 else 1)
            with torch.no_grad():
                for p in model.parameters():
                    p -= rate * p.grad
    return weights(model)


def one_of_two(rank):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    # the second one's order and start differ, and do not count
    return {
        name: fitted(objective, seed=5 + rank, distributed=True)
        for name, objective in {**MEANS, **OTHERS}.items()
    }


def test_two_processes_end_with_the_weights_of_one(tmp_path):
    first, second = run_two_processes(one_of_two, tmp_path)
    start = weights(network())
    for name, objective in {**MEANS, **OTHERS}.items():
        assert torch.equal(first[name], second[name]), name
        expected = fitted(objective) if name in MEANS else averaged(objective)
        torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=1e-6, msg=name)
        assert (first[name] - start).abs().max() > 1e-2, name


def test_alone_the_option_changes_nothing():
    objective = MEANS["interval"]
    assert torch.equal(fitted(objective, distributed=True), fitted(objective))
