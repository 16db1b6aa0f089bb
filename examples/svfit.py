"""Adapt a digits network to rotated digits by its singular values, LoRA, or its biases."""

from __future__ import annotations

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from pyrobust.train import LoRA, SVFit, adapter_param_groups, apply_adapter

HIDDEN = ("2", "4")


def digits(degrees: float) -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    angle = torch.deg2rad(torch.tensor(degrees))
    theta = torch.tensor([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0]])
    grid = F.affine_grid(theta.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False).flatten(1), torch.tensor(data.target)


def train(model, groups, x, y, epochs):
    optimizer = torch.optim.AdamW(groups)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model


def main() -> None:
    torch.manual_seed(0)
    upright, y = digits(0.0)
    turned, _ = digits(35.0)
    order = torch.randperm(len(y))
    fine, pretrain, test = order[:359], order[:1437], order[1437:]
    base = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
        nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip
    train(base, [{"params": base.parameters(), "lr": 1e-3}], upright[pretrain], y[pretrain], 30)
    methods = {
        "SVFit, full length": (SVFit(HIDDEN, rank=256), 3e-2),
        "SVFit, rank 64": (SVFit(HIDDEN, rank=64), 3e-2),
        "LoRA, rank 1": (LoRA(HIDDEN, r=1, alpha=1.0), 1e-2),
    }
    print(f"{'method':<20} {'trained':>8} {'accuracy':>8}")
    rows = [("before", 0, base)]
    for name, (config, lr) in methods.items():
        model = apply_adapter(copy.deepcopy(base), config)
        groups = adapter_param_groups(model, lr=lr)
        count = sum(p.numel() for p in groups[0]["params"])
        rows.append((name, count, train(model, groups, turned[fine], y[fine], 60)))
    for name, count, model in rows:
        accuracy = (model(turned[test]).argmax(1) == y[test]).double().mean()
        print(f"{name:<20} {count:8d} {accuracy:8.3f}")


if __name__ == "__main__":
    main()
