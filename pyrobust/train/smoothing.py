"""Training for randomized smoothing: objectives of :func:`pyrobust.train.fit`, one per method.

Each draws noisy copies with the sampler and calls a loss of
:mod:`pyrobust.train.smoothing_losses`. Gaussian augmentation alone is
:class:`pyrobust.train.GaussianCrossEntropy` (one copy, torch's noise) or
:class:`GaussianAugmentation` here (any number of copies). What certifies best depends on sigma;
published tables put SmoothAdv with consistency first.

Source: see :mod:`pyrobust.train.smoothing_losses`; H. Salman et al., "Provably robust deep learning
via adversarially trained smoothed classifiers", NeurIPS 2019, arXiv 1906.04584 (SmoothAdv, PGD).
Departures: noise comes from the counter-based sampler, keyed by a number drawn from the generator
at each step; an attacked input is shrunk into the ball and then cut to [0, 1], where published code
cuts first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyrobust._checks import check_at_least, check_integer, check_positive
from pyrobust.evaluate.pgd import pgd
from pyrobust.ops.sampling import gaussian_samples
from pyrobust.train.schedules import linear_ramp
from pyrobust.train.smoothing_losses import (
    consistency_penalty,
    gaussian_augmentation_loss,
    macer_loss,
    smoothed_cross_entropy,
    stability_loss,
)

__all__ = [
    "ConsistencyTraining",
    "GaussianAugmentation",
    "MacerTraining",
    "SmoothAdvTraining",
    "StabilityTraining",
    "noisy_copies",
    "smooth_adv",
]


def noisy_copies(
    x: Tensor, sigma: float, copies: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Copies of each input with fresh Gaussian noise, on its device; differentiable in ``x``.

    Args:
        x: ``(B, ...)`` float32, bfloat16 or float16.
        sigma: standard deviation, ``> 0``.
        copies: ``m >= 1``.
        generator: gives the key of the noise; None uses torch's default generator.

    Returns:
        ``(B, m, ...)``.
    """
    key = int(torch.randint(2**62, (), generator=generator).item())
    return gaussian_samples(x.cpu(), sigma, copies, seed=key).to(x.device)


class _Copies(nn.Module):
    """Logits of fixed noisy copies of the input: what an attack on the smoothed model sees."""

    def __init__(self, model: nn.Module, noise: Tensor) -> None:
        super().__init__()
        self.model = model
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        return _logits(self.model, x[:, None] + self.noise)


def smooth_adv(
    model: nn.Module, x: Tensor, labels: Tensor, noise: Tensor, *, eps: float, steps: int = 10
) -> Tensor:
    """The input in an l2 ball where the smoothed model of these copies errs most (SmoothAdv).

    PGD on ``-log mean_i softmax(model(x + noise_i))[label]`` from ``x``, steps of ``2 eps / steps``
    along the normalised gradient, kept in [0, 1]; the model is in evaluation mode meanwhile.

    Args:
        model: classifier, ``(N, ...)`` to ``(N, K)``.
        x: ``(B, ...)`` float inputs in [0, 1].
        labels: ``(B,)`` int64.
        noise: ``(B, m, ...)``, the same at each step.
        eps: radius, ``>= 0``.
        steps: gradient steps, ``>= 1``.

    Returns:
        ``(B, ...)`` detached.

    Raises:
        ValueError: an argument is out of range.
    """
    check_integer("smooth_adv", "steps", steps, 1)
    return pgd(
        _Copies(model, noise),
        x,
        labels,
        eps=eps,
        norm="l2",
        steps=steps,
        step_size=2 * eps / steps,
        random_start=False,
        objective=lambda logits, y: smoothed_cross_entropy(logits, y, reduction="none"),
        keep="last",
    )


@dataclass(frozen=True)
class GaussianAugmentation:
    """Mean cross-entropy of ``copies`` noisy copies.

    Args:
        sigma: standard deviation of the noise, ``> 0``, in the units of the input.
        copies: noisy copies per input, ``>= 1``.
        generator: source of the noise's keys; None uses torch's default generator.

    Raises:
        ValueError: an argument out of range.
    """

    sigma: float
    copies: int = 1
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_positive(type(self).__name__, "sigma", self.sigma)
        check_integer(type(self).__name__, "copies", self.copies, 1)

    def __call__(self, model: nn.Module, x: Tensor, labels: Tensor, done: float = 0.0) -> Tensor:
        """Mean loss over the batch; ``done`` is not used."""
        logits = self._logits(model, x)
        return gaussian_augmentation_loss(logits, labels)

    def _logits(self, model: nn.Module, x: Tensor) -> Tensor:
        return _logits(model, noisy_copies(x, self.sigma, self.copies, generator=self.generator))


@dataclass(frozen=True)
class StabilityTraining(GaussianAugmentation):
    """:func:`stability_loss`; the paper's weight on CIFAR-10 is 2.

    Args:
        sigma: standard deviation of the noise, ``> 0``.
        copies: noisy copies per input, ``>= 1``.
        generator: source of the noise's keys; None uses torch's default generator.
        weight: of the agreement of noisy and clean predictions, ``>= 0``.
    """

    weight: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(type(self).__name__, "weight", self.weight, 0.0)

    def __call__(self, model: nn.Module, x: Tensor, labels: Tensor, done: float = 0.0) -> Tensor:
        """Mean loss over the batch; ``done`` is not used."""
        return stability_loss(model(x), self._logits(model, x), labels, weight=self.weight)


@dataclass(frozen=True)
class MacerTraining(GaussianAugmentation):
    """:func:`macer_loss`; 16 copies in the paper.

    Args:
        sigma: standard deviation of the noise, ``> 0``.
        copies: noisy copies per input, ``>= 1``.
        generator: source of the noise's keys; None uses torch's default generator.
        weight: of the hinge on the radius, ``>= 0``.
        beta: inverse temperature of the radius, ``> 0``.
        gamma: margin of the hinge, ``> 0``.
    """

    copies: int = 16
    weight: float = 12.0
    beta: float = 16.0
    gamma: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(type(self).__name__, "weight", self.weight, 0.0)
        for name in ("beta", "gamma"):
            check_positive(type(self).__name__, name, getattr(self, name))

    def __call__(self, model: nn.Module, x: Tensor, labels: Tensor, done: float = 0.0) -> Tensor:
        """Mean loss over the batch; ``done`` is not used."""
        terms: dict[str, Any] = {name: getattr(self, name) for name in ("weight", "beta", "gamma")}
        return macer_loss(self._logits(model, x), labels, self.sigma, **terms)


@dataclass(frozen=True)
class ConsistencyTraining(GaussianAugmentation):
    """Gaussian augmentation and ``weight`` times the consistency penalty.

    Args:
        sigma: standard deviation of the noise, ``> 0``.
        copies: noisy copies per input, ``>= 2``.
        generator: source of the noise's keys; None uses torch's default generator.
        weight: of the agreement of the copies, ``>= 0`` (the paper's lambda: 5 to 20).
        entropy: of the mean prediction's entropy, ``>= 0`` (the paper's eta: 0.5).
    """

    copies: int = 2
    weight: float = 10.0
    entropy: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(type(self).__name__, "copies", self.copies, 2)
        check_positive(type(self).__name__, "weight", self.weight)
        check_at_least(type(self).__name__, "entropy", self.entropy, 0.0)

    def __call__(self, model: nn.Module, x: Tensor, labels: Tensor, done: float = 0.0) -> Tensor:
        """Mean loss over the batch; ``done`` is not used."""
        logits = self._logits(model, x)
        loss = gaussian_augmentation_loss(logits, labels)
        penalty = consistency_penalty(logits.transpose(0, 1), entropy=self.entropy / self.weight)
        return loss + self.weight * penalty


@dataclass(frozen=True)
class SmoothAdvTraining(GaussianAugmentation):
    """Cross-entropy of the noisy copies of :func:`smooth_adv`'s worst input, under the same noise.

    Args:
        sigma: standard deviation of the noise, ``> 0``.
        copies: noisy copies per input, ``>= 1``.
        generator: source of the noise's keys; None uses torch's default generator.
        eps: l2 radius of the attack, ``> 0``.
        steps: its gradient steps, ``>= 1``.
        warm_up: share of training over which the radius grows from 0 to ``eps``, in [0, 1].
        consistency: weight of the consistency penalty, ``>= 0``; needs two copies.
        entropy: of the mean prediction's entropy, ``>= 0``.
    """

    copies: int = 2
    eps: float = 0.25
    steps: int = 10
    warm_up: float = 0.1
    consistency: float = 0.0
    entropy: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        subject = type(self).__name__
        check_positive(subject, "eps", self.eps)
        check_integer(subject, "steps", self.steps, 1)
        for name in ("warm_up", "consistency", "entropy"):
            check_at_least(subject, name, getattr(self, name), 0.0)
        check_integer(subject, "copies", self.copies, 2 if self.consistency > 0 else 1)

    def __call__(self, model: nn.Module, x: Tensor, labels: Tensor, done: float = 0.0) -> Tensor:
        """Mean loss over the batch after the share ``done`` of training."""
        zeros = torch.zeros_like(x)
        noise = noisy_copies(zeros, self.sigma, self.copies, generator=self.generator)
        eps = self.eps * linear_ramp(done, end=self.warm_up)
        worst = x if eps == 0 else smooth_adv(model, x, labels, noise, eps=eps, steps=self.steps)
        logits = _logits(model, worst[:, None] + noise)
        loss = gaussian_augmentation_loss(logits, labels)
        if self.consistency > 0:
            share = self.entropy / self.consistency
            penalty = consistency_penalty(logits.transpose(0, 1), entropy=share)
            loss = loss + self.consistency * penalty
        return loss


def _logits(model: nn.Module, copies: Tensor) -> Tensor:
    """``(B, m, K)`` of ``(B, m, ...)``, in one forward pass."""
    logits: Tensor = model(copies.flatten(0, 1))
    return logits.view(*copies.shape[:2], -1)
