"""Criticality of each layer of a robust network; fine-tune one, go back to what keeps robustness.

    python examples/rift.py [line.png]

prints the criticality table and the line, and, with a file name, draws the line.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust.data import load_digits
from pyrobust.evaluate import pgd
from pyrobust.train import (
    adversarial_batches,
    fit,
    module_robust_criticality,
    pgd_runs,
    robust_critical_finetune,
)

EPS = 0.2


def adversarial_loss(model: nn.Module, x: Tensor, labels: Tensor, done: float) -> Tensor:
    """Cross-entropy under PGD; the radius grows over the first third of training."""
    radius = EPS * min(1.0, 3 * done)
    seed, step = int(1e6 * done), radius / 3
    points = pgd(model, x, labels, eps=radius, steps=5, step_size=step, keep="last", seed=seed)
    return F.cross_entropy(model(points), labels)


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x, y = digits.train_images, digits.train_labels
    layers = [nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    fit(model, x[:1000], y[:1000], objective=adversarial_loss, epochs=20)

    held = list(zip(x[1000:].split(219), y[1000:].split(219), strict=True))
    train = list(zip(x[:1000].split(64), y[:1000].split(64), strict=True))
    attacks = pgd_runs(EPS)
    table = module_robust_criticality(model, adversarial_batches(model, held, attacks[0]))
    print(f"{'module':>6} {'loss rise':>10} {'accuracy drop':>14}")
    for name, row in table.items():
        print(f"{name:>6} {row.loss_rise:10.4f} {row.accuracy_drop:14.4f}")
    result = robust_critical_finetune(
        model, train, val_clean=held, val_attack=attacks, criticality=table
    )
    print(f"\n{result.summary()}")
    if len(sys.argv) > 1:
        result.plot().figure.savefig(sys.argv[1])


if __name__ == "__main__":
    main()
