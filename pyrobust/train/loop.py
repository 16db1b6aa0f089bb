"""The short reference training loop: Adam, shuffled batches, an objective that sees progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from pyrobust._checks import check_at_least, check_integer, check_positive
from pyrobust.train.schedules import step_decay

__all__ = ["GaussianCrossEntropy", "Objective", "fit"]

Objective = Callable[[nn.Module, Tensor, Tensor, float], Tensor]
"""``objective(model, x, labels, done)`` is a scalar loss; ``done`` in [0, 1) is the progress."""


@dataclass(frozen=True)
class GaussianCrossEntropy:
    """Cross-entropy on inputs with Gaussian noise added; ``sigma = 0`` is plain training.

    Source: Cohen et al., "Certified adversarial robustness via randomized smoothing", ICML 2019,
    arXiv 1902.02918, section 3.3.

    Args:
        sigma: standard deviation of the noise, ``>= 0``, in the units of the input.
        generator: source of the noise; None uses torch's default generator.
    """

    sigma: float = 0.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_at_least(type(self).__name__, "sigma", self.sigma, 0.0)

    def __call__(self, model: nn.Module, x: Tensor, labels: Tensor, done: float = 0.0) -> Tensor:
        """Mean loss over the batch; ``done`` is not used."""
        if self.sigma > 0:
            noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
            x = x + self.sigma * noise.to(x.device)
        return F.cross_entropy(model(x), labels)


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    objective: Objective,
    epochs: int,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: Callable[[float], float] = step_decay,
    after_step: Callable[[], None] | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    description: str = "train",
) -> nn.Module:
    """Train ``model`` in place and leave it in evaluation mode.

    Args:
        model: the classifier.
        images: ``(N, ...)`` float inputs.
        labels: ``(N,)`` int64 classes.
        objective: see :data:`Objective`.
        epochs: passes over the data, ``>= 1``.
        batch_size: images per step, ``>= 1``.
        learning_rate: of Adam, ``> 0``.
        optimizer: in place of Adam; each of its groups is scheduled from the rate it was made with.
        schedule: what the rates are multiplied by, for the share of training that is done; by
            default 0.2 after 70% and again after 90%.
        after_step: called after every step.
        generator: order of the batches.
        progress: show a progress bar.
        description: words beside the bar.

    Returns:
        ``model``.

    Raises:
        ValueError: an argument is out of range.
        FloatingPointError: the loss is no longer finite.
    """
    check_integer("fit", "epochs", epochs, 1)
    check_integer("fit", "batch_size", batch_size, 1)
    check_positive("fit", "learning_rate", learning_rate)
    if optimizer is None:
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    rates = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
    per_epoch = -(-len(images) // batch_size)
    total = epochs * per_epoch
    model.train()
    with tqdm(total=total, desc=description, disable=not progress, unit="step") as bar:
        for epoch in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for i, batch in enumerate(order.split(batch_size)):
                done = (epoch * per_epoch + i) / total
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * schedule(done)
                loss = objective(model, images[batch], labels[batch], done)
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"fit: the loss became {loss.item()} at step {bar.n}.")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if after_step is not None:
                    after_step()
                bar.update()
    return model.eval()
