"""What task vectors and packed ones share: adding to a model by names, in one pass over it."""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyrobust._checks import check_shape
from pyrobust.ops.add_packed import Addition, SavedCopy, Summand, add_all_
from pyrobust.weights._state import check_names, check_no_ties, shorten

__all__ = ["Change", "NamedVector", "check_scales", "find_targets", "state_checksum"]


def state_checksum(state: Mapping[str, Tensor], names: Iterable[str] | None = None) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the (named) entries, in sorted order."""
    digest = hashlib.sha256()
    for name in sorted(state if names is None else names):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Change(NamedTuple):
    """One tensor of a vector that is to be added.

    Attributes:
        name: of the tensor.
        target: of its shape; changed in place.
        scale: finite factor.
        saved: receives what ``target`` held, in the same pass where that is possible.
    """

    name: str
    target: Tensor
    scale: float = 1.0
    saved: SavedCopy | None = None


class NamedVector(Mapping[str, Tensor]):
    """A mapping from names to tensors that can be added to those of a model.

    Attributes:
        shapes: of the tensors, by name.
        base_checksum: :func:`state_checksum` of the state that the vector starts from, or None.
    """

    shapes: dict[str, tuple[int, ...]]
    base_checksum: str | None

    @abstractmethod
    def _summand(self, name: str, target: Tensor) -> Summand | None:
        """A tensor as :func:`add_all_` takes it, or None where no kernel adds it to ``target``."""

    @abstractmethod
    def _add_apart_(self, change: Change) -> None:
        """Make a change that no kernel takes; it has been saved."""

    def add_to_(
        self, name: str, target: Tensor, scale: float = 1.0, saved: SavedCopy | None = None
    ) -> None:
        """Add ``scale`` times the tensor ``name`` to ``target`` in place.

        Args:
            name: of a tensor of the vector.
            target: of its shape.
            scale: finite factor.
            saved: receives what ``target`` held, in the same pass where that is possible.

        Raises:
            KeyError: there is no such tensor.
            ValueError: ``target`` has another shape.
        """
        self.add_each_([Change(name, target, scale, saved)])

    def add_each_(self, changes: Iterable[Change]) -> None:
        """:meth:`add_to_` for many tensors, all checked before the first is changed.

        What kernels take is added in one call: a step back into the interpreter between two large
        tensors would find its data pushed out of the caches.
        """
        subject = f"{type(self).__name__}.add_to_"
        sums, apart = [], []
        for change in changes:
            name, target, scale, saved = change
            if target.shape != self.shapes[name]:
                check_shape(subject, "target", target, self.shapes[name])
            summand = self._summand(name, target)
            if summand is None:
                apart.append(change)
            else:
                sums.append(Addition(summand, target, scale, saved))
        add_all_(subject, sums)
        for change in apart:
            if change.saved is not None:
                change.saved.fill(change.target)
            self._add_apart_(change)

    def apply_to(self, module: nn.Module, scale: float | Mapping[str, float] = 1.0) -> nn.Module:
        """Add ``scale`` times the vector to ``module`` in place, in one pass over the weights.

        Use :class:`Patcher` where the change must be undone exactly.

        Args:
            module: holds every tensor of the vector, in the same shape.
            scale: one number, or one for each tensor by name.

        Returns:
            ``module``.

        Raises:
            TypeError: a tensor of the model is not floating point.
            ValueError: a tensor is missing or has another shape, weights are tied, or a scale is
                missing or not finite.
        """
        subject = f"{type(self).__name__}.apply_to"
        targets = find_targets(subject, module, self.shapes)
        factors = check_scales(subject, self.shapes, scale)
        with torch.no_grad():
            self.add_each_(Change(name, target, factors[name]) for name, target in targets.items())
        return module

    def check_base(self, state: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless ``state`` is, to the bit, the base of this vector.

        Wrong bases are not refused on every application: a signature is made for descendants of
        its base, whose bytes differ.
        """
        subject = type(self).__name__
        missing = [name for name in self if name not in state]
        if missing:
            raise ValueError(
                f"{subject}: the base must hold all names; missing {shorten(missing)}."
            )
        if self.base_checksum is not None and state_checksum(state, self) != self.base_checksum:
            raise ValueError(f"{subject}: the state is not the base of this vector; bytes differ.")


def check_scales(
    subject: str, names: Iterable[str], scale: float | Mapping[str, float]
) -> dict[str, float]:
    """One finite factor for each name; raises ValueError where one is missing or not finite."""
    wanted = list(names)
    if isinstance(scale, Mapping):
        check_names(subject, wanted, scale)
    factors = {n: float(scale[n] if isinstance(scale, Mapping) else scale) for n in wanted}
    for name, factor in factors.items():
        if not math.isfinite(factor):
            raise ValueError(f"{subject}: scale must be finite; got {factor} for '{name}'.")
    return factors


def find_targets(
    subject: str, module: nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The tensors of ``module`` that a vector changes; raises where one is missing or differs."""
    state = check_no_ties(subject, module)
    missing = [name for name in shapes if name not in state]
    if missing:
        raise ValueError(
            f"{subject}: the model must hold every tensor; missing {shorten(missing)}."
        )
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"{subject}: '{name}' must have one shape on both sides; got "
                f"{tuple(state[name].shape)} and {shape}."
            )
        if not state[name].is_floating_point():
            raise TypeError(
                f"{subject}: '{name}' must be floating point in the model; got {state[name].dtype}."
            )
    return {name: state[name] for name in shapes}
