"""MNIST LeNet under smoothing: certified accuracy against published figures, and an attack on it.

    python bench/mnist_smoothing.py --data FOLDER [--weights FILE] [--every 20]

trains the LeNet of published smoothing work (J. Jeong, J. Shin, arXiv 2006.04062) with Gaussian
augmentation at sigma 0.25 (weights are kept in FILE and reused), certifies every 20th test image at
the standard radii by one sequential table, and attacks the smoothed model inside each certified
radius (PGD in l2, 100 steps, 128 noise draws a step); an attacked image counts as flipped when its
own certification names another class.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from pyrobust.data import load_idx
from pyrobust.nn import SmoothedClassifier
from pyrobust.train import GaussianCrossEntropy

SIGMA, RADII = 0.25, (0.0, 0.25, 0.5, 0.75)
PUBLISHED = (99.2, 98.5, 96.7, 93.1)  # mean of five runs, 100,000 samples, all test images


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


def train(images, labels, *, epochs=14, batch=128):
    """SGD with one cycle of the learning rate, to 0.1 and down."""
    torch.manual_seed(0)
    network, objective = lenet(), GaussianCrossEntropy(SIGMA)
    settings = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, **settings)
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=epochs * steps, pct_start=0.15
    )
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for i in range(steps):
            chosen = order[i * batch : (i + 1) * batch]
            loss = objective(network, images[chosen], labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def attack(smoothed, x, label, radius, *, steps=100, draws=128, seed=1):
    """PGD in l2 on the smoothed probability of the label; fresh noise at every step."""
    delta = torch.zeros_like(x, requires_grad=True)
    for step in range(steps):
        loss = F.nll_loss(smoothed(x + delta, n=draws, seed=seed + step).log(), label)
        (gradient,) = torch.autograd.grad(loss, delta)
        with torch.no_grad():
            delta += gradient / gradient.norm().clamp_min(1e-12) * (2.5 * radius / steps)
            delta *= (radius / delta.norm().clamp_min(1e-12)).clamp_max(1.0)
            delta.copy_((x + delta).clamp(0, 1) - x)
    return (x + delta).detach()


def certify(network, data, every):
    """Sequential table of every ``every``-th test image: images, labels, certificate, model."""
    smoothed = SmoothedClassifier(network, SIGMA, 10).eval()
    images, labels = data.test_images[::every], data.test_labels[::every]
    certificate = smoothed.certify_at(images, RADII, budget=100_000, seed=0, batch_size=256)
    return images, labels, certificate, smoothed


def flipped(images, certificate, smoothed, count):
    """How many certified images are attacked, and how many change class inside their radius."""
    certified = (certificate.radius > 0).nonzero()[:, 0]
    # the shortest radii first: their inputs lie closest to another class
    chosen = certified[certificate.radius[certified].argsort(stable=True)][:count].tolist()
    changed = 0
    for i in chosen:
        x, label = images[i : i + 1], certificate.prediction[i : i + 1]
        near = attack(smoothed, x, label, float(certificate.radius[i]))
        verdict = smoothed.certify_at(near, 0.0, budget=20_000, seed=2)
        changed += int(verdict.prediction) not in (-1, int(label))
    return len(chosen), changed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", default="mnist-lenet.pt")
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--attacked", type=int, default=40, help="certified images to attack")
    options = parser.parse_args()
    data = load_idx(options.data)
    begun = time.process_time()
    if Path(options.weights).is_file():
        network = lenet().eval()
        network.load_state_dict(torch.load(options.weights, weights_only=True))
    else:
        network = train(data.train_images, data.train_labels)
        torch.save(network.state_dict(), options.weights)
        print(f"training: {(time.process_time() - begun) / 60:.1f} CPU minutes", flush=True)
    begun = time.process_time()
    images, labels, certificate, smoothed = certify(network, data, options.every)
    minutes = (time.process_time() - begun) / 60
    accuracy = (100 * certificate.certified_accuracy(labels, RADII)).tolist()
    print(f"{len(images)} images, {minutes:.1f} CPU minutes")
    for radius, ours, theirs in zip(RADII, accuracy, PUBLISHED, strict=True):
        print(f"radius {radius:4.2f}: certified accuracy {ours:5.1f}%, published {theirs:5.1f}%")
    samples = certificate.samples.double().mean().item()
    print(f"samples per image {samples:.0f}: 1/{100_000 / samples:.1f} of 100,000", flush=True)
    attacked, changed = flipped(images, certificate, smoothed, options.attacked)
    print(f"attacked {attacked} certified images inside their radius: {changed} flipped")


if __name__ == "__main__":
    main()
