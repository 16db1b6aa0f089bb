"""How loose interval bounds are before and after interval training.

    python examples/propagation_tightness.py [tightness.png]

trains one network plainly and one with interval bounds on 8 by 8 digits, prints a table and, with
a file name, draws the tightness by layer.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from pyrobust.certify import certified_margin, propagation_tightness, tightness_by_layer
from pyrobust.data import load_digits
from pyrobust.train import GaussianCrossEntropy, IBPLoss, SmoothEpsSchedule, fit, ibp_init_


def main() -> None:
    eps, digits = 0.1, load_digits()
    x, y = digits.test_images.flatten(1), digits.test_labels
    axes = None
    print(f"{'training':>10} {'accuracy':>9} {'certified':>10} {'tightness':>10}")
    for name in ("none", "plain", "interval"):
        torch.manual_seed(0)
        layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(128, 10)).eval()
        objective = GaussianCrossEntropy()
        if name == "interval":
            ibp_init_(model)
            objective = IBPLoss(SmoothEpsSchedule(0.0, 0.5, eps=eps))
        if name != "none":
            images = digits.train_images.flatten(1)
            fit(model, images, digits.train_labels, objective=objective, epochs=15)
        accuracy = float((model(x).argmax(1) == y).float().mean())
        proven = float((certified_margin(model, x, y, eps) > 0).all(1).float().mean())
        ratio = float(propagation_tightness(model, x, eps, y).mean())
        print(f"{name:>10} {accuracy:9.3f} {proven:10.3f} {ratio:10.4f}")
        if len(sys.argv) > 1:
            axes = tightness_by_layer(model, x[:16], eps).plot(axes, label=name)
    if axes is not None:
        axes.legend()
        axes.figure.savefig(sys.argv[1])


if __name__ == "__main__":
    main()
