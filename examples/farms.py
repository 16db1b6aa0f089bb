"""Tail exponents of fresh and trained layers, whole and by windows of one aspect ratio.

python examples/farms.py
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from pyrobust.data import load_digits
from pyrobust.train import GaussianCrossEntropy, fit
from pyrobust.weights import spectral_report


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    layers = [nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 64)]
    fresh = nn.Sequential(*layers, nn.ReLU(), nn.Linear(64, 10))
    images = digits.train_images.flatten(1)
    trained = copy.deepcopy(fresh)
    fit(trained, images, digits.train_labels, objective=GaussianCrossEntropy(), epochs=15)
    print(f"{'weight':10} {'shape':>10} {'fresh':>8} {'fresh':>8} {'trained':>8} {'trained':>8}")
    print(f"{'':10} {'':>10} {'whole':>8} {'windows':>8} {'whole':>8} {'windows':>8}")
    columns = [
        spectral_report(model, estimator, rows=48)
        for model in (fresh, trained)
        for estimator in ("full", "farms")
    ]
    for rows in zip(*columns, strict=True):
        shape = "x".join(str(size) for size in fresh.state_dict()[rows[0].name].shape)
        print(f"{rows[0].name:10} {shape:>10} " + " ".join(f"{row.alpha:8.2f}" for row in rows))


if __name__ == "__main__":
    main()
