"""Training of the mixing network of an adaptive mixture, and the choice of a fixed weight.

Source: Bai et al., "Improving the Accuracy-Robustness Trade-Off of Classifiers via Adaptive
Smoothing", arXiv 2301.12554 (:mod:`pyrobust.nn.adaptive_smoothing`), section 5 and its public
configurations (ranges of the random attacks, constants of the loss, optimiser).
Departures: the number of steps of an attack is drawn once per batch, as in the public code; a
fixed weight is chosen under a constraint instead of by eye.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from pyrobust._checks import (
    check_at_least,
    check_choice,
    check_instance,
    check_integer,
    check_positive,
    check_unit,
)
from pyrobust.evaluate.attack_objective import attack_loss, evaluation_mode
from pyrobust.evaluate.auto_pgd import auto_pgd
from pyrobust.evaluate.pgd import pgd
from pyrobust.nn.adaptive_smoothing import AdaptiveMixedClassifier, MixedClassifier

__all__ = ["AlphaChoice", "MixingLoss", "RandomizedPGD", "choose_alpha", "train_mixer"]


class MixingLoss(nn.Module):
    """``c_bce BCE + c_ce CE + c_prod BCE CE`` per input, averaged.

    ``BCE`` compares ``gamma`` with whether the input is attacked, ``CE`` the mixture with the
    label; the product weighs the detector by how much depends on it.

    Args:
        c_bce: weight ``>= 0`` (the paper: 1.5 for CIFAR-100, 1 for small CIFAR-10 models).
        c_ce: weight ``>= 0`` (0; 0.5).
        c_prod: weight ``>= 0`` (0.2 or 0.3; 0.1).

    Raises:
        ValueError: a weight is negative, or all are 0.
    """

    def __init__(self, c_bce: float = 1.5, c_ce: float = 0.0, c_prod: float = 0.2) -> None:
        super().__init__()
        for name, value in (("c_bce", c_bce), ("c_ce", c_ce), ("c_prod", c_prod)):
            check_at_least("MixingLoss", name, value, 0.0)
        check_positive("MixingLoss", "the sum of the weights", c_bce + c_ce + c_prod)
        self.c_bce, self.c_ce, self.c_prod = c_bce, c_ce, c_prod

    def forward(self, scores: Tensor, labels: Tensor, gamma: Tensor, attacked: Tensor) -> Tensor:
        """Mean loss.

        Args:
            scores: ``(N, K)`` log-probabilities of the mixture.
            labels: ``(N,)`` int64.
            gamma: ``(N,)`` logits of the weight.
            attacked: ``(N,)`` 1 for an attacked input, 0 for a clean one.
        """
        ce = F.cross_entropy(scores, labels, reduction="none")
        bce = F.binary_cross_entropy_with_logits(gamma, attacked.to(gamma), reduction="none")
        return (self.c_bce * bce + self.c_ce * ce + self.c_prod * bce * ce).mean()


@dataclass(frozen=True)
class RandomizedPGD:
    """Random adaptive attacks on an adaptive mixture, through its mixing network.

    Each call makes one untargeted attack on the cross-entropy and ``targets`` attacks towards the
    most likely wrong classes with the targeted DLR loss (below 4 classes, the margin). The
    objective is ``(1 - w) loss + w BCE(gamma, 1)``, so that an attacked input also tries to look
    clean.

    Args:
        eps: radius ``> 0``, in the units of the input.
        norm: ``"linf"`` or ``"l2"``.
        eps_factors: range of the factor that each input's radius is multiplied by.
        step_degrees: degrees of freedom of the chi-square draw of the number of steps.
        step_factor: step of ``"pgd"`` as a multiple of radius over steps.
        momentum: largest momentum of ``"pgd"``, in [0, 1).
        detector_weight: largest ``w``, in [0, 1].
        targets: targeted attacks per call, ``>= 0``; at most ``K - 1`` are made.
        attack: ``"apgd"`` or ``"pgd"``.
        clamp: range of valid inputs; None for any.

    Raises:
        ValueError: an argument out of range.
    """

    eps: float
    norm: str = "linf"
    eps_factors: tuple[float, float] = (0.4, 1.1)
    step_degrees: float = 75.0
    step_factor: float = 5.0
    momentum: float = 0.9
    detector_weight: float = 0.4
    targets: int = 9
    attack: str = "apgd"
    clamp: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        subject = "RandomizedPGD"
        check_positive(subject, "eps", self.eps)
        check_choice(subject, "attack", self.attack, ("apgd", "pgd"))
        check_positive(subject, "step_degrees", self.step_degrees)
        check_positive(subject, "step_factor", self.step_factor)
        check_unit(subject, "momentum", self.momentum)
        check_unit(subject, "detector_weight", self.detector_weight)
        check_integer(subject, "targets", self.targets, 0)
        if not 0 < self.eps_factors[0] <= self.eps_factors[1]:
            raise ValueError(
                f"{subject}: eps_factors must be (low, high), 0 < low <= high; "
                f"got {self.eps_factors}."
            )

    def __call__(
        self, model: AdaptiveMixedClassifier, x: Tensor, y: Tensor, *, seed: int = 0
    ) -> Iterator[Tensor]:
        """Attacked copies of the batch, one attack after the other.

        Args:
            model: the mixture; its mode is kept, the attack sees evaluation mode.
            x: ``(N, ...)`` float inputs inside ``clamp``.
            y: ``(N,)`` int64.
            seed: of all draws.
        """
        generator = torch.Generator().manual_seed(seed)
        with evaluation_mode(model), torch.no_grad():
            scores = model(x)
        order = scores.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
        goals: list[Tensor | None] = [None]
        goals += [order[:, i] for i in range(min(self.targets, scores.shape[1] - 1))]
        for goal in goals:
            yield self._one(model, x, y, goal, generator)

    def _one(
        self,
        model: AdaptiveMixedClassifier,
        x: Tensor,
        y: Tensor,
        goal: Tensor | None,
        generator: torch.Generator,
    ) -> Tensor:
        def uniform(low: float, high: float) -> Tensor:
            draw = torch.rand(len(x), generator=generator, dtype=torch.float64)
            return (low + (high - low) * draw).to(x.device, x.dtype)

        eps = self.eps * uniform(*self.eps_factors)
        weight = uniform(0.0, self.detector_weight)
        steps = _chi_square(self.step_degrees, generator)
        seed = int(torch.randint(2**31, (), generator=generator))

        def objective(outputs: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
            scores, gamma = outputs
            kind = "ce" if goal is None else "dlr" if scores.shape[1] >= 4 else "margin"
            loss = attack_loss(scores, labels, kind=kind, targets=goal)
            ones = torch.ones_like(gamma)
            seen = F.binary_cross_entropy_with_logits(gamma, ones, reduction="none")
            return (1 - weight) * loss + weight * seen

        with evaluation_mode(model):
            if self.attack == "apgd":
                return auto_pgd(
                    model.with_gamma,
                    x,
                    y,
                    eps=eps,
                    norm=self.norm,
                    steps=steps,
                    objective=objective,
                    clamp=self.clamp,
                    seed=seed,
                )
            return pgd(
                model.with_gamma,
                x,
                y,
                eps=eps,
                norm=self.norm,
                steps=steps,
                step_size=eps / steps * self.step_factor,
                momentum=uniform(0.0, self.momentum),
                objective=objective,
                clamp=self.clamp,
                keep="last",
                seed=seed,
            )


def _chi_square(degrees: float, generator: torch.Generator) -> int:
    """A chi-square draw, rounded, at least 1 (Wilson and Hilferty's normal approximation)."""
    z = float(torch.randn((), generator=generator))
    spread = 2 / (9 * degrees)
    return max(1, round(degrees * (1 - spread + z * math.sqrt(spread)) ** 3))


def train_mixer(
    model: AdaptiveMixedClassifier,
    images: Tensor,
    labels: Tensor,
    *,
    attack: RandomizedPGD,
    loss: MixingLoss | None = None,
    epochs: int = 3,
    batch_size: int = 100,
    learning_rate: float = 5e-5,
    weight_decay: float = 1e-5,
    seed: int = 0,
    progress: bool = False,
) -> AdaptiveMixedClassifier:
    """Train the mixing network, and nothing else, to tell attacked inputs from clean ones.

    One AdamW step per attack of each batch, on the clean and the attacked copies together; the
    learning rate warms up exponentially over 1/25 of the steps and falls as a cosine.

    Args:
        model: the mixture; changed in place and left in evaluation mode.
        images: ``(N, ...)`` float inputs.
        labels: ``(N,)`` int64 classes.
        attack: the random attacks.
        loss: None takes :class:`MixingLoss` with its defaults.
        epochs: passes over the data, ``>= 1``.
        batch_size: images per batch, ``>= 1``.
        learning_rate: of AdamW, ``> 0`` (the paper: 5e-5 to 1e-4).
        weight_decay: ``>= 0``.
        seed: of order and attacks.
        progress: show a progress bar.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an adaptive mixture.
        ValueError: an argument out of range.
        FloatingPointError: the loss is no longer finite.
    """
    subject = "train_mixer"
    check_instance(subject, "model", model, AdaptiveMixedClassifier)
    check_integer(subject, "epochs", epochs, 1)
    check_integer(subject, "batch_size", batch_size, 1)
    check_positive(subject, "learning_rate", learning_rate)
    check_at_least(subject, "weight_decay", weight_decay, 0.0)
    loss = loss or MixingLoss()
    with evaluation_mode(model), torch.no_grad():
        classes = model(images[:1]).shape[1]
    batches = -(-len(images) // batch_size)
    total, step = epochs * batches * (1 + min(attack.targets, classes - 1)), 0
    optimizer = torch.optim.AdamW(
        model.mixer.parameters(), lr=learning_rate, weight_decay=weight_decay
    )
    generator = torch.Generator().manual_seed(seed)
    with tqdm(total=total, disable=not progress, unit="step", desc=subject) as bar:
        for _ in range(epochs):
            for part in torch.randperm(len(images), generator=generator).split(batch_size):
                x, y = images[part], labels[part]
                draw = int(torch.randint(2**31, (), generator=generator))
                for attacked in attack(model, x, y, seed=draw):
                    rate = learning_rate * _rate(step, total)
                    optimizer.param_groups[0]["lr"] = rate
                    _mixer_step(model, loss, optimizer, x, attacked, y)
                    step += 1
                    bar.update()
    model.eval()
    return model


def _mixer_step(
    model: AdaptiveMixedClassifier,
    loss: MixingLoss,
    optimizer: torch.optim.Optimizer,
    clean: Tensor,
    attacked: Tensor,
    y: Tensor,
) -> None:
    """One step on a batch and its attacked copy."""
    model.train()
    scores, gamma = model.with_gamma(torch.cat([clean, attacked]))
    truth = torch.cat([torch.zeros(len(clean)), torch.ones(len(attacked))]).to(gamma.device)
    value = loss(scores, y.repeat(2), gamma, truth)
    if not torch.isfinite(value):
        raise FloatingPointError(f"train_mixer: the loss became {value.item()}.")
    optimizer.zero_grad()
    value.backward()
    optimizer.step()


def _rate(step: int, total: int) -> float:
    """Factor of the learning rate: exponential warm-up times half a cosine."""
    warm = 1 - math.exp(-(step + 1) / max(total / 25, 1e-9))
    return warm * (1 + math.cos(math.pi * step / total)) / 2


@dataclass(frozen=True)
class AlphaChoice:
    """A fixed weight, and what every weight of the sweep gave.

    Attributes:
        alpha: the weight of the robust classifier.
        alphas: the weights tried, increasing.
        clean: accuracy on clean inputs of each.
        attacked: accuracy under attack of each.
    """

    alpha: float
    alphas: tuple[float, ...]
    clean: tuple[float, ...]
    attacked: tuple[float, ...]


def choose_alpha(
    standard: nn.Module,
    robust: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor],
    max_loss: float = 0.03,
    alphas: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0),
    standard_scale: float = 1.0,
    robust_scale: float = 1.0,
) -> AlphaChoice:
    """The most accurate weight that costs at most ``max_loss`` of accuracy under attack.

    Args:
        standard: the accurate classifier, frozen.
        robust: the robust classifier, frozen.
        images: ``(N, ...)`` held-out inputs; not those that figures are reported on.
        labels: ``(N,)`` int64.
        attack: ``(model, x, y)`` to ``(N, ...)`` points. Each mixture is judged on the worst of
            attacks on itself, on ``robust`` and on ``standard``.
        max_loss: accuracy under attack that may be lost against the best weight, in [0, 1].
        alphas: weights to try, increasing, in [0, 1].
        standard_scale: factor of the logits of ``standard``, ``> 0``.
        robust_scale: factor of the logits of ``robust``, ``> 0``.

    Returns:
        The choice; of equally accurate weights the largest.

    Raises:
        ValueError: an argument out of range.
    """
    subject = "choose_alpha"
    check_unit(subject, "max_loss", max_loss)
    if not alphas or any(b <= a for a, b in itertools.pairwise(alphas)):
        raise ValueError(f"{subject}: alphas must be increasing, at least one; got {alphas}.")
    transferred = [attack(part, images, labels) for part in (standard, robust)]
    clean, attacked = [], []
    for alpha in alphas:
        mixed = MixedClassifier(standard, robust, alpha, standard_scale, robust_scale).eval()
        points = [attack(mixed, images, labels), *transferred]
        with torch.no_grad():
            right = mixed(images).argmax(1) == labels
            still = torch.stack([mixed(p).argmax(1) == labels for p in points]).all(0) & right
        clean.append(float(right.double().mean()))
        attacked.append(float(still.double().mean()))
    allowed = [i for i, value in enumerate(attacked) if value >= max(attacked) - max_loss - 1e-12]
    best = max(allowed, key=lambda i: (clean[i], alphas[i]))
    return AlphaChoice(float(alphas[best]), tuple(alphas), tuple(clean), tuple(attacked))
