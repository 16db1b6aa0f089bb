"""Dual smoothing beside plain smoothing on digits, as they are and enlarged four times.

Dual smoothing pays only where neighbouring pixels repeat each other. Each network votes on the same
number of copies, so dual smoothing costs twice as much. Run: ``python examples/dual_smoothing.py``
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust.certify import Certificate, DualSmoothedClassifier, checkerboard_masks
from pyrobust.data import load_digits
from pyrobust.nn import SmoothedClassifier
from pyrobust.train import GaussianCrossEntropy, fit, train_subclassifier

SAMPLES = 2000
IMAGES = 100


def network(size: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 64), nn.ReLU(), nn.Linear(64, 10))


def noisy_network(images: Tensor, labels: Tensor, sigma: float, epochs: int) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    objective = GaussianCrossEntropy(sigma, generator)
    model = network(images[0].numel())
    return fit(model, images, labels, objective=objective, epochs=epochs, generator=generator)


def certify_both(scale: int, sigma: float, dual_sigma: float) -> list[Certificate]:
    digits = load_digits()
    images, test = (
        F.interpolate(part, scale_factor=scale, mode="bilinear")
        for part in (digits.train_images, digits.test_images[:IMAGES])
    )
    labels = digits.train_labels
    plain = SmoothedClassifier(noisy_network(images, labels, sigma, 12), sigma, 10)
    masks = checkerboard_masks(tuple(images.shape[1:]))
    halves = []
    for mask in masks:  # a network of whole noisy images, fine-tuned on each half
        model = noisy_network(images, labels, dual_sigma, 6)
        options = {"mask": mask, "sigma": dual_sigma, "fill": "bilinear", "epochs": 6}
        generator = torch.Generator().manual_seed(1)
        halves.append(train_subclassifier(model, images, labels, generator=generator, **options))
    dual = DualSmoothedClassifier(*halves, dual_sigma, 10, masks, fill="bilinear").eval()
    return [
        plain.certify(test, n=SAMPLES, batch_size=SAMPLES),
        dual.certify(test, n=SAMPLES, batch_size=SAMPLES),
    ]


def main() -> None:
    labels = load_digits().test_labels[:IMAGES]
    radii = [0.0, 0.25, 0.5, 0.75]
    print("certified accuracy at a radius, and the average certified radius (ACR)")
    print(f"{'images':>8} {'method':>6} {'sigma':>6}", *(f"{r:6.2f}" for r in radii), "   ACR")
    for scale, sigma, dual_sigma in [(1, 0.25, 0.25), (1, 0.25, 0.18), (4, 0.25, 0.18)]:
        pair = certify_both(scale, sigma, dual_sigma)
        for name, noise, result in zip(("plain", "dual"), (sigma, dual_sigma), pair, strict=True):
            shares = result.certified_accuracy(labels, radii).tolist()
            radius = (result.radius * (result.prediction == labels)).mean().item()
            size = f"{8 * scale}x{8 * scale}"
            row = " ".join(f"{share:6.3f}" for share in shares)
            print(f"{size:>8} {name:>6} {noise:6.2f} {row} {radius:6.3f}")


if __name__ == "__main__":
    main()
