"""Which axes of which tensors move together when hidden units are reordered."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrobust.weights._state import check_names, shorten

__all__ = [
    "AxisRun",
    "PermutationSpec",
    "apply_permutation",
    "invert_permutation",
    "mlp_spec",
    "resnet_spec",
]

_BLOCK = re.compile(r"^(layer\d+)\.(\d+)\.(conv\d|bn\d|downsample\.\d)\.")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class AxisRun:
    """A stretch of one tensor axis, ordered ``(outer, units, inner)``; the units are permuted.

    Attributes:
        name: the permutation, or None for a stretch that stays in place.
        units: how many units the permutation reorders.
        inner: consecutive entries that belong to one unit: the pixels of a channel after a
            flatten, the width of an attention head, the channels of a convolution group.
        outer: how often the units repeat: 3 for a fused query-key-value projection.
    """

    name: str | None
    units: int
    inner: int = 1
    outer: int = 1

    @property
    def length(self) -> int:
        """Entries of the axis that the run covers."""
        return self.outer * self.units * self.inner


@dataclass(frozen=True)
class PermutationSpec:
    """Permutations of a model: for every tensor and axis, the runs it is made of.

    Attributes:
        axes: tensor name to one entry per axis: None (stays in place), the name of a permutation
            over the whole axis, or a tuple of :class:`AxisRun`.
        sizes: permutation name to its number of units.
        notes: permutations that were narrowed or given up while tracing, and why.

    Example:
        >>> spec = mlp_spec(["0", "2"], sizes=[8])
        >>> spec.axes["0.weight"], spec.axes["2.weight"]
        (('P_0', None), (None, 'P_0'))
    """

    axes: Mapping[str, tuple[str | tuple[AxisRun, ...] | None, ...]]
    sizes: Mapping[str, int]
    notes: tuple[str, ...] = field(default=())

    def runs(self, name: str, axis: int) -> tuple[AxisRun, ...]:
        """The runs of one axis; empty where it stays in place."""
        entry = self.axes[name][axis]
        if entry is None:
            return ()
        if isinstance(entry, str):
            return (AxisRun(entry, self.sizes[entry]),)
        return entry

    def uses(self) -> Iterator[tuple[str, int, int, AxisRun]]:
        """Every ``(tensor, axis, offset on that axis, run)`` that a permutation moves."""
        for name, axes in self.axes.items():
            for axis in range(len(axes)):
                offset = 0
                for run in self.runs(name, axis):
                    if run.name is not None:
                        yield name, axis, offset, run
                    offset += run.length

    def matched(self, name: str) -> bool:
        """Whether a tensor counts in the distance (running statistics only follow)."""
        return name.rpartition(".")[2] not in _STATISTICS

    def check(self, state: Mapping[str, Tensor], subject: str = "PermutationSpec") -> None:
        """Raise ValueError unless the spec covers exactly ``state`` and every size closes."""
        unknown = sorted({run.name for *_, run in self.uses() if run.name} - set(self.sizes))
        if unknown:
            raise ValueError(f"{subject}: the spec has no size for {shorten(unknown)}.")
        uncovered = [name for name in state if name not in self.axes]
        if uncovered:
            raise ValueError(
                f"{subject}: the spec must cover every tensor; not {shorten(uncovered)}."
            )
        check_names(subject, self.axes, state)
        for name, axes in self.axes.items():
            shape = tuple(state[name].shape)
            if len(axes) != len(shape):
                raise ValueError(
                    f"{subject}: the spec gives '{name}' {len(axes)} axes; its shape is {shape}."
                )
            for axis in range(len(axes)):
                self._check_axis(subject, name, axis, shape)

    def _check_axis(self, subject: str, name: str, axis: int, shape: tuple[int, ...]) -> None:
        runs = self.runs(name, axis)
        for run in runs:
            if run.name is not None and run.units != self.sizes[run.name]:
                raise ValueError(
                    f"{subject}: axis {axis} of '{name}' has {run.units} units of {run.name}, "
                    f"whose size is {self.sizes[run.name]}; the spec does not close."
                )
        length = sum(run.length for run in runs)
        if runs and length != shape[axis]:
            raise ValueError(
                f"{subject}: the spec covers {length} entries on axis {axis} of '{name}'; "
                f"its shape is {shape}; the spec does not close."
            )

    def check_permutations(self, perm: Mapping[str, Tensor], subject: str) -> None:
        """Raise ValueError unless ``perm`` holds one true permutation of each size."""
        check_names(subject, self.sizes, perm)
        for name, size in self.sizes.items():
            if not torch.equal(torch.sort(perm[name].cpu().long()).values, torch.arange(size)):
                raise ValueError(f"{subject}: '{name}' must be a permutation of 0..{size - 1}.")


def mlp_spec(layers: Sequence[str], *, sizes: Sequence[int], bias: bool = True) -> PermutationSpec:
    """The spec of a plain chain of linear layers.

    Args:
        layers: module names from input to output, e.g. ``["0", "2", "4"]``.
        sizes: hidden widths, one fewer than ``layers``.
        bias: whether every layer has a bias.

    Raises:
        ValueError: the lengths disagree.
    """
    if len(sizes) != len(layers) - 1 or not layers:
        raise ValueError(
            f"mlp_spec: sizes must have one entry fewer than layers; got {len(sizes)} "
            f"and {len(layers)}."
        )
    names = [f"P_{layer}" for layer in layers[:-1]]
    axes: dict[str, tuple[str | tuple[AxisRun, ...] | None, ...]] = {}
    ends = zip(layers, [*names, None], [None, *names], strict=True)
    for layer, after, before in ends:
        axes[f"{layer}.weight"] = (after, before)
        if bias:
            axes[f"{layer}.bias"] = (after,)
    return PermutationSpec(axes, dict(zip(names, sizes, strict=True)))


def resnet_spec(state: Mapping[str, Tensor]) -> PermutationSpec:
    """The spec of a ResNet with torchvision's (and timm's) names, read off its state dict.

    Stem ``conv1``/``bn1``, blocks ``layer<stage>.<block>`` with ``conv1..3``, ``bn1..3`` and
    ``downsample.0/1``, classifier ``fc``. All blocks of a stage share the permutation of their
    residual stream; for other names or grouped convolutions use :func:`trace_spec`.

    Args:
        state: of the model.

    Raises:
        ValueError: a name is not of this form, or a convolution is grouped.
    """
    sizes: dict[str, int] = {}
    axes: dict[str, tuple[str | tuple[AxisRun, ...] | None, ...]] = {}
    stream = entering = units = "P_stem"
    seen_block = ""
    for name, value in state.items():
        block = _BLOCK.match(name)
        if value.ndim == 0:
            axes[name] = ()
        elif name.startswith("fc."):
            axes[name] = (None, stream) if value.ndim == 2 else (None,)
        elif not block and name.split(".")[0] in ("conv1", "bn1"):
            axes[name] = (stream, None, None, None) if value.ndim == 4 else (stream,)
        elif block:
            place = f"{block[1]}.{block[2]}"
            if place != seen_block:
                entering, units, seen_block = stream, stream, place
                stream = _stream_after(state, place, block[1], stream)
            if value.ndim == 4:
                before = entering if block[3] == "downsample.0" else units
                units = _opened(state, place, block[3], stream)
                axes[name] = (units, before, None, None)
            else:
                axes[name] = (units,)
        else:
            raise ValueError(f"resnet_spec: '{name}' is not a name of a ResNet; use trace_spec.")
        for axis, entry in enumerate(axes[name]):
            if isinstance(entry, str):
                sizes.setdefault(entry, value.shape[axis])
    spec = PermutationSpec(axes, sizes)
    spec.check(state, "resnet_spec")
    return spec


def _stream_after(state: Mapping[str, Tensor], place: str, stage: str, stream: str) -> str:
    return f"P_{stage}" if f"{place}.downsample.0.weight" in state else stream


def _opened(state: Mapping[str, Tensor], place: str, layer: str, stream: str) -> str:
    """The permutation of a block's convolution: its own, or the stream's at the block's end."""
    if layer == "downsample.0":
        return stream
    number = int(layer.removeprefix("conv"))
    inner = f"{place}.conv{number + 1}.weight" in state
    return f"P_{place}.{layer}" if inner else stream


def apply_permutation(
    state: Mapping[str, Tensor],
    perm: Mapping[str, Tensor],
    spec: PermutationSpec,
) -> dict[str, Tensor]:
    """The state with its units reordered: new unit ``i`` is unit ``perm[i]`` of the old.

    The function the network computes does not change.

    Args:
        state: names to tensors, all of them covered by ``spec``.
        perm: permutation name to ``(units,)`` int64.
        spec: from :func:`trace_spec`, :func:`mlp_spec`, :func:`resnet_spec` or by hand.

    Returns:
        New tensors, same names.

    Raises:
        ValueError: spec, state and permutations do not fit together.
    """
    spec.check(state, "apply_permutation")
    spec.check_permutations(perm, "apply_permutation")
    return {name: permuted(value.detach(), name, perm, spec) for name, value in state.items()}


def invert_permutation(perm: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The permutations that undo ``perm``."""
    return {name: torch.argsort(index) for name, index in perm.items()}


def permuted(
    value: Tensor,
    name: str,
    perm: Mapping[str, Tensor],
    spec: PermutationSpec,
    *,
    skip_axis: int | None = None,
) -> Tensor:
    """One tensor with all axes but ``skip_axis`` permuted."""
    result = value.clone() if skip_axis is None else value
    for axis in range(value.ndim):
        runs = spec.runs(name, axis)
        if axis != skip_axis and any(run.name is not None for run in runs):
            result = result.index_select(axis, _index(runs, perm).to(value.device))
    return result


def _index(runs: tuple[AxisRun, ...], perm: Mapping[str, Tensor]) -> Tensor:
    parts, offset = [], 0
    for run in runs:
        places = torch.arange(run.length).reshape(run.outer, run.units, run.inner) + offset
        parts.append((places if run.name is None else places[:, perm[run.name].cpu()]).flatten())
        offset += run.length
    return torch.cat(parts)
