"""allocate_bits: how many bits each layer should have, within a budget.

Each layer gets a cost for each number of bits; the least total within the budget is found exactly
(a multiple-choice knapsack over its Pareto front) or greedily.

Source: Yvinec, Dapogny, Bailly, "Gradient-based post-training quantization: challenging the status
quo", 2023, arXiv 2308.07662 (importance-based mixed precision). Departures: which importance the
paper uses is not known to us; the three here are the common ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust._checks import check_choice, check_eval_mode, check_instance, check_integer
from pyrobust.quantize.calibration import Call, read_calibration
from pyrobust.quantize.call_rows import batch_size, rows_of
from pyrobust.quantize.hessian import CONVOLUTIONS
from pyrobust.quantize.rounding_grid import GRID_BITS, search_grid
from pyrobust.quantize.sensitivity import sensitivity

__all__ = ["IMPORTANCES", "allocate_bits", "bit_costs", "knapsack"]

IMPORTANCES = ("fisher", "attribution", "weight-mse")
_FRONT = 1 << 21


def allocate_bits(
    model: nn.Module,
    calibration: Any,
    budget: float,
    choices: Sequence[int] = (2, 3, 4, 8),
    importance: str = "fisher",
    *,
    skip: Iterable[str] = (),
    method: str = "exact",
    samples: int = 256,
    progress: bool = False,
) -> dict[str, int]:
    """The bits of each linear layer and convolution, for ``bits_for`` of :func:`pyrobust.pack`.

    Args:
        model: in evaluation mode, giving logits; it is left as it was.
        calibration: batches of inputs, as for :func:`pyrobust.pack`; not used by ``"weight-mse"``,
            which accepts None.
        budget: mean bits per weight, not exceeded.
        choices: bits to choose from: 2, 3, 4 and 8, which are those that can be packed
            (:func:`bit_costs` takes 5, 6 and 7 too).
        importance: as for :func:`bit_costs`.
        skip: names of layers to leave out.
        method: ``"exact"``, or ``"greedy"`` by gain per bit.
        samples: as for :func:`bit_costs`.
        progress: show a progress bar.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the budget is below the smallest choice, a choice cannot be packed, a name in
            ``skip`` is no layer, or calibration data are missing or bad.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> bits = allocate_bits(net, None, 3.0, importance="weight-mse")
        >>> sum(bits[n] * net[int(n)].weight.numel() for n in bits) <= 3.0 * 80
        True
    """
    for bits in choices:
        check_choice("allocate_bits", "each of choices", bits, GRID_BITS)
    costs = bit_costs(
        model, calibration, choices, importance, skip=skip, samples=samples, progress=progress
    )
    modules: dict[str, Any] = dict(model.named_modules())
    sizes = {name: modules[name].weight.numel() for name in costs}
    return knapsack(costs, sizes, budget, method=method)


def bit_costs(
    model: nn.Module,
    calibration: Any,
    choices: Sequence[int] = (2, 3, 4, 8),
    importance: str = "fisher",
    *,
    skip: Iterable[str] = (),
    samples: int = 256,
    progress: bool = False,
) -> dict[str, dict[int, float]]:
    """What each number of bits costs each linear layer and convolution, by name.

    Args:
        model: as for :func:`allocate_bits`.
        calibration: as for :func:`allocate_bits`.
        choices: bits from 2 to 8.
        importance: ``"fisher"``: ``sum E[g^2] dW^2`` with gradients ``g`` of single inputs' cross-
            entropy against the model's own predictions and ``dW`` of rounding to nearest per
            channel; ``"attribution"``: ``4^-bits sum E|w g|``; ``"weight-mse"``: ``sum dW^2``.
        skip: names of layers to leave out.
        samples: inputs to take gradients on, at most.
        progress: show a progress bar.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: as for :func:`allocate_bits`.
    """
    subject = "bit_costs"
    check_instance(subject, "model", model, nn.Module)
    check_choice(subject, "importance", importance, IMPORTANCES)
    check_integer(subject, "samples", samples, 1)
    choices = _checked_choices(subject, choices)
    layers = _layers(subject, model, (skip,) if isinstance(skip, str) else tuple(skip))
    scores: dict[str, Any] = {}
    if importance != "weight-mse":
        check_eval_mode(subject, model)
        batches = _single_inputs(read_calibration(subject, calibration, model), samples)
        kind = "fisher" if importance == "fisher" else "grad*weight"
        scores = sensitivity(
            model, batches, kind, layers=list(layers), loss=_own_loss, progress=progress
        )
    table = {}
    for name, layer in layers.items():
        weight = layer.weight.detach().float().flatten(1)
        if importance == "attribution":
            total = float(scores[name].sum())
            table[name] = {bits: total * 4.0**-bits for bits in choices}
            continue
        table[name] = {}
        for bits in choices:
            grid = search_grid(weight, bits=bits, group_size=weight.shape[1])
            change = (grid.values(grid.nearest(weight)) - weight).square()
            if importance == "fisher":
                change = change * scores[name].flatten(1)
            table[name][bits] = float(change.sum(dtype=torch.float64))
    return table


def knapsack(
    costs: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, int],
    budget: float,
    *,
    method: str = "exact",
) -> dict[str, int]:
    """The choice of each item with the least total cost and at most ``budget`` mean bits.

    Args:
        costs: for each item, the cost of each number of bits.
        sizes: weights of each item.
        budget: mean bits per weight.
        method: ``"exact"`` or ``"greedy"``.

    Raises:
        ValueError: no choice meets the budget, or an exact search would need more than two million
            combinations at once (many layers of unrelated sizes).

    Example:
        >>> knapsack({"a": {2: 9.0, 4: 1.0}, "b": {2: 5.0, 4: 4.0}}, {"a": 10, "b": 10}, 3.0)
        {'a': 4, 'b': 2}
    """
    check_choice("knapsack", "method", method, ("exact", "greedy"))
    total = sum(sizes[name] for name in costs)
    smallest = sum(min(costs[name]) * sizes[name] for name in costs)
    room = int(np.floor(budget * total + 1e-9)) if np.isfinite(budget) else -1
    if not costs or smallest > room:
        least = smallest / total if total else float("nan")
        raise ValueError(
            f"knapsack: budget must be at least the smallest choice, {least:g} bits; got {budget}."
        )
    return (_exact if method == "exact" else _greedy)(costs, sizes, room)


def _exact(
    costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], room: int
) -> dict[str, int]:
    """Layer by layer, all totals that no other beats in both size and cost."""
    rest = sum(min(costs[name]) * sizes[name] for name in costs)
    size, cost = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[str, list[int], np.ndarray, np.ndarray]] = []
    for name, table in costs.items():
        rest -= min(table) * sizes[name]
        bits = sorted(table)
        sums = size[:, None] + np.array([b * sizes[name] for b in bits])
        totals = cost[:, None] + np.array([table[b] for b in bits])
        back, pick = np.divmod(np.arange(sums.size), len(bits))
        fits = sums.ravel() + rest <= room
        sums, totals, back, pick = (
            each[fits] for each in (sums.ravel(), totals.ravel(), back, pick)
        )
        order = np.lexsort((totals, sums))
        sums, totals, back, pick = (each[order] for each in (sums, totals, back, pick))
        before = np.concatenate([[np.inf], np.minimum.accumulate(totals)[:-1]])
        kept = totals < before
        size, cost = sums[kept], totals[kept]
        trail.append((name, bits, back[kept], pick[kept]))
        if len(size) > _FRONT:
            raise ValueError(
                f"knapsack: method must be 'greedy' for {len(costs)} layers of such sizes; got "
                "'exact'."
            )
    at, chosen = int(cost.argmin()), {}
    for name, bits, back, pick in reversed(trail):
        chosen[name] = bits[int(pick[at])]
        at = int(back[at])
    return {name: chosen[name] for name in costs}


def _greedy(
    costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], room: int
) -> dict[str, int]:
    """From the smallest choices up, always the change with the largest gain per bit."""
    chosen = {name: min(table) for name, table in costs.items()}
    left = room - sum(bits * sizes[name] for name, bits in chosen.items())
    while True:
        best: tuple[float, str, int] | None = None
        for name, table in costs.items():
            for bits in table:
                extra = (bits - chosen[name]) * sizes[name]
                gain = table[chosen[name]] - table[bits]
                if 0 < extra <= left and gain > 0 and (best is None or gain / extra > best[0]):
                    best = (gain / extra, name, bits)
        if best is None:
            return chosen
        _, name, bits = best
        left -= (bits - chosen[name]) * sizes[name]
        chosen[name] = bits


def _checked_choices(subject: str, choices: Sequence[int]) -> list[int]:
    listed = sorted(set(choices))
    wrong = [bits for bits in listed if isinstance(bits, bool) or bits not in range(2, 9)]
    if not listed or wrong:
        raise ValueError(
            f"{subject}: choices must be bits from 2 to 8, at least one; got {list(choices)}."
        )
    return listed


def _layers(subject: str, model: nn.Module, skip: tuple[str, ...]) -> dict[str, Any]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS))}
    for name in skip:
        if name not in found:
            raise ValueError(f"{subject}: skip must name layers of the model; got {name!r}.")
    owners: set[int] = set()
    layers = {}
    for name, layer in found.items():
        if name not in skip and id(layer.weight) not in owners:
            owners.add(id(layer.weight))
            layers[name] = layer
    if not layers:
        raise ValueError(
            f"{subject}: model must have a Linear, Conv1d or Conv2d layer; it has none."
        )
    return layers


def _single_inputs(calls: list[Call], samples: int) -> list[Call]:
    singles: list[Call] = []
    for call in calls:
        for row in range(batch_size(call)):
            if len(singles) == samples:
                return singles
            singles.append(rows_of(call, torch.tensor([row])))
    return singles


def _own_loss(model: nn.Module, call: Call) -> Tensor:
    """Cross-entropy against the model's own predictions."""
    output = call.on(model)
    logits = getattr(output, "logits", output)
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, flat.detach().argmax(-1))
