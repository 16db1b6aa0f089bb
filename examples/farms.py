"""Tail exponents of fresh and trained layers, whole and by windows of one aspect ratio.

    python examples/farms.py

prints them, the learning rates that TempBalance would give, and the accuracy after pruning by each
kind of exponent.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from pyrobust.data import load_digits
from pyrobust.train import GaussianCrossEntropy, TempBalance, fit
from pyrobust.weights import LayerSpectrum, layer_sparsity, prune_, spectral_report


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

    rates = ", ".join(f"{name} {rate:.2f}" for name, rate in TempBalance(trained).ratios().items())
    print(f"\nrates relative to the global one: {rates}\n")
    print(f"{'pruned':>8} {'uniform':>8} {'whole':>8} {'windows':>8}")
    for target in (0.5, 0.7, 0.8):
        row = []
        for report in (None, columns[2], columns[3]):
            model = copy.deepcopy(trained)
            prune_(model, ratios(trained, report, target))
            seen = model(digits.test_images.flatten(1)).argmax(1) == digits.test_labels
            row.append(float(seen.float().mean()))
        print(f"{target:8.2f} " + " ".join(f"{accuracy:8.3f}" for accuracy in row))


def ratios(model: nn.Module, report: list[LayerSpectrum] | None, target: float) -> dict[str, float]:
    """Shares to prune: one for all layers, or by the exponents of a report."""
    sizes = {name: value.numel() for name, value in model.state_dict().items() if value.ndim == 2}
    if report is None:
        return dict.fromkeys(sizes, target)
    alphas = torch.tensor([row.alpha for row in report])
    shares = layer_sparsity(alphas, torch.tensor(list(sizes.values())), target, epsilon=0.1)
    return dict(zip(sizes, shares.tolist(), strict=True))


if __name__ == "__main__":
    main()
