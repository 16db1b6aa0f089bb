"""What attacks raise: losses per input, and the problem that an attack works on.

Shared by the attacks of this package: named objectives, the mean over a random model's draws, the
guard of evaluation mode and random state, and the worst point seen so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust._checks import check_choice, check_float_tensor, check_integer, check_shape

__all__ = ["AttackObjective", "AttackProblem", "attack_loss", "evaluation_mode"]

AttackObjective = Callable[[Any, Tensor], Tensor]
"""``objective(outputs, y)`` is ``(N,)``, to be raised; ``outputs`` is what the model returns."""


def attack_loss(
    logits: Tensor, y: Tensor, *, kind: str = "ce", targets: Tensor | None = None
) -> Tensor:
    """A loss per input that is higher the closer the classifier is to an error.

    Source of ``"dlr"``: Croce, Hein, "Reliable evaluation of adversarial robustness with an
    ensemble of diverse parameter-free attacks", ICML 2020, arXiv 2003.01690, equations 6 and 7.

    Args:
        logits: ``(N, K)`` float, unnormalised scores or log-probabilities.
        y: ``(N,)`` int64 true classes.
        kind: ``"ce"``, cross-entropy; ``"margin"``, the best other logit less that of ``y``;
            ``"dlr"``, the margin over the distance of the best to the third logit, which does not
            change when logits are scaled or shifted (``K >= 3``, with targets ``K >= 4``).
        targets: ``(N,)`` classes to reach instead; None for any error.

    Returns:
        ``(N,)``.

    Raises:
        ValueError: an unknown kind, logits of another shape, or too few classes.

    Example:
        >>> attack_loss(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0]), kind="margin")
        tensor([-2.])
    """
    check_choice("attack_loss", "kind", kind, ("ce", "dlr", "margin"))
    if logits.ndim != 2:
        raise ValueError(
            f"attack_loss: the model must return shape (N, K); got {tuple(logits.shape)}."
        )
    if kind == "ce":
        if targets is not None:
            return -F.cross_entropy(logits, targets, reduction="none")
        return F.cross_entropy(logits, y, reduction="none")
    own = logits.gather(1, y[:, None])[:, 0]
    if targets is not None:
        lead = logits.gather(1, targets[:, None])[:, 0] - own
    else:
        lead = logits.scatter(1, y[:, None], -torch.inf).amax(1) - own
    return lead if kind == "margin" else lead / _spread(logits, targets is not None)


def _spread(logits: Tensor, targeted: bool) -> Tensor:
    """Distance of the largest logit to the third, or to the mean of the third and fourth."""
    needed = 4 if targeted else 3
    if logits.shape[1] < needed:
        raise ValueError(
            f"attack_loss: kind 'dlr' needs at least {needed} classes; got {logits.shape[1]}."
        )
    top = logits.topk(needed, dim=1).values
    return top[:, 0] - (top[:, 2:].mean(1) if targeted else top[:, 2]) + 1e-12


@contextmanager
def evaluation_mode(*models: Any) -> Iterator[None]:
    """Every module in evaluation mode inside, each flag as it was after, even after an error."""
    modules = [m for model in models if isinstance(model, nn.Module) for m in model.modules()]
    flags = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag


class AttackProblem:
    """What an attack is about: a model, inputs, something to raise, and the worst point so far.

    Args:
        subject: who asks, for error messages.
        model: classifier, ``(N, ...)`` to ``(N, K)`` scores; it judges every point.
        x: ``(N, ...)`` float inputs.
        y: ``(N,)`` int64 true classes.
        objective: a name of :func:`attack_loss` or an :data:`AttackObjective`.
        targets: ``(N,)`` classes to reach, for the named objectives; None for any error.
        surrogate: what gives the gradients instead of ``model``; None for the model itself.
        samples: draws of a random model that each look averages over, ``>= 1``.

    Attributes:
        worst: ``(N, ...)`` of all points looked at: an error before none, then the highest value.
        fooled: ``(N,)`` bool, whether the mean answer at ``worst`` is an error (with ``targets``:
            the target).
        value: ``(N,)`` the objective there.
    """

    def __init__(
        self,
        subject: str,
        model: Callable[[Tensor], Any],
        x: Tensor,
        y: Tensor,
        *,
        objective: str | AttackObjective = "ce",
        targets: Tensor | None = None,
        surrogate: Callable[[Tensor], Any] | None = None,
        samples: int = 1,
    ) -> None:
        check_float_tensor(subject, "x", x)
        check_shape(subject, "y", y, (len(x),))
        check_integer(subject, "samples", samples, 1)
        if targets is not None:
            check_shape(subject, "targets", targets, (len(x),))
        if isinstance(objective, str):
            check_choice(subject, "objective", objective, ("ce", "dlr", "margin"))
            objective = partial(attack_loss, kind=objective, targets=targets)
        self.subject, self.model, self.surrogate = subject, model, surrogate
        self.x, self.y, self.targets = x.detach(), y, targets
        self.objective, self.samples = objective, samples
        self.worst = self.x.clone()
        self.fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.value = torch.full((len(x),), -torch.inf, device=x.device)

    @contextmanager
    def guarded(self, seed: int) -> Iterator[torch.Generator]:
        """Evaluation mode and a random state of our own; yields a generator for the attack."""
        devices = [self.x.device] if self.x.device.type == "cuda" else []
        with evaluation_mode(self.model, self.surrogate), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield torch.Generator().manual_seed(seed)

    def judge(self, points: Tensor) -> Tensor:
        """The ``(N,)`` objective of the model at ``points``, which are remembered if worst."""
        value, _, answer = self._mean(self.model, points, with_gradient=False)
        self._remember(points, value, answer)
        return value

    def climb(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The ``(N,)`` objective and the gradient to follow from ``points``."""
        if self.surrogate is not None:
            value = self.judge(points)
            return value, self._mean(self.surrogate, points)[1]
        value, gradient, answer = self._mean(self.model, points)
        self._remember(points, value, answer)
        return value, gradient

    def _mean(
        self, model: Callable[[Tensor], Any], points: Tensor, *, with_gradient: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Objective, its gradient and the mean softmax, each averaged over the draws."""
        value = torch.zeros(len(points), device=points.device)
        gradient = torch.zeros_like(points)
        answer: Tensor | None = None
        for _ in range(self.samples):
            with torch.set_grad_enabled(with_gradient):
                leaf = points.detach().clone().requires_grad_(with_gradient)
                outputs = model(leaf)
                losses = self.objective(outputs, self.y)
                check_shape(self.subject, "objective(outputs, y)", losses, (len(points),))
                if with_gradient:
                    (slope,) = torch.autograd.grad(losses.sum(), leaf)
                    gradient += slope / self.samples
            value += losses.detach().to(value) / self.samples
            if isinstance(outputs, Tensor) and outputs.ndim == 2:
                share = outputs.detach().softmax(1) / self.samples
                answer = share if answer is None else answer + share
        if bool(value.isnan().any()):
            raise ValueError(
                f"{self.subject}: the objective must not be NaN; it is for some input."
            )
        return value, gradient, answer

    def _remember(self, points: Tensor, value: Tensor, answer: Tensor | None) -> None:
        fooled = torch.zeros_like(self.fooled)
        if answer is not None:
            top = answer.argmax(1)
            fooled = top != self.y if self.targets is None else top == self.targets
        better = torch.where(fooled == self.fooled, value > self.value, fooled)
        self.worst[better] = points.detach()[better]
        self.fooled = torch.where(better, fooled, self.fooled)
        self.value = torch.where(better, value, self.value)
