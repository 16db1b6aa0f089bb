"""The short reference training loop: Adam, shuffled batches, an objective that sees progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from pyrobust._checks import check_at_least, check_integer, check_positive
from pyrobust.certify.shards import Shard, this_shard
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
    max_norm: float | None = None,
    after_step: Callable[[], None] | None = None,
    generator: torch.Generator | None = None,
    distributed: bool = False,
    progress: bool = False,
    description: str = "train",
) -> nn.Module:
    """Train ``model`` in place and leave it in evaluation mode.

    Under ``torchrun``, ``distributed=True`` splits every batch between the processes and averages
    the gradients by ``DistributedDataParallel``: for an objective that is a mean over the batch
    the steps are those of one process, up to rounding. Batch norm sees each process's part alone.

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
        max_norm: gradients are scaled down to this Euclidean norm of all together, ``> 0``; None
            for no limit.
        after_step: called after every step.
        generator: order of the batches; of several processes the first one's counts.
        distributed: train with all processes of the group (gloo, or one that exists already, such
            as nccl with the model on this process's GPU); all call this with equal arguments. The
            first one's weights are the start.
        progress: show a progress bar.
        description: words beside the bar.

    Returns:
        ``model``.

    Raises:
        ValueError: an argument is out of range.
        FloatingPointError: the loss is no longer finite; on a GPU it is read every 100 steps.
    """
    check_integer("fit", "epochs", epochs, 1)
    check_integer("fit", "batch_size", batch_size, 1)
    check_positive("fit", "learning_rate", learning_rate)
    if max_norm is not None:
        check_positive("fit", "max_norm", max_norm)
    if optimizer is None:
        fused = all(p.is_cuda for p in model.parameters()) or None  # None: torch's choice
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=fused)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    rates = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
    per_epoch = -(-len(images) // batch_size)
    total = epochs * per_epoch
    shard = this_shard() if distributed else Shard()
    loss_of: nn.Module = _Loss(model, objective)
    if shard.grouped:
        loss_of = DistributedDataParallel(loss_of)
    model.train()
    watch = _LossWatch()
    hidden = not progress or shard.rank > 0
    with tqdm(total=total, desc=description, disable=hidden, unit="step") as bar:
        for epoch in range(epochs):
            order = shard.first(torch.randperm(len(images), generator=generator)).to(images.device)
            for i, batch in enumerate(order.split(batch_size)):
                done = (epoch * per_epoch + i) / total
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * schedule(done)
                mine, weight = _share(batch, shard)
                loss = loss_of(images[mine], labels[mine], done)
                watch.see(loss.detach())
                optimizer.zero_grad()
                (loss if weight == 1 else weight * loss).backward()
                if max_norm is not None:
                    nn.utils.clip_grad_norm_(trained, max_norm)
                optimizer.step()
                if after_step is not None:
                    after_step()
                bar.update()
            watch.look()
    return model.eval()


class _LossWatch:
    """Stops training whose loss is no longer finite.

    On the CPU at once. Reading a number of another device makes it wait, so its losses are read
    some at a time.
    """

    _AT_A_TIME = 100

    def __init__(self) -> None:
        self._unread: list[Tensor] = []
        self._read = 0

    def see(self, loss: Tensor) -> None:
        """Take the loss of the next step."""
        self._unread.append(loss)
        if loss.device.type == "cpu" or len(self._unread) == self._AT_A_TIME:
            self.look()

    def look(self) -> None:
        """Read what was not read yet.

        Raises:
            FloatingPointError: a loss is infinite or NaN.
        """
        for loss in torch.stack(self._unread).tolist() if self._unread else []:
            if not math.isfinite(loss):
                raise FloatingPointError(f"fit: the loss became {loss} at step {self._read}.")
            self._read += 1
        self._unread.clear()


class _Loss(nn.Module):
    """The objective as a forward pass: what ``DistributedDataParallel`` can wrap whole.

    So an objective may run the model several times, trace it, or reach into its layers.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        # behind a function: a module among the objectives has parameters that are not trained here
        self.objective = lambda *arguments: objective(*arguments)

    def forward(self, x: Tensor, labels: Tensor, done: float) -> Tensor:
        loss: Tensor = self.objective(self.model, x, labels, done)  # type: ignore[no-untyped-call]
        return loss


def _share(batch: Tensor, shard: Shard) -> tuple[Tensor, float]:
    """This process's part of a batch, and the weight that makes the average the batch's mean."""
    part = batch.tensor_split(shard.world)[shard.rank]
    if len(part) == 0:  # fewer images than processes: all must take the step
        return batch[:1], 0.0
    return part, len(part) * shard.world / len(batch)
