"""Extract the signature of low contrast from digits 0-4, patch a model of digits 5-9.

    python examples/robust_weight_signatures.py [strengths.png]

prints both accuracies over the strength of the patch and, with a file name, draws them.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from pyrobust.data import load_digits
from pyrobust.train import GaussianCrossEntropy, fit
from pyrobust.weights import PackedDelta, Patcher, quantize_delta, robust_weight_signature


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def dimmed(images: Tensor) -> Tensor:
    return 0.15 * images


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x, y = digits.train_images, digits.train_labels

    def tune(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
        plain, rate = GaussianCrossEntropy(), 1e-3
        model = copy.deepcopy(model)
        return fit(model, images, labels, objective=plain, epochs=epochs, learning_rate=rate)

    chosen = torch.randperm(len(y))[:150]
    base = tune(network(), x[chosen], y[chosen], 20)
    low, high = y < 5, y >= 5
    clean = tune(base, x[low], y[low], 15)
    robust = tune(base, dimmed(x[low]), y[low], 30)
    other = tune(base, x[high], y[high], 15)
    signature = robust_weight_signature(robust, clean, base, layers=2)

    test = digits.test_labels >= 5
    images, labels = digits.test_images[test], digits.test_labels[test]

    @torch.no_grad()
    def accuracies() -> tuple[float, float]:
        seen = [other(v).argmax(1) == labels for v in (images, dimmed(images))]
        return float(seen[0].float().mean()), float(seen[1].float().mean())

    with TemporaryDirectory() as folder:
        path = Path(folder) / "contrast.safetensors"
        packed = quantize_delta(signature, 8)
        packed.save(path)
        stored, size = PackedDelta.load(path), path.stat().st_size
    whole = sum(value.numel() * 4 for value in robust.state_dict().values())
    print(f"file of {size} bytes, the robust model has {whole}\n")
    print(f"{'strength':>8} {'clean':>8} {'dimmed':>8}")
    strengths = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    rows = []
    for strength in strengths:
        with Patcher(other) as patcher:
            patcher.apply(stored, strength)
            rows.append(accuracies())
        print(f"{strength:8.2f} {rows[-1][0]:8.3f} {rows[-1][1]:8.3f}")
    if len(sys.argv) > 1:
        from matplotlib import pyplot

        axes = pyplot.subplots()[1]
        axes.plot(strengths, rows, label=["clean", "dimmed"])
        axes.set(xlabel="strength of the patch", ylabel="accuracy, classes 5-9")
        axes.legend()
        axes.figure.savefig(sys.argv[1])


if __name__ == "__main__":
    main()
