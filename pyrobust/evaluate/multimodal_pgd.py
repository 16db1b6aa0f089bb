"""Projected gradient attack on several inputs at once, in one joint ball or on one modality.

Source: Z. Yang, Y. Wei, C. Liang, D. Hu, "Quantifying and Enhancing Multi-modal Robustness with
Modality Preference", ICLR 2024, arXiv 2402.06244, section 5 (PGD-l2, FGM, single modalities); A.
Madry et al., ICLR 2018, arXiv 1706.06083 (PGD).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pyrobust._checks import check_at_least, check_choice, check_integer

__all__ = ["multimodal_pgd"]


def multimodal_pgd(
    model: Callable[..., object],
    inputs: Sequence[Tensor],
    y: Tensor,
    *,
    eps: float,
    modalities: Sequence[int] | None = None,
    steps: int = 20,
    norm: float = 2,
    step_size: float | None = None,
    restarts: int = 1,
    clamp: tuple[float, float] | None = None,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """Perturb inputs to raise the cross-entropy of the fused logits.

    Args:
        model: called with all inputs; returns ``(B, K)`` logits or an object whose ``logits`` are.
            It is attacked in the mode it is in.
        inputs: ``(B, ...)`` float for each modality.
        y: ``(B,)`` int64 true classes.
        eps: radius, ``>= 0``: with ``norm=2`` of the joint l2 norm over all attacked modalities,
            with ``norm=inf`` of every element.
        modalities: which inputs to perturb; None for all.
        steps: gradient steps, ``>= 1``.
        norm: 2 or ``math.inf``.
        step_size: length of a step; None takes ``2.5 eps / steps``.
        restarts: tries, the first from the inputs themselves, later ones from random points of the
            ball; each sample keeps its first misclassified point, else its highest loss.
        clamp: lowest and highest value of an input; None for any.
        seed: of the random starts.

    Returns:
        The perturbed inputs, detached; untouched modalities as they came.

    Raises:
        ValueError: an argument is out of range or names no modality.
    """
    subject = "multimodal_pgd"
    check_at_least(subject, "eps", eps, 0.0)
    check_integer(subject, "steps", steps, 1)
    check_integer(subject, "restarts", restarts, 1)
    check_choice(subject, "norm", norm, (2, math.inf))
    chosen = list(range(len(inputs))) if modalities is None else list(modalities)
    if not chosen or any(not 0 <= m < len(inputs) for m in chosen):
        raise ValueError(
            f"{subject}: modalities must be among 0..{len(inputs) - 1}; got {modalities}."
        )
    length = 2.5 * eps / steps if step_size is None else step_size
    generator = torch.Generator().manual_seed(seed)
    best: list[Tensor] | None = None
    best_loss = torch.full((len(y),), -torch.inf, device=y.device)
    for attempt in range(restarts):
        deltas = [torch.zeros_like(inputs[m]) for m in chosen]
        if attempt > 0:
            deltas = _project([_noise(d, generator) for d in deltas], eps, norm, fill=True)
        for _ in range(steps):
            deltas = _step(model, inputs, y, chosen, deltas, length, norm)
            deltas = _inside(inputs, chosen, _project(deltas, eps, norm), clamp)
        loss = _objective(model, inputs, y, chosen, deltas)
        better = loss > best_loss
        best_loss = torch.where(better, loss, best_loss)
        best = (
            deltas
            if best is None
            else [torch.where(_like(better, d), d, b) for d, b in zip(deltas, best, strict=True)]
        )
    assert best is not None
    return tuple(_moved(inputs, chosen, best))


def _moved(inputs: Sequence[Tensor], chosen: list[int], deltas: Sequence[Tensor]) -> list[Tensor]:
    moved = list(inputs)
    for m, delta in zip(chosen, deltas, strict=True):
        moved[m] = inputs[m] + delta
    return moved


def _logits(model: Callable[..., object], inputs: Sequence[Tensor]) -> Tensor:
    output = model(*inputs)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            "multimodal_pgd: model must return logits or an object with logits; got "
            f"{type(output).__name__}."
        )
    return logits


@torch.no_grad()
def _objective(
    model: Callable[..., object],
    inputs: Sequence[Tensor],
    y: Tensor,
    chosen: list[int],
    deltas: Sequence[Tensor],
) -> Tensor:
    """``(B,)``: the loss, and infinity where the class is already wrong."""
    logits = _logits(model, _moved(inputs, chosen, deltas))
    loss = F.cross_entropy(logits, y, reduction="none")
    return torch.where(logits.argmax(-1) != y, torch.inf, loss)


def _step(
    model: Callable[..., object],
    inputs: Sequence[Tensor],
    y: Tensor,
    chosen: list[int],
    deltas: Sequence[Tensor],
    length: float,
    norm: float,
) -> list[Tensor]:
    leaves = [delta.detach().requires_grad_(True) for delta in deltas]
    with torch.enable_grad():
        loss = F.cross_entropy(_logits(model, _moved(inputs, chosen, leaves)), y, reduction="sum")
        gradients = torch.autograd.grad(loss, leaves)
    if norm == math.inf:
        return [d.detach() + length * g.sign() for d, g in zip(leaves, gradients, strict=True)]
    size = _joint_norm(gradients).clamp(min=1e-30)
    return [
        d.detach() + length * g / _like(size, g) for d, g in zip(leaves, gradients, strict=True)
    ]


def _project(deltas: list[Tensor], eps: float, norm: float, fill: bool = False) -> list[Tensor]:
    """Into the ball, or with ``fill`` onto its surface."""
    if norm == math.inf:
        return [(eps * d).clamp(-eps, eps) if fill else d.clamp(-eps, eps) for d in deltas]
    factor = eps / _joint_norm(deltas).clamp(min=1e-30)
    factor = factor if fill else factor.clamp(max=1)
    return [d * _like(factor, d) for d in deltas]


def _inside(
    inputs: Sequence[Tensor],
    chosen: list[int],
    deltas: list[Tensor],
    clamp: tuple[float, float] | None,
) -> list[Tensor]:
    if clamp is None:
        return deltas
    return [(inputs[m] + d).clamp(*clamp) - inputs[m] for m, d in zip(chosen, deltas, strict=True)]


def _joint_norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.flatten(1).square().sum(1) for t in tensors]).sum(0).sqrt()


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def _like(values: Tensor, tensor: Tensor) -> Tensor:
    return values.view(-1, *[1] * (tensor.ndim - 1)).to(tensor.device)
