"""Activation matching: reorder one network's hidden units by what they answer on data.

The cheaper search beside :mod:`pyrobust.weights.weight_matching`: one pass over data gives the
correlation of every pair of units, and one assignment a permutation maximises it.

Source: Ainsworth, Hayase, Srinivasa, "Git Re-Basin", ICLR 2023, arXiv 2209.04836, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from pyrobust.weights.permutation import AxisRun, PermutationSpec
from pyrobust.weights.weight_matching import Matching, check_pair

__all__ = ["activation_match"]


@torch.no_grad()
def activation_match(
    model_a: nn.Module, model_b: nn.Module, loader: Iterable[Any], spec: PermutationSpec
) -> Matching:
    """Match units by the correlation of their activations on data (Git Re-Basin, section 3.1).

    Args:
        model_a: stays; in evaluation mode.
        model_b: its units are matched; in evaluation mode.
        loader: batches: a tensor, or a tuple or list whose first entry is the input.
        spec: as for :func:`weight_match`.

    Raises:
        ValueError: a permutation has no linear or convolution layer that opens it, or no data.
    """
    check_pair("activation_match", model_a.state_dict(), model_b.state_dict(), spec)
    sites = _sites(model_a, spec)
    moments = {module: _Moments() for modules in sites.values() for module, _ in modules}
    for batch in loader:
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        taps_a, taps_b = (_tap(model, moments, inputs) for model in (model_a, model_b))
        for module, moment in moments.items():
            moment.add(taps_a[module], taps_b[module])
    if not moments or any(m.count == 0 for m in moments.values()):
        raise ValueError("activation_match: the loader must yield at least one batch; got 0.")
    perm = {}
    for name, modules in sites.items():
        cost = torch.zeros(spec.sizes[name], spec.sizes[name], dtype=torch.float64)
        for module, run in modules:
            full = moments[module].correlation()
            shape = (run.outer, run.units, run.inner)
            blocks = full.unflatten(0, shape).unflatten(3, shape)
            cost += torch.einsum("oaiobi->ab", blocks)
        perm[name] = torch.from_numpy(linear_sum_assignment(cost.numpy(), maximize=True)[1])
    return Matching(perm)


class _Moments:
    """Streaming cross-correlation of the channels of two networks, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []

    def add(self, a: Tensor, b: Tensor) -> None:
        a, b = a.double(), b.double()
        new = [a.sum(0), b.sum(0), a.square().sum(0), b.square().sum(0), a.t() @ b]
        self.sums = [x + y for x, y in zip(self.sums, new, strict=True)] if self.count else new
        self.count += len(a)

    def correlation(self) -> Tensor:
        mean_a, mean_b, square_a, square_b, cross = (value / self.count for value in self.sums)
        deviation_a = (square_a - mean_a.square()).clamp_min(1e-12).sqrt()
        deviation_b = (square_b - mean_b.square()).clamp_min(1e-12).sqrt()
        return (cross - torch.outer(mean_a, mean_b)) / torch.outer(deviation_a, deviation_b)


def _sites(model: nn.Module, spec: PermutationSpec) -> dict[str, list[tuple[str, AxisRun]]]:
    """For each permutation the layers whose output channels it orders."""
    modules = dict(model.named_modules())
    sites: dict[str, list[tuple[str, AxisRun]]] = {name: [] for name in spec.sizes}
    for tensor, axis, _, run in spec.uses():
        owner, _, entry = tensor.rpartition(".")
        module = modules.get(owner)
        if (
            entry == "weight"
            and axis == 0
            and isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
        ):
            sites[str(run.name)].append((owner, run))
    missing = [name for name, found in sites.items() if not found]
    if missing:
        raise ValueError(f"activation_match: no layer opens the units of {', '.join(missing)}.")
    return sites


def _tap(model: nn.Module, names: Iterable[str], inputs: Tensor) -> dict[str, Tensor]:
    """Outputs of layers as ``(samples, channels)``."""
    taken: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def keep(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            dim = -1 if isinstance(module, nn.Linear) else 1
            taken[name] = output.detach().movedim(dim, -1).flatten(0, -2)

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return taken
