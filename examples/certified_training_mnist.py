"""Interval-bound training on MNIST with the seven-layer CNN of the literature, cut in width.

Trains with the start, ramp and regulariser of fast interval training, then certifies test images
by intervals and prints one line: seconds of CPU, clean and certified accuracy. Run:
``python examples/certified_training_mnist.py FOLDER --eps 0.1`` with the folder of MNIST's idx
files; ``--width 64`` is the published network, which needs hours on a CPU.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import nn

from pyrobust.certify import verified
from pyrobust.data import load_idx
from pyrobust.train import FastRegularizer, IBPLoss, SmoothEpsSchedule, fit, ibp_init_


def cnn7(width: int) -> nn.Sequential:
    """Five convolutions and two linear layers (CNN7 of Shi et al.), without batch norm."""
    double = 2 * width
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(width, double, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(double, double, 3, padding=1), nn.ReLU(),
        nn.Conv2d(double, double, 3, padding=1), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(double * 14 * 14, 512), nn.ReLU(),
        nn.Linear(512, 10),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--eps", type=float, default=0.1, help="radius certified")
    parser.add_argument("--train-eps", type=float, help="radius trained; by default 1.2 eps")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--test", type=int, default=10000, help="test images certified")
    options = parser.parse_args()
    radius = options.train_eps or 1.2 * options.eps
    data = load_idx(options.folder)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = ibp_init_(cnn7(options.width), generator=generator)
    schedule = SmoothEpsSchedule(0.02, 0.6, eps=radius)
    start = time.process_time()
    fit(
        model,
        data.train_images,
        data.train_labels.long(),
        objective=IBPLoss(schedule, FastRegularizer()),
        epochs=options.epochs,
        batch_size=100,
        learning_rate=1e-3,
        generator=generator,
        progress=True,
    )
    seconds = time.process_time() - start
    images, labels = data.test_images[: options.test], data.test_labels[: options.test].long()
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in images.split(500)])
    proven = verified(model, images, labels, options.eps, batch_size=250).prediction >= 0
    print(
        f"eps {options.eps:g}: width {options.width}, {options.epochs} epochs in {seconds:.0f} CPU "
        f"seconds; clean {100 * (found == labels).double().mean():.2f}%, certified "
        f"{100 * proven.double().mean():.2f}% of {len(labels)} test images"
    )


if __name__ == "__main__":
    main()
