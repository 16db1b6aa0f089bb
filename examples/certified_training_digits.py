"""Interval-bound training on scikit-learn's digits: a perceptron certified at radius 0.1.

Trains ``64-256-256-10`` with the start, ramp and regulariser of fast interval training, 0.6 of
the loss on clean images, and training images that are shifted by up to 0.2 pixels and turned by up
to 4 degrees. All but that share and the radius was chosen on parts of the training images.
Prints one line per seed and their mean: clean and certified accuracy on the 360 test images. Run:
``python examples/certified_training_digits.py --seeds 3`` (about a minute of one core per seed).
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust.certify import verified
from pyrobust.data import load_digits
from pyrobust.train import FastRegularizer, IBPLoss, SmoothEpsSchedule, fit, ibp_init_

EPS = 0.1


def moved(images: Tensor, shift: float, turn: float, generator: torch.Generator) -> Tensor:
    """Images ``(N, C, H, W)``, each shifted by up to ``shift`` pixels and turned by up to ``turn``.

    Angles are in radians; what comes in from outside is 0.
    """
    draws = 2 * torch.rand(3, len(images), generator=generator) - 1
    angle = turn * draws[0]
    across, down = (2 * shift * d / n for d, n in zip(draws[1:], images.shape[:1:-1], strict=True))
    rows = [torch.stack([angle.cos(), -angle.sin(), across], 1)]
    rows.append(torch.stack([angle.sin(), angle.cos(), down], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train_and_certify(seed: int, epochs: int = 300, progress: bool = False) -> tuple[float, float]:
    """Shares of the test images that are classified right, and certified at ``EPS``."""
    data = load_digits()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    model = ibp_init_(nn.Sequential(*layers, nn.Linear(256, 10)), generator=generator)
    ramp = SmoothEpsSchedule(0.02, 0.5, eps=EPS)
    loss = IBPLoss(ramp, FastRegularizer(), kappa=0.6)
    fit(
        model,
        data.train_images,
        data.train_labels,
        objective=lambda m, x, y, done: loss(m, moved(x, 0.2, 0.07, generator), y, done),
        epochs=epochs,
        batch_size=64,
        learning_rate=2e-3,
        generator=generator,
        progress=progress,
    )
    images, labels = data.test_images, data.test_labels
    with torch.no_grad():
        clean = (model(images).argmax(1) == labels).double().mean()
    proven = ~verified(model, images, labels, EPS).abstained
    return float(clean), float(proven.double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="networks trained, from seed 0")
    parser.add_argument("--epochs", type=int, default=300)
    options = parser.parse_args()
    results = []
    for seed in range(options.seeds):
        results.append(train_and_certify(seed, options.epochs, progress=True))
        print("seed {}: clean {:.2%}, certified at 0.1 {:.2%}".format(seed, *results[-1]))
    clean, certified = torch.tensor(results, dtype=torch.float64).mean(0).tolist()
    print(f"mean of {len(results)}: clean {clean:.2%}, certified at 0.1 {certified:.2%}")


if __name__ == "__main__":
    main()
