"""Weight matching (WM): reorder one network's hidden units so that two networks can be averaged.

Two networks trained from different seeds are usually separated by a loss barrier. Reordering
hidden units does not change what a network computes; the order that brings its weights closest to
the other's makes the straight line between them flat. Matching barely shortens the distance: it
aligns the singular vectors of large singular values (``evaluate.singular_alignment`` shows it).

Source: Ito, Yamada, Kumagai, "Analysis of Linear Mode Connectivity via Permutation-Based Weight
Matching", ICLR 2025, arXiv 2402.04051; the search is that of Ainsworth, Hayase, Srinivasa, "Git
Re-Basin", ICLR 2023, arXiv 2209.04836, section 3 and algorithms 1-3.
Departures: a step is taken only where the whole objective grows (it may otherwise fall when one
permutation stands on both sides of a matrix); progress is relative (1e-9), as weights are float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from tqdm.auto import tqdm

from pyrobust._checks import check_integer, check_positive
from pyrobust.weights._state import check_same_state, check_state_finite
from pyrobust.weights.batch_norm import has_batchnorm, reset_batchnorm
from pyrobust.weights.permutation import AxisRun, PermutationSpec, apply_permutation, permuted

__all__ = [
    "Matching",
    "average_states",
    "match_many",
    "merge_models",
    "ste_match",
    "weight_match",
]

_PROGRESS = 1e-9


@dataclass(frozen=True)
class Matching(Mapping[str, Tensor]):
    """Permutations found by a search; a mapping from permutation name to ``(units,)`` int64.

    Attributes:
        permutations: unit ``i`` of the matched model is unit ``permutations[name][i]`` of ``b``.
        objective: inner product of the two states after each sweep, the start first.
        converged: whether the last sweep made no progress.
    """

    permutations: dict[str, Tensor]
    objective: tuple[float, ...] = ()
    converged: bool = True

    def __getitem__(self, name: str) -> Tensor:
        return self.permutations[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.permutations)

    def __len__(self) -> int:
        return len(self.permutations)


def weight_match(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    spec: PermutationSpec,
    max_iter: int = 100,
    *,
    initial: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Matching:
    """The permutations of ``b`` that bring its weights closest to ``a`` (a local optimum).

    Coordinate descent: for each permutation, in random order, the others are held and the best
    one is found by linear assignment, until a sweep changes nothing.

    Args:
        a: state of the model that stays.
        b: state of the model to reorder; same names, shapes and dtypes.
        spec: how units tie the axes together.
        max_iter: sweeps at most, ``>= 1``.
        initial: where to start; None is the identity.
        seed: order of the permutations within each sweep.
        progress: show a progress bar.

    Returns:
        The permutations; apply them with :func:`apply_permutation`.

    Raises:
        TypeError: dtypes differ.
        ValueError: names or shapes differ, the spec does not fit, or weights are not finite.

    Example:
        >>> from pyrobust.weights import mlp_spec
        >>> a = {"0.weight": torch.eye(2), "1.weight": torch.tensor([[1.0, 3.0]])}
        >>> b = {"0.weight": torch.eye(2).flip(0), "1.weight": torch.tensor([[3.0, 1.0]])}
        >>> weight_match(a, b, mlp_spec(["0", "1"], sizes=[2], bias=False))["P_0"]
        tensor([1, 0])
    """
    check_integer("weight_match", "max_iter", max_iter, 1)
    check_pair("weight_match", a, b, spec)
    perm = {name: torch.arange(size) for name, size in spec.sizes.items()}
    if initial is not None:
        spec.check_permutations(initial, "weight_match")
        perm = {name: initial[name].cpu().clone() for name in perm}
    problem = _Problem(a, b, spec)
    generator = torch.Generator().manual_seed(seed)
    names, trace, converged = list(perm), [problem.value(perm)], False
    with tqdm(total=max_iter, desc="weight matching", disable=not progress) as bar:
        while not converged and len(trace) <= max_iter:
            gain = 0.0
            for i in torch.randperm(len(names), generator=generator).tolist():
                gain += problem.improve(names[i], perm)
            trace.append(trace[-1] + gain)
            converged = gain <= 0
            bar.update()
    return Matching(perm, tuple(trace), converged)


class _Problem:
    """Inner product of ``a`` with the permuted ``b``, and its optimum in one permutation."""

    def __init__(
        self, a: Mapping[str, Tensor], b: Mapping[str, Tensor], spec: PermutationSpec
    ) -> None:
        self.a = {name: value.detach() for name, value in a.items()}
        self.b = {name: value.detach() for name, value in b.items()}
        self.spec = spec
        self.places: dict[str, list[tuple[str, int, int, AxisRun]]] = {n: [] for n in spec.sizes}
        for name, axis, offset, run in spec.uses():
            if spec.matched(name) and self.a[name].is_floating_point():
                self.places[str(run.name)].append((name, axis, offset, run))

    def value(self, perm: Mapping[str, Tensor], names: Iterable[str] | None = None) -> float:
        total = 0.0
        for name in self.a if names is None else names:
            a = self.a[name]
            if self.spec.matched(name) and a.is_floating_point():
                moved = permuted(self.b[name], name, perm, self.spec)
                total += float((a.double() * moved.double()).sum())
        return total

    def cost(self, which: str, perm: Mapping[str, Tensor]) -> Tensor:
        """``(units, units)`` float64: the gain of putting unit j of ``b`` at place i."""
        size = self.spec.sizes[which]
        total = torch.zeros(size, size, dtype=torch.float64)
        for name, axis, offset, run in self.places[which]:
            other = permuted(self.b[name], name, perm, self.spec, skip_axis=axis)
            left = _unit_rows(self.a[name], axis, offset, run)
            right = _unit_rows(other, axis, offset, run)
            total += (left @ right.t()).double().cpu()
        return total

    def improve(self, which: str, perm: dict[str, Tensor]) -> float:
        """Replace one permutation by its optimum; the growth of the objective (0: kept)."""
        cost = self.cost(which, perm)
        best = torch.from_numpy(linear_sum_assignment(cost.numpy(), maximize=True)[1])
        rows = torch.arange(len(best))
        old = float(cost[rows, perm[which]].sum())
        gain = float(cost[rows, best].sum()) - old
        names = [place[0] for place in self.places[which]]
        if len(names) != len(set(names)):  # quadratic in this permutation: ask the objective itself
            tied = sorted(set(names))
            gain = self.value({**perm, which: best}, tied) - self.value(perm, tied)
        if gain <= _PROGRESS * max(1.0, abs(old)):
            return 0.0
        perm[which] = best
        return gain


def _unit_rows(value: Tensor, axis: int, offset: int, run: AxisRun) -> Tensor:
    part = value.narrow(axis, offset, run.length)
    part = part.unflatten(axis, (run.outer, run.units, run.inner))
    rows: Tensor = part.movedim(axis + 1, 0).flatten(1)
    return rows if rows.dtype == torch.float64 else rows.float()


def check_pair(
    subject: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor], spec: PermutationSpec
) -> None:
    """Raise ValueError where two states or the specification do not fit, or hold no numbers."""
    check_same_state(subject, a, b)
    spec.check(a, subject)
    check_state_finite(subject, a)
    check_state_finite(subject, b)


def average_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several states; integer entries are those of the first.

    Raises:
        TypeError: dtypes differ.
        ValueError: the list is empty, or names or shapes differ.
    """
    if not states:
        raise ValueError("average_states: states must hold at least one state; got 0.")
    for other in states[1:]:
        check_same_state("average_states", states[0], other)
    return {
        name: torch.stack([state[name].detach() for state in states]).mean(0)
        if value.is_floating_point()
        else value.detach().clone()
        for name, value in states[0].items()
    }


def match_many(
    models: Sequence[Mapping[str, Tensor]],
    spec: PermutationSpec,
    *,
    max_iter: int = 100,
    seed: int = 0,
) -> list[Matching]:
    """Permutations that bring several states to a common order (MergeMany, algorithm 3).

    In random order each state is matched to the mean of the others, until the summed distance no
    longer falls.

    Args:
        models: two or more states.
        spec: as for :func:`weight_match`.
        max_iter: rounds at most, ``>= 1``.
        seed: order of the states.

    Returns:
        One matching per state.

    Raises:
        ValueError: fewer than two states, or they do not fit together.
    """
    check_integer("match_many", "max_iter", max_iter, 1)
    if len(models) < 2:
        raise ValueError(f"match_many: models must hold at least two states; got {len(models)}.")
    generator = torch.Generator().manual_seed(seed)
    found = [Matching({n: torch.arange(s) for n, s in spec.sizes.items()}) for _ in models]
    moved = [dict(model) for model in models]
    for _ in range(max_iter):
        gain = 0.0
        for i in torch.randperm(len(models), generator=generator).tolist():
            target = average_states([state for j, state in enumerate(moved) if j != i])
            found[i] = weight_match(target, models[i], spec, initial=found[i], seed=seed)
            moved[i] = apply_permutation(models[i], found[i], spec)
            gain += found[i].objective[-1] - found[i].objective[0]
        if gain <= 0:
            break
    return found


def merge_models(
    model: nn.Module,
    states: Sequence[Mapping[str, Tensor]],
    *,
    loader: Iterable[Any] | None = None,
    reset_bn: bool = True,
) -> nn.Module:
    """Load the mean of (already matched) states into ``model`` and repair its batch norms.

    Args:
        model: of the states' architecture; changed in place.
        states: matched states.
        loader: training batches for the running statistics; needed where the model has any.
        reset_bn: False keeps the averaged statistics, which are those of no network.

    Returns:
        ``model``.

    Raises:
        ValueError: the model has batch norms and no loader is given.
    """
    check_loader("merge_models", model, loader, reset_bn)
    model.load_state_dict(average_states(states))
    if reset_bn and loader is not None:
        reset_batchnorm(model, loader)
    return model


def check_loader(subject: str, model: nn.Module, loader: Any, reset_bn: bool) -> None:
    """Raise ValueError where averaging needs data for batch norms and there is none."""
    if reset_bn and loader is None and has_batchnorm(model):
        raise ValueError(
            f"{subject}: loader must be given for a model with batch norms (or pass "
            "reset_bn=False, which keeps statistics that fit no network); got None."
        )


def ste_match(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    spec: PermutationSpec,
    *,
    init: Mapping[str, Tensor] | None = None,
    epochs: int = 1,
    lr: float = 1e-2,
    momentum: float = 0.9,
) -> Matching:
    """Search by the loss of the merged model with a straight-through gradient (algorithm 2).

    Kept for comparison: it lowers the barrier of a pair without aligning singular vectors, so
    models matched to a common anchor by it are not connected with each other.

    Args:
        model_a: stays; in evaluation mode.
        model_b: its units are matched.
        loader: ``(inputs, labels)`` batches, iterated ``epochs`` times.
        spec: as for :func:`weight_match`.
        init: state where the free weights start; None is ``model_a``. Starting at ``model_a`` with
            a small step returns what weight matching finds; a random start shows the contrast.
        epochs: passes over the loader, ``>= 1``.
        lr: step of SGD, ``> 0``.
        momentum: of SGD.

    Returns:
        The permutations with the lowest loss on a batch.

    Raises:
        ValueError: states and spec do not fit, or the loader is empty.
    """
    check_integer("ste_match", "epochs", epochs, 1)
    check_positive("ste_match", "lr", lr)
    a = {name: value.detach() for name, value in model_a.state_dict().items()}
    b = {name: value.detach() for name, value in model_b.state_dict().items()}
    check_pair("ste_match", a, b, spec)
    start = a if init is None else init
    check_same_state("ste_match", a, start)
    trained = {name for name, _ in model_a.named_parameters()}
    free = {n: v.detach().clone().requires_grad_(n in trained) for n, v in start.items()}
    optimizer = torch.optim.SGD([free[n] for n in sorted(trained)], lr=lr, momentum=momentum)
    best, lowest, matching = None, float("inf"), None
    for _ in range(epochs):
        for inputs, labels in loader:
            target = {name: value.detach() for name, value in free.items()}
            matching = weight_match(target, b, spec, initial=matching)
            moved = apply_permutation(b, matching, spec)
            merged = {
                # forward: the mean of a and the permuted b; backward: into the free weights
                name: (a[name] + moved[name] + free[name] - free[name].detach()) / 2
                if name in trained
                else a[name]
                for name in a
            }
            loss = F.cross_entropy(functional_call(model_a, merged, (inputs,)), labels)
            if loss.item() < lowest:
                best, lowest = matching, loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if best is None:
        raise ValueError("ste_match: the loader must yield at least one batch; got 0.")
    return best
