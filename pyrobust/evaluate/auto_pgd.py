"""Auto-PGD: projected gradient ascent that chooses its own step sizes.

The step starts at the diameter of the ball and is halved whenever progress stalls, each time going
back to the best point. With the cross-entropy and the targeted DLR loss it is the white-box half
of AutoAttack.

Source: Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020, arXiv 2003.01690, algorithm 1 and section 4.
Departures: objectives of random models are means over ``samples`` draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyrobust._checks import check_integer, check_open_unit
from pyrobust.evaluate.attack_objective import AttackObjective, AttackProblem, attack_loss
from pyrobust.evaluate.norm_ball import NormBall

__all__ = ["auto_pgd", "targeted_auto_pgd"]

_INERTIA = 0.75  # weight of the new step against the last move (the paper's alpha)


def auto_pgd(
    model: Callable[[Tensor], Any],
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    objective: str | AttackObjective = "ce",
    targets: Tensor | None = None,
    samples: int = 1,
    clamp: tuple[float, float] | None = (0.0, 1.0),
    rho: float = 0.75,
    seed: int = 0,
) -> Tensor:
    """The worst points that Auto-PGD finds; arguments as in :func:`pyrobust.evaluate.pgd`.

    Args:
        model: classifier, ``(N, ...)`` to ``(N, K)`` scores; anything callable.
        x: ``(N, ...)`` float inputs inside ``clamp``.
        y: ``(N,)`` int64 true classes.
        eps: radius ``>= 0`` in the units of ``x``; a number or ``(N,)``.
        norm: ``"linf"`` or ``"l2"``.
        steps: gradient steps ``>= 1``.
        restarts: random starts ``>= 1``.
        objective: ``"ce"``, ``"dlr"``, ``"margin"`` or a callable.
        targets: ``(N,)`` classes to reach, for the named objectives; None for any error.
        samples: draws of a random model that each look averages over.
        clamp: range of valid inputs; None for any.
        rho: share of rising steps below which the step is halved, in (0, 1).
        seed: of starting points and of the model's own torch randomness.

    Returns:
        ``(N, ...)`` detached points, within ``eps`` of ``x`` up to float rounding.

    Raises:
        TypeError: ``x`` is not floating-point.
        ValueError: an argument out of range, or a NaN objective.
    """
    subject = "auto_pgd"
    check_integer(subject, "steps", steps, 1)
    check_integer(subject, "restarts", restarts, 1)
    check_open_unit(subject, "rho", rho)
    problem = AttackProblem(
        subject, model, x, y, objective=objective, targets=targets, samples=samples
    )
    ball = NormBall(eps, norm, clamp)
    with problem.guarded(seed) as generator:
        problem.judge(problem.x)
        for _ in range(restarts if len(x) else 0):
            _Ascent(problem, ball, ball.random(problem.x, generator)).run(steps, rho)
    return problem.worst


def targeted_auto_pgd(
    model: Callable[[Tensor], Any],
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int = 100,
    classes: int = 9,
    samples: int = 1,
    clamp: tuple[float, float] | None = (0.0, 1.0),
    seed: int = 0,
) -> Tensor:
    """Auto-PGD towards each of the most likely wrong classes in turn, with the targeted DLR loss.

    Inputs that an earlier target has fooled are left out of the later runs.

    Args:
        model: classifier of at least 3 classes; with 3 the plain margin replaces the DLR loss.
        x: ``(N, ...)`` float inputs inside ``clamp``.
        y: ``(N,)`` int64 true classes.
        eps: radius ``>= 0`` in the units of ``x``; a number or ``(N,)``.
        norm: ``"linf"`` or ``"l2"``.
        steps: gradient steps per target, ``>= 1``.
        classes: targets, ``>= 1``; at most ``K - 1`` are used.
        samples: draws of a random model that each look averages over.
        clamp: range of valid inputs; None for any.
        seed: of starting points and of the model's own torch randomness.

    Returns:
        ``(N, ...)`` points: an error where one was found, else that of the last target.

    Raises:
        TypeError: ``x`` is not floating-point.
        ValueError: an argument out of range.
    """
    check_integer("targeted_auto_pgd", "classes", classes, 1)
    clean = AttackProblem("targeted_auto_pgd", model, x, y, samples=samples)
    with clean.guarded(seed), torch.no_grad():
        scores = torch.stack([model(x).softmax(1) for _ in range(samples)]).sum(0)
    order = scores.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    kind = "dlr" if scores.shape[1] >= 4 else "margin"
    open_ = (scores.argmax(1) == y).nonzero()[:, 0]
    found = x.detach().clone()
    for rank in range(min(classes, scores.shape[1] - 1)):
        if len(open_) == 0:
            break
        radius = eps[open_] if isinstance(eps, Tensor) and eps.ndim == 1 else eps
        # As a callable: reaching any wrong class then counts as an error, not the target only.
        goal = partial(attack_loss, kind=kind, targets=order[open_, rank])
        points = auto_pgd(
            model,
            x[open_],
            y[open_],
            eps=radius,
            norm=norm,
            steps=steps,
            objective=goal,
            samples=samples,
            clamp=clamp,
            seed=seed + rank,
        )
        found[open_] = points
        check = AttackProblem("targeted_auto_pgd", model, points, y[open_], samples=samples)
        with check.guarded(seed + rank):
            check.judge(points)
        open_ = open_[~check.fooled]
    return found


@dataclass
class _Stage:
    """What is known since the last checkpoint, per input."""

    rises: Tensor
    halved: Tensor
    best: Tensor


class _Ascent:
    """One run of algorithm 1 from a start."""

    def __init__(self, problem: AttackProblem, ball: NormBall, start: Tensor) -> None:
        self.problem, self.ball = problem, ball
        self.points = self.last = start
        self.value, self.gradient = problem.climb(start)
        self.top, self.top_points = self.value.clone(), start.clone()
        self.top_gradient = self.gradient.clone()
        self.length = 2 * ball.column(start).clone()

    def run(self, steps: int, rho: float) -> None:
        """All steps, with a decision about the step size at each checkpoint."""
        checkpoints = _checkpoints(steps)
        stage = self._new_stage(torch.ones_like(self.value, dtype=torch.bool))
        since = 0
        for step in range(steps):
            self._step(1.0 if step == 0 else _INERTIA, stage)
            since += 1
            if step + 1 in checkpoints:
                stalled = stage.rises < rho * since
                stuck = ~stage.halved & (self.top <= stage.best)
                stage = self._new_stage(self._halve(stalled | stuck))
                since = 0

    def _new_stage(self, halved: Tensor) -> _Stage:
        return _Stage(torch.zeros_like(self.value), halved, self.top.clone())

    def _step(self, inertia: float, stage: _Stage) -> None:
        x, ball = self.problem.x, self.ball
        ahead = ball.project(self.points + self.length * ball.ascend(self.gradient), x)
        mixed = self.points + inertia * (ahead - self.points)
        mixed = ball.project(mixed + (1 - inertia) * (self.points - self.last), x)
        value, gradient = self.problem.climb(mixed)
        stage.rises += value > self.value
        self.last, self.points, self.value, self.gradient = self.points, mixed, value, gradient
        higher = value > self.top
        self.top = torch.where(higher, value, self.top)
        self.top_points[higher] = mixed[higher]
        self.top_gradient[higher] = gradient[higher]

    def _halve(self, where: Tensor) -> Tensor:
        """Halve the step and go back to the best point ``where``; returns ``where``."""
        shape = (-1, *[1] * (self.points.ndim - 1))
        self.length = torch.where(where.reshape(shape), self.length / 2, self.length)
        self.points = torch.where(where.reshape(shape), self.top_points, self.points)
        self.gradient = torch.where(where.reshape(shape), self.top_gradient, self.gradient)
        self.value = torch.where(where, self.top, self.value)
        return where


def _checkpoints(steps: int) -> set[int]:
    """Steps after which progress is judged: intervals shrink from 22% to 6% of the run."""
    shares = [0.0, 0.22]
    while shares[-1] <= 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return {math.ceil(share * steps) for share in shares[1:] if share <= 1}
