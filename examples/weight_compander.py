"""Train digits with and without the weight compander and compare the weight distributions."""

from __future__ import annotations

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from pyrobust.nn import (
    apply_weight_compander,
    compander_param_groups,
    fold_weight_compander,
    weight_statistics,
)


def train(model, groups, x, y):
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    for _ in range(60):
        for batch in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(x))
    few, rest = order[:120], order[120:]
    plain = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    companded = apply_weight_compander(copy.deepcopy(plain))
    decay = {"lr": 0.05, "weight_decay": 5e-4}
    train(plain, [{"params": plain.parameters(), **decay}], x[few], y[few])
    train(companded, compander_param_groups(companded, **decay), x[few], y[few])
    print(f"{'model':<10} {'accuracy':>8} {'kurtosis':>8} {'max/std':>8}")
    for name, model in (("plain", plain), ("companded", fold_weight_compander(companded))):
        accuracy = (model(x[rest]).argmax(1) == y[rest]).double().mean()
        shape = weight_statistics(model)["2"]
        print(f"{name:<10} {accuracy:8.3f} {shape['kurtosis']:8.2f} {shape['peak']:8.2f}")


if __name__ == "__main__":
    main()
