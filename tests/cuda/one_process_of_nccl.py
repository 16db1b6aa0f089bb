"""Run under ``torchrun --nproc-per-node N``: a group of nccl gives the results of one process."""

import os

import torch
from torch import distributed, nn

from pyrobust.certify import verified
from pyrobust.train import IBPLoss, SmoothEpsSchedule, fit


def network(device):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 3)).to(device)


def trained(device, distributed):
    torch.manual_seed(1)
    images = torch.rand(70, 1, 8, 8, device=device)
    labels = (images.mean((1, 2, 3)) * 97).long() % 3
    model = network(device)
    options = {"epochs": 3, "batch_size": 16, "max_norm": 1.0, "distributed": distributed}
    objective = IBPLoss(SmoothEpsSchedule(0.0, 0.5, eps=0.02), None)
    generator = torch.Generator().manual_seed(2)
    fit(model, images, labels, objective=objective, generator=generator, **options)
    return model, images, labels


def main():
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    alone, images, labels = trained(device, False)
    one = verified(alone, images, labels, 0.01, batch_size=8)
    distributed.init_process_group("nccl" if gpu else "gloo")
    together, *_ = trained(device, True)
    pairs = list(zip(alone.parameters(), together.parameters(), strict=True))
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    start = network(device).parameters()
    assert any((a - s).abs().max() > 1e-3 for a, s in zip(alone.parameters(), start, strict=True))
    shared = verified(alone, images, labels, 0.01, batch_size=8, distributed=True)
    assert torch.equal(one.prediction, shared.prediction)
    assert torch.equal(one.radius, shared.radius)
    print(
        f"{distributed.get_backend()}: {distributed.get_world_size()} processes equal one;", end=" "
    )
    print(f"{int((one.prediction >= 0).sum())} of {len(labels)} certified", flush=True)
    del together
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
