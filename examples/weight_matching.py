"""Average three networks trained from different seeds, before and after weight matching.

    python examples/weight_matching.py [barrier.png]

prints a table and, with a file name, draws the losses along the line between two networks.
"""

from __future__ import annotations

import copy
import sys

import torch
from torch import nn
from torch.nn import functional as F

from pyrobust.data import load_digits
from pyrobust.evaluate import loss_barrier, singular_alignment
from pyrobust.train import GaussianCrossEntropy, fit
from pyrobust.weights import apply_permutation, match_many, merge_models, trace_spec, weight_match


def main() -> None:
    digits = load_digits()
    x, y = digits.test_images.flatten(1), digits.test_labels
    networks = []
    for seed in range(3):
        torch.manual_seed(seed)
        layers = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(256, 10))
        train_x = digits.train_images.flatten(1)
        plain = GaussianCrossEntropy()
        networks.append(fit(model, train_x, digits.train_labels, objective=plain, epochs=15))

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return float(F.cross_entropy(model(x), y))

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        return float((model(x).argmax(1) == y).float().mean())

    spec = trace_spec(networks[0], x[:1])
    states = [network.state_dict() for network in networks]
    matched = copy.deepcopy(networks[1])
    found = weight_match(states[0], states[1], spec)
    matched.load_state_dict(apply_permutation(states[1], found, spec))
    curves = {"as trained": loss_barrier(networks[0], networks[1], loss)}
    curves["matched"] = loss_barrier(networks[0], matched, loss)
    common = match_many(states, spec)
    moved = [apply_permutation(s, p, spec) for s, p in zip(states, common, strict=True)]

    print(f"{'':12} {'barrier':>8} {'R(0.3)':>8} {'mean of 3, accuracy':>20}")
    for (name, curve), second, group in zip(
        curves.items(), (networks[1], matched), (states, moved), strict=True
    ):
        score = singular_alignment(states[0], second.state_dict())
        merged = accuracy(merge_models(copy.deepcopy(networks[0]), group))
        print(f"{name:12} {curve.barrier:8.3f} {score:8.3f} {merged:20.3f}")
    if len(sys.argv) > 1:
        axes = None
        for name, curve in curves.items():
            axes = curve.plot(axes, label=name)
        axes.legend()
        axes.figure.savefig(sys.argv[1])


if __name__ == "__main__":
    main()
