"""aTLAS: compose skills by learning one coefficient for each block of each task vector.

A few hundred coefficients are learned with any loss, from few data or without labels, where whole
fine-tuning would need many: one model for several tasks (addition), a task forgotten while a
control task stays (negation), few-shot learning and test-time adaptation with the task vectors of
other tasks. The composed model is :class:`AnisotropicComposition`. Of no use where the vectors'
tasks have nothing in common with the target.

Source: Zhang, Albert, Rodriguez-Opazo, van den Hengel, Abbasnejad, "Knowledge Composition using
Task Vectors with Learned Anisotropic Scaling", NeurIPS 2024, arXiv 2407.02880; the objectives are
those of its task addition, task negation, few-shot and test-time experiments.
Departures: the start (all coefficients zero) is a candidate of addition, few-shot and test-time
learning, so that the choice is never worse than the base on the data of the choice; trusted
samples are the most confident of each class (the published code trusts everybody, and its
sharpening has no effect; there is none here); image changes are given by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from pyrobust._checks import (
    check_choice,
    check_integer,
    check_open_unit,
    check_positive,
)
from pyrobust.weights.anisotropic_composition import AnisotropicComposition
from pyrobust.weights.coefficient_search import (
    CoefficientSearch,
    Fitting,
    Head,
    Loader,
    accuracy_of,
    run_epochs,
)

__all__ = [
    "NoFeasibleCoefficients",
    "adapt_few_shot",
    "learn_task_addition",
    "learn_task_negation",
    "select_blocks",
]


class NoFeasibleCoefficients(RuntimeError):
    """No epoch of negation kept the control accuracy; the coefficients are as before the call."""


def learn_task_addition(
    composition: AnisotropicComposition,
    heads: Sequence[Head],
    loaders: Sequence[Loader],
    *,
    selection: Sequence[Loader] | None = None,
    reference_accuracies: Sequence[float] | None = None,
    epochs: int = 20,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    clip: float | None = 1.0,
    penalty: tuple[int, float] | None = None,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> CoefficientSearch:
    """One model for several tasks: the sum of their cross-entropies over the coefficients.

    Args:
        composition: trained in place; ends with the coefficients of the best epoch.
        heads: for each task, features to class scores; frozen.
        loaders: for each task, ``(x, y)`` batches of validation data, iterated anew every epoch;
            an epoch ends with the shortest.
        selection: batches that judge the epochs; None is ``loaders``.
        reference_accuracies: accuracy of each task's own fine-tuned model, in (0, 1]; the score
            divides by it. None divides by 1.
        epochs: ``>= 1``.
        lr: of AdamW.
        weight_decay: of AdamW.
        clip: largest norm of the gradient; None does not clip.
        penalty: ``(p, weight)`` of :meth:`AnisotropicComposition.penalty`.
        autocast: mixed precision, such as ``torch.bfloat16``.
        progress: show a progress bar.

    Returns:
        ``score`` is the mean normalised accuracy; ``history`` has it, ``accuracy_i`` and ``loss``.

    Raises:
        ValueError: lists differ in length, an option is out of range, or a loader is empty.
        FloatingPointError: the loss is no longer finite.
    """
    subject = "learn_task_addition"
    judged = loaders if selection is None else selection
    whole = [1.0] * len(heads) if reference_accuracies is None else list(reference_accuracies)
    if not len(heads) == len(loaders) == len(judged) == len(whole) or not heads:
        raise ValueError(
            f"{subject}: heads, loaders, selection and reference_accuracies must have one entry "
            f"for each task; got {len(heads)}, {len(loaders)}, {len(judged)}, {len(whole)}."
        )
    for value in whole:
        check_positive(subject, "reference_accuracies", value)
    _check_options(subject, epochs, lr)
    options = {"lr": lr, "weight_decay": weight_decay, "clip": clip}
    fitting = Fitting(composition, **options, penalty=penalty, autocast=autocast)  # type: ignore[arg-type]

    def judge() -> dict[str, float]:
        seen = [accuracy_of(composition, h, d) for h, d in zip(heads, judged, strict=True)]
        share = [a / w for a, w in zip(seen, whole, strict=True)]
        figures = {f"accuracy_{i}": value for i, value in enumerate(seen)}
        return {**figures, "score": sum(share) / len(share)}

    def epoch() -> float:
        losses = []
        for batches in zip(*loaders, strict=False):

            def total(batches: tuple[Any, ...] = batches) -> Tensor:
                pairs = zip(heads, batches, strict=True)
                return torch.stack(
                    [F.cross_entropy(head(composition(x)), y) for head, (x, y) in pairs]
                ).sum()

            losses.append(fitting.step(total))
        return _mean(subject, losses)

    return run_epochs(fitting, epoch, judge, epochs, progress, "addition")


def learn_task_negation(
    composition: AnisotropicComposition,
    target: Loader,
    control: Loader,
    control_floor: float = 0.95,
    *,
    target_head: Head,
    control_head: Head,
    target_selection: Loader | None = None,
    control_selection: Loader | None = None,
    epochs: int = 10,
    lr: float = 1e-2,
    weight_decay: float = 0.1,
    clip: float | None = 1.0,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> CoefficientSearch:
    """Forget a target task and keep a control task: ``-CE_target + CE_control``.

    Training stops at the first epoch whose control accuracy is below ``control_floor`` times that
    of the start; of the epochs before it the one with the lowest target accuracy is chosen.

    Args:
        composition: trained in place.
        target: ``(x, y)`` batches to forget.
        control: ``(x, y)`` batches to keep; an epoch ends with the shorter of the two.
        control_floor: in (0, 1).
        target_head: features to scores of the target task.
        control_head: features to scores of the control task.
        target_selection: batches that judge the target accuracy; None is ``target``.
        control_selection: batches that judge the control accuracy; None is ``control``.
        epochs: at most, ``>= 1``.
        lr: of AdamW; the paper takes 2e-3 to 1e-2.
        weight_decay: of AdamW.
        clip: largest norm of the gradient; None does not clip.
        autocast: mixed precision.
        progress: show a progress bar.

    Returns:
        ``score`` is the target accuracy (low is good); ``history`` has ``target``, ``control`` and
        ``loss`` of every epoch, the one that broke the floor included.

    Raises:
        NoFeasibleCoefficients: the first epoch broke the floor already; coefficients are restored.
        ValueError: an option is out of range, or a loader is empty.
    """
    subject = "learn_task_negation"
    check_open_unit(subject, "control_floor", control_floor)
    _check_options(subject, epochs, lr)
    options = {"lr": lr, "weight_decay": weight_decay, "clip": clip}
    fitting = Fitting(composition, **options, autocast=autocast)  # type: ignore[arg-type]
    judged = target_selection or target, control_selection or control

    def judge() -> dict[str, float]:
        forgotten = accuracy_of(composition, target_head, judged[0])
        return {
            "target": forgotten,
            "control": accuracy_of(composition, control_head, judged[1]),
        }

    def epoch() -> float:
        losses = []
        for (x, y), (u, v) in zip(target, control, strict=False):

            def loss(batch: tuple[Tensor, ...] = (x, y, u, v)) -> Tensor:
                away = F.cross_entropy(target_head(composition(batch[0])), batch[1])
                return F.cross_entropy(control_head(composition(batch[2])), batch[3]) - away

            losses.append(fitting.step(loss))
        return _mean(subject, losses)

    history = [judge()]
    floor = control_floor * history[0]["control"]
    best, lowest = 0, math.inf
    for number in tqdm(range(1, epochs + 1), "negation", disable=not progress, unit="epoch"):
        loss = epoch()
        history.append({**judge(), "loss": loss})
        if history[-1]["control"] < floor:
            break
        if history[-1]["target"] < lowest:
            best, lowest = number, history[-1]["target"]
            fitting.keep()
    fitting.restore()
    if best == 0:
        raise NoFeasibleCoefficients(
            f"{subject}: control accuracy must stay at {floor:.4f} or more; the first epoch gave "
            f"{history[-1]['control']:.4f}: lower lr or clip."
        )
    return CoefficientSearch(best, lowest, tuple(history))


def adapt_few_shot(
    composition: AnisotropicComposition,
    head: Head,
    loader: Sequence[tuple[Tensor, Tensor]],
    *,
    selection: Loader | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    epochs: int = 10,
    fewest_batches: int = 10,
    lr: float = 0.1,
    weight_decay: float = 0.1,
    clip: float | None = 1.0,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> CoefficientSearch:
    """Learn a task from few labelled samples with the task vectors of other tasks.

    Leave the target's own vector out of the pool (:meth:`AnisotropicComposition.without`).

    Args:
        composition: trained in place.
        head: features to scores; frozen.
        loader: list of ``(x, y)`` batches; shorter ones are repeated within an epoch,
            ``int(fewest_batches / len) + 1`` times.
        selection: ``(x, y)`` batches that choose the epoch; None is ``loader``.
        augment: changes a batch of inputs in training.
        epochs: ``>= 1``; the rate falls to 0 along a cosine over all steps.
        fewest_batches: see ``loader``, ``>= 1``.
        lr: of AdamW at the start.
        weight_decay: of AdamW.
        clip: largest norm of the gradient; None does not clip.
        autocast: mixed precision.
        progress: show a progress bar.

    Returns:
        ``score`` is the accuracy on ``selection``; ``history`` has it and ``loss``.

    Raises:
        ValueError: an option is out of range, or the loader is empty.
    """
    subject = "adapt_few_shot"
    _check_options(subject, epochs, lr)
    check_integer(subject, "fewest_batches", fewest_batches, 1)
    batches = list(loader)
    if not batches:
        raise ValueError(f"{subject}: loader must hold at least one batch; got 0.")
    if len(batches) < fewest_batches:
        batches = batches * (fewest_batches // len(batches) + 1)
    options = {"lr": lr, "weight_decay": weight_decay, "clip": clip}
    fitting = Fitting(composition, **options, autocast=autocast)  # type: ignore[arg-type]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(fitting.optimizer, epochs * len(batches))

    def epoch() -> float:
        losses = []
        for x, y in batches:
            seen = x if augment is None else augment(x)

            def loss(seen: Tensor = seen, y: Tensor = y) -> Tensor:
                return F.cross_entropy(head(composition(seen)), y)

            losses.append(fitting.step(loss))
            schedule.step()
        return _mean(subject, losses)

    judged = loader if selection is None else selection
    return run_epochs(
        fitting,
        epoch,
        lambda: {"score": accuracy_of(composition, head, judged)},
        epochs,
        progress,
        "few-shot",
    )


def select_blocks(
    composition: AnisotropicComposition,
    loss_fn: Callable[..., Tensor],
    budget: int,
    strategy: str = "gradient",
    *,
    batches: Iterable[Any] | None = None,
    seed: int = 0,
) -> AnisotropicComposition:
    """Keep ``budget`` vectors for each block, so that training needs the memory of so many only.

    Args:
        composition: its coefficients should be zero; they are not changed.
        loss_fn: ``loss_fn(composition)``, or ``loss_fn(composition, batch)`` for each batch.
        budget: vectors for each block, 1 to all.
        strategy: ``"gradient"`` keeps the largest absolute derivatives of the summed loss by the
            coefficients (over the parts of a matrix their norm), ``"random"`` any.
        batches: the few-shot data, passed over once.
        seed: of the random strategy.

    Returns:
        A restricted composition (:meth:`AnisotropicComposition.restrict`) with zero coefficients.

    Raises:
        ValueError: ``budget`` is out of range, or the composition has one coefficient a vector.
    """
    subject = "select_blocks"
    check_choice(subject, "strategy", strategy, ("gradient", "random"))
    check_integer(subject, "budget", budget, 1)
    rows, columns = composition.members.shape
    if budget > rows or composition.granularity == "vector":
        raise ValueError(
            f"{subject}: budget must be at most {rows} and the composition must have coefficients "
            f"for blocks; got {budget} and granularity '{composition.granularity}'."
        )
    if strategy == "random":
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(rows, columns, generator=generator).argsort(0)[:budget]
        return composition.restrict(
            composition.members.gather(0, order.to(composition.members.device))
        )
    total = torch.zeros_like(composition.coefficients)
    for batch in [None] if batches is None else batches:
        loss = loss_fn(composition) if batches is None else loss_fn(composition, batch)
        total += torch.autograd.grad(loss, composition.coefficients)[0]
    strength = total.abs() if total.ndim == 2 else total.norm(dim=2)
    chosen = strength.topk(budget, dim=0).indices.sort(0).values
    return composition.restrict(composition.members.gather(0, chosen))


def _check_options(subject: str, epochs: int, lr: float) -> None:
    check_integer(subject, "epochs", epochs, 1)
    check_positive(subject, "lr", lr)


def _mean(subject: str, losses: list[float]) -> float:
    if not losses:
        raise ValueError(f"{subject}: loaders must yield at least one batch; got 0.")
    return sum(losses) / len(losses)
