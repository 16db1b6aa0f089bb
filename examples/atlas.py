"""Compose four skills of one network: one coefficient for all, or one for each block of each.

    python examples/atlas.py [coefficients.png]

prints accuracies on changed digits and, with a file name, draws the learned coefficients.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyrobust.data import load_digits
from pyrobust.train import GaussianCrossEntropy, fit
from pyrobust.weights import AnisotropicComposition, TaskVector, learn_task_addition

TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda x: x.transpose(2, 3),
    "flip": lambda x: x.flip(3),
    "invert": lambda x: 1 - x,
    "shift": lambda x: x.roll(2, 3),
}


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x, y = digits.train_images[:1000], digits.train_labels[:1000]
    held, held_labels = digits.train_images[1000:1200], digits.train_labels[1000:1200]
    plain = GaussianCrossEntropy()

    def tune(model: nn.Module, images: Tensor) -> nn.Module:
        model = copy.deepcopy(model).requires_grad_(True)
        return fit(model, images, y, objective=plain, epochs=15, learning_rate=1e-3)

    layers = [nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    base = tune(nn.Sequential(*layers, nn.Linear(128, 10)), x).requires_grad_(False)
    tuned = [tune(base, change(x)) for change in TASKS.values()]
    vectors = [TaskVector.from_modules(base, model) for model in tuned]

    @torch.no_grad()
    def accuracies(models: list[nn.Module]) -> list[float]:
        pairs = zip(models, TASKS.values(), strict=True)
        seen = [model(change(digits.test_images)).argmax(1) for model, change in pairs]
        return [float((guess == digits.test_labels).float().mean()) for guess in seen]

    loaders = [
        list(zip(change(held).split(50), held_labels.split(50), strict=True))
        for change in TASKS.values()
    ]
    rows = {"base": accuracies([base] * 4), "own models": accuracies(tuned)}
    for granularity, parts in (("vector", None), ("block", None), ("partition", 20)):
        model = AnisotropicComposition(base, vectors, granularity=granularity, partitions=parts)
        heads = [nn.Identity()] * 4
        learn_task_addition(model, heads, loaders, epochs=50, lr=0.05, clip=None)
        count = model.coefficients.numel()
        rows[f"{count} coefficients"] = accuracies([model.merge()] * 4)
        if granularity == "block":
            table = model.coefficient_table()
    print(f"{'':20}" + "".join(f"{name:>10}" for name in [*TASKS, "mean"]))
    for name, values in rows.items():
        print(f"{name:20}" + "".join(f"{v:10.3f}" for v in [*values, sum(values) / 4]))
    if len(sys.argv) > 1:
        from matplotlib import pyplot

        axes = pyplot.subplots()[1]
        axes.imshow(torch.stack(list(table.values()), 1), cmap="coolwarm", vmin=-1, vmax=1)
        axes.set_xticks(range(len(table)), list(table), rotation=30)
        axes.set_yticks(range(4), list(TASKS))
        axes.figure.savefig(sys.argv[1])


if __name__ == "__main__":
    main()
