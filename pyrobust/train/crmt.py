"""Certifiable robust multi-modal training (CRMT): margins of every modality, then their balance.

Classifiers of several modalities lean on one of them; attacking or losing that one breaks them.
Step 1 trains encoders and an orthogonal fusion head
(:class:`pyrobust.nn.OrthogonalFusion`) with a margin loss on each modality's own logits. Step 2
freezes everything but the fusion scales and raises the certified radius
(:func:`pyrobust.certify.multimodal_radius`).

Source: Z. Yang, Y. Wei, C. Liang, D. Hu, "Quantifying and Enhancing Multi-modal Robustness with
Modality Preference", ICLR 2024, arXiv 2402.06244, sections 4.2 and 4.3 (CRMT-JT, -AT, -Mix).
Departures: those of `multimodal_margin.py`; scales are kept >= 0;
Lipschitz constants are those of the modality's own logits; step 2 stops, and goes back to its best
scales, when validation accuracy falls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from pyrobust._checks import check_at_least, check_choice, check_integer, check_positive, check_unit
from pyrobust.certify.multimodal_radius import ModalityLipschitz, modality_lipschitz
from pyrobust.evaluate.multimodal_pgd import multimodal_pgd
from pyrobust.nn.orthogonal_fusion import LateFusion, OrthogonalFusion
from pyrobust.train.multimodal_margin import MultimodalMarginLoss, mixup_margin

__all__ = [
    "CRMTHistory",
    "crmt_integration_step",
    "fit_crmt",
]

Batch = tuple[Sequence[Tensor], Tensor]


@dataclass
class CRMTHistory:
    """What :func:`fit_crmt` saw.

    Attributes:
        loss: mean loss of each epoch of step 1.
        radius: mean objective of each epoch of step 2.
        accuracy: validation accuracy after step 1 and after each epoch of step 2; empty without
            validation data.
        stopped: whether step 2 ended early because accuracy fell.
    """

    loss: list[float] = field(default_factory=list)
    radius: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    stopped: bool = False


def crmt_integration_step(
    head: OrthogonalFusion,
    batches: Iterable[Batch],
    lipschitz: Tensor | ModalityLipschitz,
    *,
    lr: float,
    weight_decay: float = 1e-2,
    epochs: int = 1,
    momentum: float = 0.9,
    validate: Callable[[], float] | None = None,
    tolerance: float = 0.01,
) -> CRMTHistory:
    """Step 2: raise the mean radius by changing the fusion scales alone.

    The objective is the radius against the highest wrong class, with the sign it has, so that
    misclassified samples count too (section 4.3). Scales are kept ``>= 0``.

    Args:
        head: the fusion head; only its scales change, in place.
        batches: (features of each modality, labels); gone through once an epoch.
        lipschitz: ``(M, K)`` constants of ``h_m[k]``, ``> 0``, from before this step.
        lr: of SGD, ``> 0``.
        weight_decay: of the scales, ``>= 0``.
        epochs: passes, ``>= 1``.
        momentum: of SGD, in [0, 1].
        validate: returns an accuracy in [0, 1]; where it falls more than ``tolerance`` below its
            first value, the best scales so far are restored and the step ends.
        tolerance: accepted loss of accuracy, ``>= 0``.

    Returns:
        ``radius``, ``accuracy`` and ``stopped`` filled in.

    Raises:
        ValueError: an argument is out of range, or the constants have another shape.
    """
    subject = "crmt_integration_step"
    check_positive(subject, "lr", lr)
    check_at_least(subject, "weight_decay", weight_decay, 0.0)
    check_integer(subject, "epochs", epochs, 1)
    check_unit(subject, "momentum", momentum)
    check_at_least(subject, "tolerance", tolerance, 0.0)
    constants = lipschitz.per_class if isinstance(lipschitz, ModalityLipschitz) else lipschitz
    wanted = (len(head.in_features), head.num_classes)
    if constants.shape != wanted or not bool((constants > 0).all()):
        raise ValueError(
            f"{subject}: lipschitz must be {wanted} positive constants; got shape "
            f"{tuple(constants.shape)}, smallest {float(constants.min()):g}."
        )
    scales = list(head.scale.parameters())
    optimizer = torch.optim.SGD(scales, lr=lr, momentum=momentum, weight_decay=weight_decay)
    history = CRMTHistory(accuracy=[] if validate is None else [validate()])
    kept = [scale.detach().clone() for scale in scales]
    for _ in range(epochs):
        history.radius.append(_integration_epoch(head, batches, constants, optimizer, scales))
        if validate is None:
            continue
        history.accuracy.append(validate())
        if history.accuracy[-1] < history.accuracy[0] - tolerance:
            with torch.no_grad():
                for scale, value in zip(scales, kept, strict=True):
                    scale.copy_(value)
            history.stopped = True
            break
        kept = [scale.detach().clone() for scale in scales]
    return history


def fit_crmt(
    model: LateFusion,
    loader: Iterable[Batch],
    *,
    base: str = "joint",
    rho: float = 2.0,
    epochs: int = 140,
    lr: float = 1e-3,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    decay_every: int = 60,
    attack_eps: float = 0.1,
    attack_steps: int = 5,
    mix_alpha: float = 1.0,
    integration_epochs: int | None = None,
    integration_lr: float | None = None,
    lipschitz: str = "empirical",
    validation: Batch | None = None,
    tolerance: float = 0.01,
    seed: int = 0,
    progress: bool = False,
) -> CRMTHistory:
    """Both steps, in place; the model is left in evaluation mode.

    Args:
        model: encoders and fusion head.
        loader: batches of (inputs of each modality, labels); gone through once an epoch.
        base: ``"joint"`` (CRMT-JT), ``"adversarial"`` (CRMT-AT: inputs moved by joint l2 PGD) or
            ``"mixup"`` (CRMT-Mix).
        rho: weight of the margin term, ``>= 0``.
        epochs: of step 1, ``>= 1``.
        lr: of SGD in step 1; multiplied by 0.1 every ``decay_every`` epochs.
        momentum: of SGD, in [0, 1].
        weight_decay: of step 1.
        decay_every: epochs between decays, ``>= 1``.
        attack_eps: joint l2 radius of ``"adversarial"``.
        attack_steps: PGD steps of ``attack_eps / 5`` each.
        mix_alpha: mixing weights are drawn from Beta(``mix_alpha``, ``mix_alpha``).
        integration_epochs: of step 2; None takes ``epochs // 3``, 0 leaves step 2 out.
        integration_lr: of step 2; None takes ``0.03 lr``.
        lipschitz: constants of step 2, ``"empirical"`` or ``"spectral"``.
        validation: (inputs, labels) that guard step 2; strongly advised, since step 2 can collapse
            onto one modality.
        tolerance: loss of validation accuracy that step 2 may cost.
        seed: of mixing.
        progress: show a progress bar.

    Returns:
        Losses, radii and accuracies.

    Raises:
        ValueError: an argument is out of range, the loader is empty, or a batch has no labels.
        FloatingPointError: the loss is no longer finite.
    """
    subject = "fit_crmt"
    check_choice(subject, "base", base, ("joint", "adversarial", "mixup"))
    check_choice(subject, "lipschitz", lipschitz, ("empirical", "spectral"))
    check_integer(subject, "epochs", epochs, 1)
    check_integer(subject, "decay_every", decay_every, 1)
    check_positive(subject, "lr", lr)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, decay_every, gamma=0.1)
    objective = _objective(
        model, MultimodalMarginLoss(rho), base, attack_eps, attack_steps, mix_alpha, seed
    )
    history = CRMTHistory()
    for epoch in tqdm(range(epochs), desc=subject, disable=not progress):
        losses: list[float] = []
        for batch in loader:
            inputs, labels = _checked(subject, batch)
            model.train()
            loss = objective(inputs, labels)
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(
                    f"{subject}: the loss became {loss.item()} in epoch {epoch}, batch "
                    f"{len(losses)}."
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if not losses:
            raise ValueError(f"{subject}: loader must give at least one batch.")
        history.loss.append(sum(losses) / len(losses))
        schedule.step()
    model.eval()
    rounds = epochs // 3 if integration_epochs is None else integration_epochs
    if rounds > 0:
        constants = modality_lipschitz(model, loader, lipschitz)
        second = crmt_integration_step(
            model.head,
            _Features(model, loader),
            constants,
            lr=0.03 * lr if integration_lr is None else integration_lr,
            epochs=rounds,
            momentum=momentum,
            validate=None if validation is None else lambda: _accuracy(model, validation),
            tolerance=tolerance,
        )
        history.radius, history.accuracy = second.radius, second.accuracy
        history.stopped = second.stopped
    return history


def _checked(subject: str, batch: Any) -> Batch:
    """The batch, where it is a pair with labels."""
    if len(batch) != 2 or not isinstance(batch[1], Tensor):
        got = ", ".join(type(part).__name__ for part in batch)
        raise ValueError(f"{subject}: a batch must be (inputs, labels); got ({got}).")
    return batch[0], batch[1]


class _Features:
    """The loader's batches as features of the frozen encoders, made anew in each pass."""

    def __init__(self, model: LateFusion, loader: Iterable[Batch]) -> None:
        self.model, self.loader = model, loader

    def __iter__(self) -> Iterator[Batch]:
        for inputs, labels in self.loader:
            with torch.no_grad():
                features = self.model.features(*inputs)
            yield features, labels  # outside: a generator would leave gradients off at the yield


def _objective(
    model: LateFusion,
    criterion: MultimodalMarginLoss,
    base: str,
    eps: float,
    steps: int,
    mix_alpha: float,
    seed: int,
) -> Callable[[Sequence[Tensor], Tensor], Tensor]:
    """The loss of a batch under ``base``."""
    rng = torch.Generator().manual_seed(seed)

    def joint(inputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        loss: Tensor = criterion(model(*inputs), labels)
        return loss

    def adversarial(inputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        moved = multimodal_pgd(model, inputs, labels, eps=eps, steps=steps, step_size=eps / 5)
        return joint(moved, labels)

    def mixup(inputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        return _mixed_loss(model, inputs, labels, criterion, mix_alpha, rng)

    return {"joint": joint, "adversarial": adversarial, "mixup": mixup}[base]


def _integration_epoch(
    head: OrthogonalFusion,
    batches: Iterable[Batch],
    constants: Tensor,
    optimizer: torch.optim.Optimizer,
    scales: list[nn.Parameter],
) -> float:
    values = []
    for features, labels in batches:
        with torch.no_grad():
            each = head.modality_logits(*features)
        radius = _signed_radius(head, each, labels, constants.to(each[0]))
        gradients = torch.autograd.grad(-radius.mean(), scales)
        for scale, gradient in zip(scales, gradients, strict=True):
            scale.grad = gradient
        optimizer.step()
        with torch.no_grad():
            for scale in scales:
                scale.clamp_(min=0)
        values.append(float(radius.mean().detach()))
    if not values:
        raise ValueError("crmt_integration_step: batches must hold at least one batch.")
    return sum(values) / len(values)


def _signed_radius(
    head: OrthogonalFusion, each: list[Tensor], labels: Tensor, constants: Tensor
) -> Tensor:
    """``(B,)``: margin over the highest wrong class, in units of how fast it can change."""
    logits = head.fuse(each)
    own = logits.gather(1, labels[:, None])[:, 0]
    value, wrong = logits.scatter(1, labels[:, None], -torch.inf).max(1)
    rates = torch.stack(list(head.scale)).abs() * constants
    pair = rates[:, labels] + rates[:, wrong]
    return (own - value) / pair.square().sum(0).sqrt().clamp(min=1e-12)


def _mixed_loss(
    model: LateFusion,
    inputs: Sequence[Tensor],
    labels: Tensor,
    criterion: MultimodalMarginLoss,
    alpha: float,
    rng: torch.Generator,
) -> Tensor:
    """Cross-entropy and margin of inputs mixed with a permutation of the batch."""
    concentration = torch.tensor([alpha, alpha])
    share = float(torch._sample_dirichlet(concentration, generator=rng)[0])
    order = torch.randperm(len(labels), generator=rng).to(labels.device)
    other = labels[order]
    output = model(*(share * x + (1 - share) * x[order] for x in inputs))
    entropy = share * F.cross_entropy(output.logits, labels) + (1 - share) * F.cross_entropy(
        output.logits, other
    )
    return entropy + criterion.rho * mixup_margin(output.modality_logits, labels, other, share)


@torch.no_grad()
def _accuracy(model: LateFusion, data: Batch) -> float:
    inputs, labels = data
    return float((model(*inputs).logits.argmax(-1) == labels).double().mean())
