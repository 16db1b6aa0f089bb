"""How much a loss minds a change of each weight: gradients, curvature, or the weights themselves.

Scores of the same shape as the weights, to rank weights or layers by. Gradients are collected by
hooks that fire while the backward pass runs: each is turned into its score (and, with ``consume``,
into whatever is wanted of it) and freed at once, so that one pass holds one gradient, not all.

Source: the scores that published quantizers use: |g| of Shao et al. (GWQ), arXiv 2411.00850;
squared gradients (empirical Fisher information) and second moments of inputs as the diagonal of
layer-wise Hessians, LeCun et al., "Optimal Brain Damage", NeurIPS 1989.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pyrobust._checks import check_choice, check_eval_mode, check_instance, check_integer
from pyrobust.quantize.calibration import CalibrationError, named_errors

__all__ = ["SENSITIVITY_KINDS", "prediction_loss", "sensitivity"]

SENSITIVITY_KINDS = ("grad", "grad*weight", "fisher", "hessian-diag", "magnitude", "random")
"""The accepted scores."""

Loss = Callable[[nn.Module, Any], Tensor]
Change = Callable[[str, Tensor], Tensor]
_OF_GRADIENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grad": lambda grad, weight: grad.abs(),
    "grad*weight": lambda grad, weight: (grad * weight.float()).abs(),
    "fisher": lambda grad, weight: grad.square(),
}


def prediction_loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of what a model predicts, for the usual kinds of batches.

    Args:
        model: gives logits ``(..., classes)``, or an object with the attribute ``logits``.
        batch: token numbers ``(B, T)``, each position predicting the next; or a pair ``(inputs,
            targets)``; or a mapping of keyword arguments. Labels ``(B,)`` in a mapping are the
            classes of its rows; labels ``(B, T)`` (default: ``input_ids``) are tokens, each
            predicted by the position before. Targets of -100 do not count.

    Returns:
        A scalar in nats.

    Raises:
        ValueError: the batch or what the model returns is none of these: give a loss of your own.
    """
    if isinstance(batch, Mapping):
        targets = _targets_of(batch)
        if targets.ndim > 1:
            targets = targets[..., 1:]
        output = model(**{name: value for name, value in batch.items() if name != "labels"})
    elif isinstance(batch, Tensor):
        if batch.is_floating_point():
            raise _needs_own_loss(f"a tensor of {batch.dtype}, which is no token numbers")
        targets, output = batch[..., 1:], model(batch[..., :-1])
    else:
        inputs, targets = batch
        output = model(inputs)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim == 0:
        raise _needs_own_loss(f"a model that returns {type(output).__name__} instead of logits")
    if logits.shape[:-1] != targets.shape:  # the last position predicts nothing that is known
        logits = logits[..., :-1, :]
    if logits.shape[:-1] != targets.shape or targets.is_floating_point():
        raise _needs_own_loss(
            f"targets of {targets.dtype} and shape {tuple(targets.shape)} for logits of shape "
            f"{tuple(logits.shape)}"
        )
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).long())


def _targets_of(batch: Mapping[str, Any]) -> Tensor:
    found: Tensor | None = batch.get("labels", batch.get("input_ids"))
    if found is None:
        raise _needs_own_loss(f"a batch of {', '.join(batch)}, without labels or input_ids")
    return found


def _needs_own_loss(seen: str) -> CalibrationError:
    return CalibrationError(
        "prediction_loss: batches must be token numbers, pairs of inputs and targets, or mappings "
        f"with labels or input_ids; got {seen} (for others give loss=)."
    )


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any] | Tensor | None,
    kind: str = "grad",
    *,
    layers: Iterable[str] | None = None,
    loss: Loss = prediction_loss,
    change: Change | None = None,
    consume: Callable[[str, Tensor], Any] | None = None,
    layers_at_once: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Score every weight of some layers.

    Args:
        model: in evaluation mode; it is left as it was.
        batches: what ``loss`` takes, each for one backward pass; magnitudes are averaged over them,
            so that batches do not cancel. A tensor is split into batches of one row. None where
            ``kind`` needs no data.
        kind: ``"grad"``: mean ``|dL/dw|``; ``"grad*weight"``: mean ``|w dL/dw|``; ``"fisher"``:
            mean squared gradient; ``"hessian-diag"``: ``change^2`` times the mean square of the
            input that the weight multiplies (``torch.nn.Linear`` only); ``"magnitude"``: ``|w|``;
            ``"random"``: uniform in [0, 1).
        layers: names of modules with a ``weight``; None means every ``torch.nn.Linear``.
        loss: ``loss(model, batch)`` is a scalar.
        change: for ``"hessian-diag"``, the change of the weight ``(name, weight) -> tensor`` whose
            cost counts; None means its removal, ``-weight``.
        consume: called once with name and score as soon as the score is complete; its result
            stands in the place of the score, which is then freed.
        layers_at_once: with several batches, how many layers to score in one sweep over them; None
            means all. Fewer take less memory and more time.
        seed: of ``"random"``.
        progress: show a progress bar.

    Returns:
        By name, a float32 score of the weight's shape, or what ``consume`` made of it. Layers that
        share a weight share one score.

    Raises:
        ValueError: ``model`` is in training mode, a weight is frozen or an inference tensor, there
            are no batches, one does not fit the model, a loss is not finite, a layer never runs, or
            an argument is wrong.
        NotImplementedError: ``"hessian-diag"`` for another layer than ``torch.nn.Linear``.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)).eval()
        >>> sensitivity(model, torch.tensor([[0, 1, 2]]))["1"].shape
        torch.Size([5, 4])
    """
    check_instance("sensitivity", "model", model, nn.Module)
    check_choice("sensitivity", "kind", kind, SENSITIVITY_KINDS)
    if layers_at_once is not None:
        check_integer("sensitivity", "layers_at_once", layers_at_once, 1)
    modules = _chosen(model, layers)
    owners: dict[int, str] = {}
    aliases = {name: owners.setdefault(id(m.weight), name) for name, m in modules.items()}
    weights = {name: modules[name].weight for name in owners.values()}
    finish = consume or (lambda name, score: score)
    if kind == "magnitude":
        results = {name: finish(name, w.detach().float().abs()) for name, w in weights.items()}
    elif kind == "random":
        results = {name: finish(name, _random(name, w, seed)) for name, w in weights.items()}
    else:
        check_eval_mode("sensitivity", model)
        items = _as_list(batches)
        step = layers_at_once if layers_at_once and len(items) > 1 else len(weights)
        results = {}
        names = list(weights)
        sweeps = range(0, len(names), max(1, step))
        with tqdm(total=len(sweeps) * len(items), desc=kind, disable=not progress) as bar:
            for begin in sweeps:
                part = {name: weights[name] for name in names[begin : begin + step]}
                if kind == "hessian-diag":
                    linear = {name: modules[name] for name in part}
                    results |= _curvatures(model, linear, items, loss, change, finish, bar)
                else:
                    results |= _gradients(model, part, items, kind, loss, finish, bar)
    return {name: results[owner] for name, owner in aliases.items()}


# -- checks ------------------------------------------------------------------------------------


def _chosen(model: nn.Module, layers: Iterable[str] | None) -> dict[str, Any]:
    if layers is None:
        linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        if not linear:
            raise ValueError("sensitivity: model must have a torch.nn.Linear layer; it has none.")
        return linear
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = {}
    for name in layers:
        if not isinstance(getattr(modules.get(name), "weight", None), Tensor):
            raise ValueError(f"sensitivity: layers must name layers with a weight; got {name!r}.")
        chosen[name] = modules[name]
    return chosen


def _as_list(batches: Iterable[Any] | Tensor | None) -> list[Any]:
    items: list[Any] = []
    if isinstance(batches, Tensor):
        items = list(batches.split(1)) if batches.numel() else []
    elif batches is not None:
        items = list(batches)
    if not items:
        raise ValueError("sensitivity: batches must hold at least one batch; got none.")
    return items


def _finite_loss(model: nn.Module, batch: Any, loss: Loss, number: int) -> Tensor:
    with named_errors("sensitivity", model, number):
        value = loss(model, batch)
    if value.numel() != 1:
        raise ValueError(f"sensitivity: loss must be a scalar; got shape {tuple(value.shape)}.")
    if not bool(torch.isfinite(value)):
        first = _first_not_finite(model, batch, loss)
        where = "" if first is None else f" (the input of '{first}' is the first that is not)"
        raise ValueError(
            f"sensitivity: loss must be finite; it is {float(value.detach())} on batch {number}"
            f"{where}."
        )
    return value


def _first_not_finite(model: nn.Module, batch: Any, loss: Loss) -> str | None:
    """The first layer with parameters of its own that is given NaN or infinite values."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: Any) -> None:
            floats = (x for x in args if isinstance(x, Tensor) and x.is_floating_point())
            if not all(bool(torch.isfinite(x).all()) for x in floats):
                found.append(name)

        return see

    layers = {n: m for n, m in model.named_modules() if m._parameters}
    handles = [m.register_forward_pre_hook(watch(name)) for name, m in layers.items()]
    try:
        with torch.no_grad():
            loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _random(name: str, weight: Tensor, seed: int) -> Tensor:
    """Of each layer by itself, so that it does not matter which others are scored with it."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def _missing(names: list[str]) -> ValueError:
    return ValueError(
        f"sensitivity: every layer must run; the loss does not depend on {names[0]!r}."
    )


# -- scores from gradients ---------------------------------------------------------------------


def _gradients(
    model: nn.Module,
    weights: dict[str, Any],
    items: list[Any],
    kind: str,
    loss: Loss,
    finish: Callable[[str, Tensor], Any],
    bar: Any,
) -> dict[str, Any]:
    _check_trainable(weights)
    score_of = _OF_GRADIENT[kind]
    totals: dict[str, Tensor] = {}
    results: dict[str, Any] = {}
    seen: set[str] = set()

    def take(name: str, parameter: Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        if name in seen:  # only the sum over all uses has a meaning, and part of it is gone
            raise RuntimeError(
                f"sensitivity: the gradient of '{name}' arrived in parts; use "
                "checkpoint(..., use_reentrant=False)."
            )
        seen.add(name)
        assert grad is not None
        score = score_of(grad.float(), parameter.detach())
        if len(items) == 1:
            results[name] = finish(name, score)
        elif name in totals:
            totals[name] += score
        else:
            totals[name] = score

    parameters = list(model.parameters())
    before = [(p, p.requires_grad, p.grad) for p in parameters]
    targets = {id(weight) for weight in weights.values()}
    hooks = [
        weight.register_post_accumulate_grad_hook(lambda p, name=name: take(name, p))
        for name, weight in weights.items()
    ]
    try:
        for p in parameters:
            p.requires_grad_(id(p) in targets)
            p.grad = None
        for number, batch in enumerate(items):
            seen.clear()
            with torch.enable_grad():
                value = _finite_loss(model, batch, loss, number)
                if value.requires_grad:
                    value.backward()
            bar.update()
            if len(seen) < len(weights) and number == 0:
                raise _missing([name for name in weights if name not in seen])
    finally:
        for hook in hooks:
            hook.remove()
        for p, required, grad in before:
            p.requires_grad_(required)
            p.grad = grad
    for name in list(totals):
        results[name] = finish(name, totals.pop(name) / len(items))
    return results


def _check_trainable(weights: dict[str, Any]) -> None:
    for name, weight in weights.items():
        if torch.is_inference_mode_enabled() or weight.is_inference():
            raise ValueError(
                "sensitivity: model must allow gradients; "
                f"'{name}' runs or was made in inference mode."
            )
        if not (isinstance(weight, nn.Parameter) and weight.requires_grad):
            raise ValueError(
                f"sensitivity: model must allow gradients; the weight of '{name}' is frozen "
                "(model.requires_grad_())."
            )


# -- scores from inputs ------------------------------------------------------------------------


def _curvatures(
    model: nn.Module,
    modules: dict[str, Any],
    items: list[Any],
    loss: Loss,
    change: Change | None,
    finish: Callable[[str, Tensor], Any],
    bar: Any,
) -> dict[str, Any]:
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            raise NotImplementedError(
                f"sensitivity: 'hessian-diag' of a {type(module).__name__} ('{name}')."
            )
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}

    def add(module: Any, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
        key = id(module.weight)  # layers that share a weight share its inputs
        sums[key] = sums.get(key, 0.0) + rows.square().sum(0)
        counts[key] = counts.get(key, 0) + rows.shape[0]

    shared = {id(module.weight) for module in modules.values()}
    users = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) in shared]
    hooks = [module.register_forward_pre_hook(add) for module in users]
    try:
        with torch.no_grad():
            for number, batch in enumerate(items):
                _finite_loss(model, batch, loss, number)
                bar.update()
    finally:
        for hook in hooks:
            hook.remove()
    silent = [name for name, module in modules.items() if not counts.get(id(module.weight))]
    if silent:
        raise _missing(silent)
    results = {}
    for name, module in modules.items():
        weight = module.weight.detach().float()
        moved = weight if change is None else change(name, weight).to(weight.device, torch.float32)
        moment = sums[id(module.weight)] / counts[id(module.weight)]
        results[name] = finish(name, moved.square() * moment)
    return results
