"""PGD: the projected gradient attack, with any objective and over random models.

An attack finds errors; where it finds none, nothing is proven. Of all points that a run visits,
the clean input included, it returns the worst one, so more steps or restarts never look better.

Source: Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to
Adversarial Attacks", ICLR 2018, arXiv 1706.06083; Athalye, Engstrom, Ilyas, Kwok, "Synthesizing
Robust Adversarial Examples", ICML 2018, arXiv 1707.07397 (the mean over the model's randomness).
Departures: the worst visited point is returned, not the last one (``keep="last"`` does that).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrobust._checks import check_choice, check_integer, check_shape
from pyrobust.evaluate.attack_objective import AttackObjective, AttackProblem
from pyrobust.evaluate.norm_ball import NormBall

__all__ = ["pgd"]


def pgd(
    model: Callable[[Tensor], Any],
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int | Tensor = 20,
    step_size: float | Tensor | None = None,
    momentum: float | Tensor = 0.0,
    restarts: int = 1,
    random_start: bool = True,
    objective: str | AttackObjective = "ce",
    targets: Tensor | None = None,
    surrogate: Callable[[Tensor], Any] | None = None,
    samples: int = 1,
    clamp: tuple[float, float] | None = (0.0, 1.0),
    projection: Callable[[Tensor, Tensor], Tensor] | None = None,
    keep: str = "best",
    seed: int = 0,
) -> Tensor:
    """The worst points that projected gradient ascent finds in balls around ``x``.

    Modules are put into evaluation mode for the attack and back after it; parameters receive no
    gradient; torch's global random state is as before.

    Args:
        model: classifier, ``(N, ...)`` to ``(N, K)`` scores; anything callable.
        x: ``(N, ...)`` float inputs inside ``clamp``.
        y: ``(N,)`` int64 true classes.
        eps: radius ``>= 0`` in the units of ``x``; a number or ``(N,)``.
        norm: ``"linf"`` or ``"l2"``.
        steps: gradient steps ``>= 1``; a number or ``(N,)`` int64, one per input.
        step_size: length of a step; None takes ``2.5 * eps / steps``. A number or ``(N,)``.
        momentum: share of the last step's direction that is added, in [0, 1); number or ``(N,)``.
        restarts: runs ``>= 1``; the first starts at random like the others.
        random_start: False starts at ``x`` (more than one run then only helps random models).
        objective: ``"ce"``, ``"dlr"``, ``"margin"`` (:func:`attack_loss`) or a callable of the
            model's output and ``y`` that returns ``(N,)`` to raise.
        targets: ``(N,)`` classes to reach, for the named objectives; None for any error.
        surrogate: a differentiable stand-in for the gradients; ``model`` still judges the points.
            With another classifier this is a transfer attack.
        samples: draws of a random model that each gradient and each judgement averages over.
        clamp: range of valid inputs; None for any.
        projection: applied last, ``(points, x)`` to points, as for a mask over the coordinates.
        keep: ``"best"`` the worst point for the model (an error first, then the objective), or
            ``"last"`` as adversarial training uses it.
        seed: of starting points and of the model's own torch randomness.

    Returns:
        ``(N, ...)`` detached points, within ``eps`` of ``x`` up to float rounding.

    Raises:
        TypeError: ``x`` is not floating-point.
        ValueError: an argument out of range, shapes that disagree, or a non-finite objective.

    Example:
        >>> linear = torch.nn.Linear(2, 2)
        >>> x, y = torch.full((1, 2), 0.5), torch.tensor([0])
        >>> (pgd(linear, x, y, eps=0.1) - x).abs().max() <= 0.1 + 1e-6
        tensor(True)
    """
    subject = "pgd"
    check_integer(subject, "restarts", restarts, 1)
    check_choice(subject, "keep", keep, ("best", "last"))
    problem = AttackProblem(
        subject,
        model,
        x,
        y,
        objective=objective,
        targets=targets,
        surrogate=surrogate,
        samples=samples,
    )
    x = problem.x
    ball = NormBall(eps, norm, clamp)
    each = _step_counts(subject, steps, len(x)).to(x.device)
    count = ball.column(x, each)
    length = 2.5 * ball.column(x) / count if step_size is None else ball.column(x, step_size)
    drag = ball.column(x, momentum)
    if bool((length < 0).any()) or bool(((drag < 0) | (drag >= 1)).any()):
        raise ValueError(
            f"{subject}: step_size must be at least 0 and momentum in [0, 1); "
            f"got {step_size} and {momentum}."
        )
    limit = projection or (lambda points, _: points)
    points = x
    with problem.guarded(seed) as generator:
        if keep == "best":
            problem.judge(x)
        for _ in range(restarts):
            points = limit(ball.random(x, generator) if random_start else x, x)
            direction = torch.zeros_like(points)
            for step in range(int(each.max()) if len(x) else 0):
                _, gradient = problem.climb(points)
                direction = drag * direction + ball.ascend(gradient)
                moved = limit(ball.project(points + length * direction, x), x)
                points = torch.where(count > step, moved, points)
            if keep == "best":
                problem.judge(points)
    return problem.worst if keep == "best" else points


def _step_counts(subject: str, steps: int | Tensor, inputs: int) -> Tensor:
    """``(N,)`` int64 step counts."""
    if not isinstance(steps, Tensor):
        check_integer(subject, "steps", steps, 1)
        return torch.full((inputs,), steps)
    check_shape(subject, "steps", steps, (inputs,))
    if steps.is_floating_point() or bool((steps < 1).any()):
        raise ValueError(f"{subject}: steps must be integers >= 1; got {steps}.")
    return steps
