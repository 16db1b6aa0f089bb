"""Module robust criticality (MRC): how much robustness hangs on each layer's weights.

For one module at a time, the worst perturbation of its weight within a small ball, relative to the
weight's own norm, is searched by gradient ascent on a fixed set of adversarial inputs. A layer
whose worst perturbation hardly raises the loss has capacity to spare. Part of ``train.rift``, where
the source stands.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from tqdm.auto import tqdm

from pyrobust._checks import (
    check_at_least,
    check_choice,
    check_finite,
    check_integer,
    check_positive,
)
from pyrobust._files import write_text
from pyrobust.weights._state import shorten
from pyrobust.weights.named_vector import state_checksum
from pyrobust.weights.packed_delta import PackedDelta, quantize_delta
from pyrobust.weights.task_vector import TaskVector

__all__ = ["Criticality", "criticality_modules", "module_robust_criticality"]

Batches = Sequence[tuple[Tensor, Tensor]]
LossFunction = Callable[[Tensor, Tensor], Tensor]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SUBJECT = "module_robust_criticality"


@dataclass(frozen=True)
class Criticality:
    """What the worst perturbation of one module does.

    Attributes:
        loss_rise: of the mean loss on the adversarial set, ``>= 0``.
        accuracy_drop: of the accuracy there, in [-1, 1], at the same perturbation.
        distance: of that perturbation, relative to the norm of the weight.
    """

    loss_rise: float
    accuracy_drop: float
    distance: float


def criticality_modules(model: nn.Module, modules: Sequence[str] | None = None) -> list[str]:
    """Names of the linear and convolution layers whose weights can be perturbed.

    Args:
        model: any module.
        modules: the names wanted; None is every such layer.

    Raises:
        TypeError: a named module's weight is not a floating-point parameter (a packed layer).
        ValueError: a name is unknown or has no weight, or nothing is left.

    Warns:
        UserWarning: the weight of a module is tied to another; perturbing it perturbs both.
    """
    found = dict(model.named_modules())
    candidates = [name for name, module in found.items() if isinstance(module, _LAYERS)]
    for name in candidates if modules is None else modules:
        if name not in found:
            raise ValueError(
                f"{_SUBJECT}: modules must be among {shorten(candidates)}; got '{name}'."
            )
        weight = getattr(found[name], "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            if any(True for _ in found[name].buffers()):
                raise TypeError(
                    f"{_SUBJECT}: '{name}' must have a floating-point weight parameter; a "
                    f"{type(found[name]).__name__} holds quantized codes or other buffers."
                )
            raise ValueError(
                f"{_SUBJECT}: '{name}' must have a weight parameter; "
                f"{type(found[name]).__name__} has none."
            )
        shared = [
            other
            for other, value in model.named_parameters(remove_duplicate=False)
            if value is weight and other != f"{name}.weight"
        ]
        if shared:
            warnings.warn(
                f"{_SUBJECT}: the weight of '{name}' is tied to {shorten(shared)}; perturbing it "
                "perturbs these too.",
                stacklevel=3,
            )
    wanted = candidates if modules is None else list(modules)
    if not wanted:
        raise ValueError(
            f"{_SUBJECT}: the model must hold a linear or convolution layer; got none."
        )
    return wanted


def module_robust_criticality(
    model: nn.Module,
    adv_batches: Iterable[tuple[Tensor, Tensor]],
    *,
    modules: Sequence[str] | None = None,
    epsilon: float = 0.1,
    lr: float = 1.0,
    epochs: int = 10,
    loss_fn: LossFunction = F.cross_entropy,
    project: str = "step",
    cache: str | Path | None = None,
    perturbations: dict[str, PackedDelta] | None = None,
    progress: bool = False,
) -> dict[str, Criticality]:
    """The worst rise of the loss over a ball around each module's weight.

    The search never writes into ``model``: it runs in evaluation mode with one weight replaced.

    Args:
        model: robust classifier.
        adv_batches: ``(x, y)`` adversarial inputs, made once on ``model`` itself
            (``adversarial_batches``); the same for all modules.
        modules: names of layers; None is every linear and convolution layer.
        epsilon: radius relative to the Frobenius norm of the weight, ``>= 0``.
        lr: of plain gradient ascent, ``> 0``.
        epochs: passes over the set for each module, ``>= 1``.
        loss_fn: mean loss of ``(outputs, y)``.
        project: ``"step"`` into the ball after every step, or ``"epoch"`` after every epoch only,
            as the published code does.
        cache: JSON file that keeps finished modules, so that a scan can be resumed; it belongs to
            these weights, inputs and options and is refused for others.
        perturbations: a dict that receives the worst perturbation of each module in 8 bits, to be
            put on with ``weights.Patcher``.
        progress: show a progress bar.

    Returns:
        For each module its :class:`Criticality`, in the order of the model.

    Raises:
        TypeError: a module has no floating-point weight.
        ValueError: a module is unknown, an option is out of range, the set is empty, or the cache
            belongs to another scan.
    """
    check_at_least(_SUBJECT, "epsilon", epsilon, 0.0)
    check_positive(_SUBJECT, "lr", lr)
    check_integer(_SUBJECT, "epochs", epochs, 1)
    check_choice(_SUBJECT, "project", project, ("step", "epoch"))
    names = criticality_modules(model, modules)
    batches = list(adv_batches)
    if not batches:
        raise ValueError(f"{_SUBJECT}: adv_batches must hold at least one batch; got 0.")
    for x, _ in batches:
        check_finite(_SUBJECT, "adv_batches", x)
    options = [epsilon, lr, epochs, project, getattr(loss_fn, "__name__", str(type(loss_fn)))]
    store = _Cache(cache, _fingerprint(model, batches, options))
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        base = _evaluate(model, batches, loss_fn, {})
        for name in tqdm(names, "criticality", disable=not progress, unit="module"):
            if name in store.rows and perturbations is None:
                continue
            search = _Ascent(model, f"{name}.weight", epsilon, lr, project)
            store.rows[name] = search.run(batches, loss_fn, epochs, base)
            store.write()
            if perturbations is not None:
                step = TaskVector.from_deltas({f"{name}.weight": search.worst})
                perturbations[name] = quantize_delta(step, 8, group_size=None)
    finally:
        for module, training in flags:
            module.training = training
    return {name: store.rows[name] for name in names}


class _Ascent:
    """Gradient ascent on one weight inside its ball."""

    def __init__(
        self, model: nn.Module, name: str, epsilon: float, lr: float, project: str
    ) -> None:
        self.model, self.name, self.lr, self.mode = model, name, lr, project
        self.start = model.get_parameter(name).detach()
        self.norm = float(self.start.double().norm())
        self.radius = epsilon * self.norm
        self.worst = torch.zeros_like(self.start)

    def run(
        self, batches: Batches, loss_fn: LossFunction, epochs: int, base: tuple[float, float]
    ) -> Criticality:
        best = Criticality(0.0, 0.0, 0.0)
        step = torch.zeros_like(self.start)
        for _ in range(epochs if self.radius > 0 else 0):
            for x, y in batches:
                weight = (self.start + step).requires_grad_(True)
                loss = loss_fn(functional_call(self.model, {self.name: weight}, (x,)), y)
                step = step + self.lr * torch.autograd.grad(loss, weight)[0]
                if self.mode == "step":
                    step = self._inside(step)
            step = self._inside(step)
            loss_now, accuracy = _evaluate(
                self.model, batches, loss_fn, {self.name: self.start + step}
            )
            if loss_now - base[0] > best.loss_rise:
                self.worst = step
                best = Criticality(
                    loss_now - base[0], base[1] - accuracy, float(step.double().norm()) / self.norm
                )
        return best

    def _inside(self, step: Tensor) -> Tensor:
        length = float(step.double().norm())
        return step * (self.radius / length) if length > self.radius else step


@torch.no_grad()
def _evaluate(
    model: nn.Module, batches: Batches, loss_fn: LossFunction, weights: Mapping[str, Tensor]
) -> tuple[float, float]:
    """Mean loss and accuracy (0 where the targets are no classes) over the set."""
    loss = right = 0.0
    count = 0
    for x, y in batches:
        out = functional_call(model, dict(weights), (x,))
        loss += float(loss_fn(out, y)) * len(x)
        if out.ndim == 2 and y.ndim == 1 and not y.is_floating_point():
            right += float((out.argmax(1) == y).sum())
        count += len(x)
    return loss / count, right / count


class _Cache:
    """Finished modules on disk."""

    def __init__(self, path: str | Path | None, key: str) -> None:
        self.path, self.key = None if path is None else Path(path), key
        self.rows: dict[str, Criticality] = {}
        if self.path is None or not self.path.exists():
            return
        saved = json.loads(self.path.read_text(encoding="utf-8"))
        if saved.get("key") != key:
            raise ValueError(
                f"{_SUBJECT}: cache must belong to the same weights, inputs and options; "
                f"{self.path} belongs to another scan."
            )
        self.rows = {name: Criticality(**row) for name, row in saved["modules"].items()}

    def write(self) -> None:
        if self.path is not None:
            rows = {name: asdict(row) for name, row in self.rows.items()}
            write_text(self.path, json.dumps({"key": self.key, "modules": rows}, indent=1))


def _fingerprint(model: nn.Module, batches: Batches, options: Sequence[object]) -> str:
    digest = hashlib.sha256(json.dumps(options).encode())
    digest.update(state_checksum(model.state_dict()).encode())
    for x, y in batches:
        digest.update(state_checksum({"x": x, "y": y}).encode())
    return digest.hexdigest()
