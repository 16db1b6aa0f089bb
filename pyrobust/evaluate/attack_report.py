"""AttackReport: accuracy under the worst of several attacks, with signs of gradient masking.

The figure to quote is the worst case over all attacks, per input. A model whose gradients mislead
looks robust to each gradient attack; the report looks for the traces that leaves. No trace is no
proof: only :mod:`pyrobust.certify` proves.

Source: Athalye, Carlini, Wagner, "Obfuscated Gradients Give a False Sense of Security", ICML 2018,
arXiv 1802.00420, section 3.1 (the signs); Croce, Hein, ICML 2020, arXiv 2003.01690 (the attacks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyrobust._checks import check_integer, check_positive
from pyrobust.evaluate.attack_objective import AttackProblem
from pyrobust.evaluate.auto_pgd import auto_pgd, targeted_auto_pgd
from pyrobust.evaluate.norm_ball import NormBall
from pyrobust.evaluate.pgd import pgd

__all__ = ["AttackReport", "attack_report"]

Attack = Callable[[], Tensor]

_RANDOM_POINTS = 50
_TOLERANCE = 0.02  # share of inputs by which one figure may exceed another before it is a sign


@dataclass(frozen=True)
class AttackReport:
    """What several attacks did to one classifier.

    Attributes:
        survived: name of each attack (``"clean"`` first) to ``(N,)`` bool: still classified right.
        eps: radius of the attacks.
        norm: its norm.
        signs: sentences, each a sign that gradients mislead; empty where none was seen.
        points: name of each attack to its ``(N, ...)`` points.
    """

    survived: Mapping[str, Tensor]
    eps: float
    norm: str
    signs: tuple[str, ...]
    points: Mapping[str, Tensor] = field(repr=False)

    @property
    def worst_case(self) -> Tensor:
        """``(N,)`` bool: right under every attack."""
        return torch.stack(list(self.survived.values())).all(0)

    @property
    def accuracies(self) -> dict[str, float]:
        """Accuracy under each attack, and under the worst of them per input."""
        result = {name: float(right.double().mean()) for name, right in self.survived.items()}
        return result | {"worst case": float(self.worst_case.double().mean())}

    @property
    def masked(self) -> bool:
        """Whether a sign of gradient masking was seen."""
        return bool(self.signs)

    def summary(self) -> str:
        """A table for people."""
        lines = [f"accuracy under attack ({self.norm}, eps = {self.eps:g})"]
        lines += [f"{name:<24} {value:.3f}" for name, value in self.accuracies.items()]
        lines += [f"gradient masking: {sign}" for sign in self.signs]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON."""
        return {
            "norm": self.norm,
            "eps": self.eps,
            "inputs": len(self.worst_case),
            "accuracies": self.accuracies,
            "signs": list(self.signs),
        }


def attack_report(
    model: Callable[[Tensor], Any],
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    steps: int = 50,
    extra: Mapping[str, Attack] | None = None,
    samples: int = 1,
    clamp: tuple[float, float] | None = (0.0, 1.0),
    seed: int = 0,
    progress: bool = False,
) -> AttackReport:
    """Attack a classifier with PGD, Auto-PGD and random points, and look for masked gradients.

    The attacks: PGD on the cross-entropy with ``steps`` and ``2 * steps``; Auto-PGD on the
    cross-entropy and, from 3 classes on, towards up to nine wrong classes; random points; PGD at a
    ball that holds every valid input (a sign only; with ``clamp=None`` it is left out).

    Args:
        model: classifier, ``(N, ...)`` to ``(N, K)`` scores.
        x: ``(N, ...)`` float inputs inside ``clamp``.
        y: ``(N,)`` int64 true classes.
        eps: radius ``> 0`` in the units of ``x``.
        norm: ``"linf"`` or ``"l2"``.
        steps: gradient steps ``>= 1``.
        extra: further attacks by name, as functions that return ``(N, ...)`` points: transfer
            attacks or attacks made for this model; they are projected into the ball.
        samples: draws of a random model that each look averages over.
        clamp: range of valid inputs; None for any.
        seed: of all randomness.
        progress: show a progress bar.

    Returns:
        The report, with a sign for each of: gradients that are zero; more steps that do worse;
        random points or an extra attack that beat all gradient attacks; accuracy left at a radius
        that allows everything; a model that answers twice differently while ``samples`` is 1.

    Raises:
        TypeError: ``x`` is not floating-point.
        ValueError: an argument out of range.
    """
    subject = "attack_report"
    check_integer(subject, "steps", steps, 1)
    check_positive(subject, "eps", eps)
    ball = NormBall(eps, norm, clamp)
    problem = AttackProblem(subject, model, x, y, samples=samples)
    options: dict[str, Any] = {"norm": norm, "samples": samples, "clamp": clamp, "seed": seed}
    attacks = _gradient_attacks(problem, steps, {"eps": eps, **options})
    gradient_names = ["clean", *attacks]
    attacks["random points"] = lambda: _random_points(problem, ball, seed)
    attacks |= {name: _projected(attack, ball, problem.x) for name, attack in (extra or {}).items()}
    points, survived = {"clean": problem.x}, {"clean": _right(problem, problem.x, seed)}
    for name, attack in tqdm(attacks.items(), disable=not progress, unit="attack"):
        points[name] = attack()
        survived[name] = _right(problem, points[name], seed)
    signs = _gradient_signs(problem, seed) + _order_signs(survived, gradient_names, steps)
    if clamp is not None:
        signs += _unbounded_sign(problem, steps, options)
    return AttackReport(survived, eps, norm, tuple(signs), points)


def _gradient_attacks(
    problem: AttackProblem, steps: int, options: dict[str, Any]
) -> dict[str, Attack]:
    """The attacks that follow gradients, by name."""
    model, x, y = problem.model, problem.x, problem.y
    with problem.guarded(0), torch.no_grad():
        classes = int(model(x[:1]).shape[1])
    attacks: dict[str, Attack] = {
        f"PGD-{steps}": lambda: pgd(model, x, y, steps=steps, **options),
        f"PGD-{2 * steps}": lambda: pgd(model, x, y, steps=2 * steps, **options),
        "APGD-CE": lambda: auto_pgd(model, x, y, steps=steps, **options),
    }
    if classes >= 3:
        attacks["APGD-T"] = lambda: targeted_auto_pgd(model, x, y, steps=steps, **options)
    return attacks


def _projected(attack: Attack, ball: NormBall, x: Tensor) -> Attack:
    return lambda: ball.project(attack().detach(), x)


def _random_points(problem: AttackProblem, ball: NormBall, seed: int) -> Tensor:
    """The worst of ``_RANDOM_POINTS`` random points of each ball."""
    worst = AttackProblem(
        "attack_report", problem.model, problem.x, problem.y, samples=problem.samples
    )
    with worst.guarded(seed) as generator:
        for _ in range(_RANDOM_POINTS):
            worst.judge(ball.random(problem.x, generator))
    return worst.worst


def _right(problem: AttackProblem, points: Tensor, seed: int) -> Tensor:
    """``(N,)`` bool: the mean answer at the points is the true class."""
    with problem.guarded(seed), torch.no_grad():
        draws = [problem.model(points).softmax(1) for _ in range(problem.samples)]
    return torch.stack(draws).mean(0).argmax(1) == problem.y


def _gradient_signs(problem: AttackProblem, seed: int) -> list[str]:
    """Gradients that are zero, and randomness that one draw does not see through."""
    signs = []
    with problem.guarded(seed):
        slope = problem.climb(problem.x)[1]
        first, second = (problem.model(problem.x).detach() for _ in range(2))
    zero = float((slope.flatten(1) == 0).all(1).double().mean())
    if zero > _TOLERANCE:
        signs.append(f"the gradient is exactly zero at {zero:.0%} of the inputs")
    if problem.samples == 1 and not torch.equal(first, second):
        signs.append("the model is random, but each look saw one draw (samples = 1)")
    return signs


def _order_signs(
    survived: Mapping[str, Tensor], gradient_names: list[str], steps: int
) -> list[str]:
    """Attacks that should be weaker and are stronger."""
    signs = []
    few, many = (float(survived[f"PGD-{n}"].double().mean()) for n in (steps, 2 * steps))
    if many > few + _TOLERANCE:
        signs.append(f"twice the steps leave more accuracy: {many:.3f} against {few:.3f}")
    best = torch.stack([survived[name] for name in gradient_names]).all(0)
    for name, right in survived.items():
        if name not in gradient_names:
            only = float((best & ~right).double().mean())
            if only > _TOLERANCE:
                signs.append(f"{name} breaks {only:.0%} of the inputs that gradients do not")
    return signs


def _unbounded_sign(problem: AttackProblem, steps: int, options: dict[str, Any]) -> list[str]:
    """Accuracy that is left when every valid input is allowed."""
    low, high = options["clamp"]
    width = (high - low) * (1.0 if options["norm"] == "linf" else problem.x[:1].numel() ** 0.5)
    points = auto_pgd(problem.model, problem.x, problem.y, eps=width, steps=steps, **options)
    left = float(_right(problem, points, options["seed"]).double().mean())
    if left <= _TOLERANCE:
        return []
    return [f"{left:.0%} of the inputs survive at a radius that allows every input"]
