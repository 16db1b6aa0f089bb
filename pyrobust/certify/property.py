"""Decide a property of a network: refuted by an attack, proven by bounds, or open.

Source: the verdicts of VNN-COMP (``unsat``, ``sat``, ``unknown``).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyrobust._checks import check_choice, check_eval_mode, check_integer
from pyrobust.certify.bound import METHODS, bound
from pyrobust.certify.vnnlib import Property, PropertyCase
from pyrobust.interval import Interval

__all__ = ["Verdict", "decide_property"]


@dataclass(frozen=True)
class Verdict:
    """The answer to a property.

    Attributes:
        answer: ``"unsat"``, no input of the box satisfies the constraints: proven for real
            arithmetic on the stored weights; ``"sat"``, one does; ``"unknown"``.
        counterexample: for ``"sat"``, an input of the model's shape, inside the box, at which the
            constraints hold in float64.
        method: what decided: a bounding method, ``"attack"``, or the last method tried.
        open_cases: cases that were neither proven nor refuted.
    """

    answer: str
    counterexample: Tensor | None
    method: str
    open_cases: int

    def summary(self) -> str:
        """The answer and what decided it."""
        return f"{self.answer} ({self.method})"


def decide_property(
    model: nn.Module,
    question: Property,
    shape: tuple[int, ...] | None = None,
    *,
    method: str = "alpha-crown",
    attack_steps: int = 100,
    attack_restarts: int = 20,
    seed: int = 0,
) -> Verdict:
    """Attack first, then bound with ever tighter methods up to ``method``.

    Args:
        model: network in evaluation mode, float32, ``(B, *shape)`` to ``(B, outputs)``.
        question: from :func:`~pyrobust.certify.load_vnnlib`.
        shape: of one input; None for a flat one.
        method: the last method to try, of those of :func:`~pyrobust.certify.bound`.
        attack_steps: gradient steps of each try, ``>= 1``.
        attack_restarts: tries for each case, ``>= 1``.
        seed: of the attack's starts.

    Returns:
        The verdict.

    Raises:
        ValueError: sizes disagree, the model is in training mode, or an option is out of range.
    """
    subject = "decide_property"
    check_choice(subject, "method", method, METHODS)
    check_integer(subject, "attack_steps", attack_steps, 1)
    check_integer(subject, "attack_restarts", attack_restarts, 1)
    check_eval_mode(subject, model)
    size = (question.inputs,) if shape is None else tuple(shape)
    if torch.Size(size).numel() != question.inputs:
        raise ValueError(
            f"{subject}: shape must hold {question.inputs} inputs, as the property; got {size}."
        )
    outputs = model(question.cases[0].lower.reshape(1, *size)).flatten(1).shape[1]
    if outputs != question.outputs:
        raise ValueError(
            f"{subject}: the property is about {question.outputs} outputs, the model has {outputs}."
        )
    wide = copy.deepcopy(model).double()
    for number, case in enumerate(question.cases):
        found = _attack(wide, case, size, attack_steps, attack_restarts, seed + number)
        if found is not None:
            return Verdict("sat", found, "attack", 0)
    remaining = list(question.cases)
    used = method
    for used in METHODS[: METHODS.index(method) + 1]:
        remaining = [case for case in remaining if not _refuted(model, case, size, used)]
        if not remaining:
            return Verdict("unsat", None, used, 0)
    return Verdict("unknown", None, used, len(remaining))


@torch.no_grad()
def _refuted(model: nn.Module, case: PropertyCase, size: tuple[int, ...], method: str) -> bool:
    """Whether some constraint fails on the whole box."""
    box = Interval(case.lower.reshape(1, *size), case.upper.reshape(1, *size))
    if len(case.limit) == 0:
        return False
    values = bound(nn.Sequential(model, nn.Flatten()), box, case.matrix, method)
    return bool((values.lower.double()[0] > case.limit).any())


def _attack(
    wide: nn.Module,
    case: PropertyCase,
    size: tuple[int, ...],
    steps: int,
    restarts: int,
    seed: int,
) -> Tensor | None:
    """A float32 point of the box at which all constraints hold in float64, or None."""
    generator = torch.Generator().manual_seed(seed)
    low, high = case.lower.double().reshape(size), case.upper.double().reshape(size)
    x = low + torch.rand(restarts, *size, generator=generator, dtype=torch.float64) * (high - low)
    x[0] = low / 2 + high / 2
    for step in range(steps + 1):
        point = torch.maximum(
            torch.minimum(x.float(), case.upper.reshape(size)), case.lower.reshape(size)
        )
        x = point.double().requires_grad_(True)
        worst = _violation(wide, case, x)
        reached = (worst <= 0).nonzero()
        if len(reached):
            return point[int(reached[0])].detach()
        if step == steps:
            break
        (gradient,) = torch.autograd.grad(worst.sum(), x)
        with torch.no_grad():
            # long steps first, to cross the box; short ones last, to settle
            length = 0.25 * (1 - step / steps) + 0.002
            x = torch.maximum(torch.minimum(x - length * (high - low) * gradient.sign(), high), low)
    return None


def _violation(wide: nn.Module, case: PropertyCase, x: Tensor) -> Tensor:
    """``(N,)``: how far the worst constraint is from holding."""
    outputs: Tensor = wide(x).flatten(1)
    if len(case.limit) == 0:
        return torch.zeros_like(outputs[:, 0])
    gaps: Tensor = outputs @ case.matrix.mT - case.limit
    return gaps.amax(1)
