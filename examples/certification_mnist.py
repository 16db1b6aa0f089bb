"""Certified accuracy against radius on MNIST: plain, dual and adaptive smoothing at equal cost.

Each method spends the same number of noisy copies per image; dual smoothing divides them between
its halves. Run: ``python examples/certification_mnist.py FOLDER [PLOT.svg]`` with the folder of
MNIST's idx files; about two minutes on one core.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from pyrobust.certify import (
    Certificate,
    DualSmoothedClassifier,
    SmoothedMixture,
    checkerboard_masks,
)
from pyrobust.data import load_idx
from pyrobust.nn import SmoothedClassifier
from pyrobust.train import GaussianCrossEntropy, fit, train_subclassifier

SIGMA = 0.5
COPIES = 1000
SELECTION = 100
WEIGHT = 0.9
IMAGES = 150
RADII = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(784, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def trained(images: Tensor, labels: Tensor, sigma: float, epochs: int) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    objective = GaussianCrossEntropy(sigma, generator)
    return fit(network(), images, labels, objective=objective, epochs=epochs, generator=generator)


def certificates(images: Tensor, labels: Tensor, test: Tensor) -> dict[str, Certificate]:
    """One certificate per method; every network trains for the same number of epochs."""
    base = trained(images, labels, SIGMA, 8)
    standard = trained(images, labels, 0.0, 8)
    dual_sigma = SIGMA / 2**0.5
    masks = checkerboard_masks(tuple(images.shape[1:]))
    halves = [
        train_subclassifier(
            trained(images, labels, dual_sigma, 4),
            images,
            labels,
            mask=mask,
            sigma=dual_sigma,
            fill="bilinear",
            epochs=4,
            generator=torch.Generator().manual_seed(1),
        )
        for mask in masks
    ]
    plain = SmoothedClassifier(base, SIGMA, 10)
    dual = DualSmoothedClassifier(*halves, dual_sigma, 10, masks, fill="bilinear")
    mixture = SmoothedMixture(standard, base, SIGMA, 10, WEIGHT)
    half = {"n0": SELECTION // 2, "n": COPIES // 2, "batch_size": COPIES // 2}
    whole = {"n0": SELECTION, "n": COPIES, "batch_size": COPIES}
    return {
        "plain": plain.eval().certify(test, **whole),
        "dual": dual.eval().certify(test, **half),
        "adaptive": mixture.eval().certify(test, **whole),
    }


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    mnist = load_idx(sys.argv[1])
    test, truth = mnist.test_images[:IMAGES], mnist.test_labels[:IMAGES]
    results = certificates(mnist.train_images[:4000], mnist.train_labels[:4000], test)
    print("certified accuracy at l2 radius, and the average certified radius (ACR)")
    print(f"{'method':>9} {'copies':>6}", *(f"{r:6.2f}" for r in RADII), "   ACR")
    axes = None
    for name, result in results.items():
        shares = " ".join(f"{s:6.3f}" for s in result.certified_accuracy(truth, RADII).tolist())
        mean = float((result.radius * (result.prediction == truth)).mean())
        print(f"{name:>9} {int(result.samples[0]):>6} {shares} {mean:6.3f}")
        if len(sys.argv) > 2:
            axes = result.plot(axes, labels=truth)
            axes.lines[-1].set_label(name)
    if axes is not None:
        axes.legend()
        axes.figure.savefig(sys.argv[2])


if __name__ == "__main__":
    main()
