"""RiFT: recover clean accuracy of a robust network by fine-tuning one non-critical module.

Adversarial training leaves layers that matter little for robustness
(:func:`module_robust_criticality`). RiFT fine-tunes one of them on clean data and walks the
straight line back towards the robust weights, to the best clean accuracy that keeps the robust
accuracy. A post-processing step for any robust checkpoint; what it keeps is measured by the attack
given, not proven.

Source: Zhu, Hu, Wang, Xie, Yang, "Improving Generalization of Adversarial Training via Robust
Critical Fine-Tuning", ICCV 2023, arXiv 2308.02533, section 3.
Departures: running statistics are frozen by default (the published code lets them drift;
``freeze_norm_stats=False`` does, and interpolates them); perturbations are projected after every
step; ``"auto"`` leaves the first and the last layer out; adversarial sets are made from the data
that the caller gives, never from test data by default.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from tqdm.auto import tqdm

from pyrobust._checks import check_at_least, check_integer, check_positive, require_extra
from pyrobust.train.robust_criticality import (
    Criticality,
    criticality_modules,
    module_robust_criticality,
)
from pyrobust.weights._state import shorten
from pyrobust.weights.interpolate import interpolate

__all__ = ["RiFTResult", "adversarial_batches", "pgd_runs", "robust_critical_finetune"]

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
Loader = Iterable[tuple[Tensor, Tensor]]

_SUBJECT = "robust_critical_finetune"


@dataclass(frozen=True)
class RiFTResult:
    """A fine-tuned network and the line it was chosen from.

    Attributes:
        model: in evaluation mode; differs from the robust model in ``module`` only (and in float
            buffers where statistics were not frozen).
        module: the tuned layer.
        alpha: the place on the line, 0 the robust weights and 1 the fine-tuned ones.
        curve: for each place ``(alpha, clean, robust)``, accuracies on the selection data.
        criticality: the table that ``"auto"`` chose by; empty where a module was named.
    """

    model: nn.Module
    module: str
    alpha: float
    curve: tuple[tuple[float, float, float], ...]
    criticality: Mapping[str, Criticality]

    def summary(self) -> str:
        """The line as a table; the chosen place is marked."""
        rows = [f"module {self.module}", f"{'alpha':>6} {'clean':>7} {'robust':>7}"]
        for alpha, clean, robust in self.curve:
            mark = " <" if alpha == self.alpha else ""
            rows.append(f"{alpha:6.2f} {clean:7.4f} {robust:7.4f}{mark}")
        return "\n".join(rows)

    def plot(self, ax: Any = None) -> Any:
        """Draw both accuracies over the line with matplotlib; returns the axes."""
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise require_extra("RiFTResult.plot", "matplotlib", "plot") from error
            ax = pyplot.subplots()[1]
        alphas, clean, robust = zip(*self.curve, strict=True)
        ax.plot(alphas, clean, label="clean")
        ax.plot(alphas, robust, label="robust")
        ax.axvline(self.alpha, linestyle=":")
        ax.set(xlabel=f"from robust (0) to fine-tuned (1) {self.module}", ylabel="accuracy")
        ax.legend()
        return ax


def pgd_runs(
    eps: float = 8 / 255,
    *,
    steps: int = 10,
    step_size: float | None = None,
    runs: int = 3,
    seed: int = 0,
    clamp: tuple[float, float] | None = (0.0, 1.0),
) -> list[Attack]:
    """Independent PGD attacks, whose worst case counts; the last point as training uses it.

    Args:
        eps: l-infinity radius, in units of the inputs.
        steps: of each run.
        step_size: None is ``eps / 4`` (2/255 at 8/255).
        runs: ``>= 1``; each has its own random start.
        seed: of the first run.
        clamp: range of valid inputs.
    """
    check_integer("pgd_runs", "runs", runs, 1)
    from pyrobust.evaluate.pgd import pgd

    size = eps / 4 if step_size is None else step_size

    def run(number: int) -> Attack:
        def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return pgd(
                model,
                x,
                y,
                eps=eps,
                steps=steps,
                step_size=size,
                clamp=clamp,
                keep="last",
                seed=seed + number,
            )

        return attack

    return [run(number) for number in range(runs)]


def adversarial_batches(
    model: nn.Module, loader: Loader, attack: Attack
) -> list[tuple[Tensor, Tensor]]:
    """The fixed adversarial set: ``attack(model, x, y)`` on every batch, in evaluation mode.

    Raises:
        ValueError: the loader is empty.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        found = [(attack(model, x, y).detach(), y) for x, y in loader]
    finally:
        for module, training in flags:
            module.training = training
    if not found:
        raise ValueError("adversarial_batches: loader must yield at least one batch; got 0.")
    return found


def robust_critical_finetune(
    model: nn.Module,
    train_loader: Loader,
    *,
    val_clean: Loader,
    val_attack: Attack | Sequence[Attack],
    module: str = "auto",
    criticality: Mapping[str, Criticality] | None = None,
    lr: float = 1e-3,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    epochs: int = 10,
    alphas: Iterable[float] | None = None,
    tolerance: float = 0.001,
    freeze_norm_stats: bool = True,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    progress: bool = False,
) -> RiFTResult:
    """Fine-tune one module on clean data and interpolate back to what keeps robustness.

    Args:
        model: robust classifier; not changed.
        train_loader: clean ``(x, y)`` batches, iterated anew every epoch (augmented as usual).
        val_clean: batches that choose epoch and place; not the test data.
        val_attack: ``attack(model, x, y)`` to adversarial inputs, or several, of which an input
            must survive all (:func:`pgd_runs` makes three).
        module: layer to tune, or ``"auto"`` for the least critical one, first and last layer left
            out. The rule is a guide, not a guarantee: compare the whole table.
        criticality: table for ``"auto"``; None computes it on ``val_clean`` under the first attack.
        lr: of SGD, times 0.1 after half of the epochs.
        momentum: of SGD.
        weight_decay: of SGD.
        epochs: ``>= 1``; the one with the best clean accuracy on ``val_clean`` is kept.
        alphas: places on the line, in [0, 1]; 0 is always among them. None is 0, 0.1, ..., 1.
        tolerance: robust accuracy that may be lost on ``val_clean``, ``>= 0``.
        freeze_norm_stats: keep the running statistics of norms.
        loss_fn: mean loss of ``(outputs, y)``.
        progress: show progress bars.

    Returns:
        The chosen network: on the selection data at least as accurate as ``model``, and robust up
        to ``tolerance``. Report it on held-out data.

    Raises:
        TypeError: the module's weight is not a floating-point parameter.
        ValueError: the module is unknown, no attack is given, a loader is empty, or an option is
            out of range.
    """
    check_positive(_SUBJECT, "lr", lr)
    check_integer(_SUBJECT, "epochs", epochs, 1)
    check_at_least(_SUBJECT, "tolerance", tolerance, 0.0)
    attacks = [val_attack] if callable(val_attack) else list(val_attack or [])
    if not attacks:
        raise ValueError(f"{_SUBJECT}: val_attack must hold at least one attack; got none.")
    places = _places(alphas)
    judged = list(val_clean)
    if not judged:
        raise ValueError(f"{_SUBJECT}: val_clean must yield at least one batch; got 0.")
    table: Mapping[str, Criticality] = {}
    if module == "auto":
        table = criticality or module_robust_criticality(
            model, adversarial_batches(model, judged, attacks[0]), progress=progress
        )
        module = _least_critical(table)
    criticality_modules(model, [module])
    tuned = _finetune(
        copy.deepcopy(model),
        module,
        train_loader,
        judged,
        epochs=epochs,
        lr=lr,
        momentum=momentum,
        decay=weight_decay,
        freeze=freeze_norm_stats,
        loss_fn=loss_fn,
        progress=progress,
    )
    probe = copy.deepcopy(model).eval()
    start = {n: v.clone() for n, v in probe.state_dict().items() if n in tuned}
    curve = []
    for alpha in tqdm(places, "line", disable=not progress):
        _load(probe, interpolate(start, tuned, alpha))
        curve.append((alpha, accuracy_on(probe, judged), accuracy_on(probe, judged, attacks)))
    floor = curve[0][2] - tolerance
    feasible = [row for row in curve if row[2] >= floor]
    best = max(feasible, key=lambda row: (row[1], -row[0]))
    _load(probe, interpolate(start, tuned, best[0]))
    return RiFTResult(probe, module, best[0], tuple(curve), dict(table))


def accuracy_on(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], attacks: Sequence[Attack] = ()
) -> float:
    """Share of inputs classified right, under all attacks where any are given."""
    right = count = 0
    for x, y in batches:
        survived = torch.ones(len(y), dtype=torch.bool, device=y.device)
        for points in [a(model, x, y) for a in attacks] or [x]:
            with torch.no_grad():
                survived &= model(points).argmax(1) == y
        right, count = right + int(survived.sum()), count + len(y)
    return right / count


def _places(alphas: Iterable[float] | None) -> list[float]:
    places = [i / 10 for i in range(11)] if alphas is None else sorted({0.0, *map(float, alphas)})
    if not all(0 <= alpha <= 1 for alpha in places):
        raise ValueError(f"{_SUBJECT}: alphas must lie in [0, 1]; got {places}.")
    return places


def _least_critical(table: Mapping[str, Criticality]) -> str:
    """The smallest loss rise, first (stem) and last layer (classifier) left out."""
    middle = list(table)[1:-1]
    if not middle:
        raise ValueError(
            f"{_SUBJECT}: module must be named for a model of fewer than three layers; the table "
            f"holds {shorten(table) or 'none'}."
        )
    return min(middle, key=lambda name: table[name].loss_rise)


def _finetune(
    tuned: nn.Module,
    module: str,
    train_loader: Loader,
    judged: Sequence[tuple[Tensor, Tensor]],
    *,
    epochs: int,
    lr: float,
    momentum: float,
    decay: float,
    freeze: bool,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    progress: bool,
) -> dict[str, Tensor]:
    """Train one layer of ``tuned``; the tensors of the best epoch that take part in the line."""
    layer = tuned.get_submodule(module)
    tuned.requires_grad_(False)
    layer.requires_grad_(True)
    names = {f"{module}.{name}" for name, _ in layer.named_parameters(recurse=False)}
    if not freeze:
        names |= {name for name, _ in tuned.named_buffers()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, epochs // 2)], 0.1)
    best: tuple[float, dict[str, Tensor]] | None = None
    for _ in tqdm(range(epochs), "fine-tune", disable=not progress, unit="epoch"):
        tuned.train()
        for part in tuned.modules():
            if freeze and isinstance(part, _NormBase):
                part.eval()
        steps = 0
        for x, y in train_loader:
            optimizer.zero_grad()
            loss_fn(tuned(x), y).backward()
            optimizer.step()
            steps += 1
        if steps == 0:
            raise ValueError(f"{_SUBJECT}: train_loader must yield at least one batch; got 0.")
        schedule.step()
        tuned.eval()
        clean = accuracy_on(tuned, judged)
        if best is None or clean > best[0]:
            state = tuned.state_dict()
            best = clean, {n: v.detach().clone() for n, v in state.items() if n in names}
    assert best is not None
    return best[1]


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
