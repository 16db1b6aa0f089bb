"""Put task vectors on a model and take them off again, exactly."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor, nn

from pyrobust._checks import check_finite
from pyrobust.ops.add_packed import SavedCopy
from pyrobust.weights.packed_delta import PackedDelta
from pyrobust.weights.task_vector import TaskVector, find_targets

__all__ = ["Patcher"]

Delta = TaskVector | PackedDelta


class Patcher:
    """Applies named patches to a model; originals are kept, so that removal is exact to the bit.

    Subtracting a patch would lose bits. Instead the touched tensors are saved once, and whatever
    patches remain are added to the saved values again, in the order they were applied. Leaving the
    ``with`` block takes all patches off, after an exception too.

    Memory for the originals is kept from :meth:`remove` to the next :meth:`apply`, since getting it
    from the system costs several times as much as filling it; :meth:`clear` gives it back.

    Args:
        model: patched in place; do not train it while patches are on.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> before = model.weight.detach().clone()
        >>> with Patcher(model) as patcher:
        ...     patcher.apply(TaskVector.from_deltas({"weight": torch.ones(1, 1)}), 0.1, "shift")
        >>> torch.equal(model.weight, before)
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._patches: dict[str, tuple[Delta, float]] = {}
        self._originals: dict[str, SavedCopy] = {}
        self._spare: dict[str, Tensor] = {}

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the patches that are on, in order."""
        return tuple(self._patches)

    def apply(self, delta: Delta, scale: float = 1.0, name: str | None = None) -> None:
        """Add ``scale * delta``; the model is unchanged if anything goes wrong on the way.

        Args:
            delta: a task vector, packed or not.
            scale: strength; 0 leaves every bit as it is.
            name: for :meth:`remove`; None numbers the patch.

        Raises:
            TypeError: a tensor of the model is not floating point.
            ValueError: the name is taken, a tensor is missing or has another shape, weights are
                tied, or a value is not finite.
        """
        name = name if name is not None else self._free_name()
        if name in self._patches:
            raise ValueError(f"Patcher.apply: name must be new; '{name}' is on already.")
        check_finite("Patcher.apply", "scale", torch.tensor(float(scale)))
        targets = find_targets("Patcher.apply", self.model, delta.shapes)
        saved: list[str] = []
        try:
            with torch.no_grad():
                for tensor, target in targets.items():
                    original = None
                    if tensor not in self._originals:
                        saved.append(tensor)
                        original = self._originals[tensor] = self._room(tensor, target)
                    _add(delta, tensor, target, scale, original)
        except BaseException:
            self._rebuild([n for n in targets if n in self._originals])
            for n in saved:
                self._originals.pop(n, None)
            raise
        self._patches[name] = (delta, scale)

    def remove(self, name: str) -> None:
        """Take one patch off; with none left the model is, to the bit, what it was.

        Raises:
            ValueError: no patch has this name.
        """
        if name not in self._patches:
            raise ValueError(f"Patcher.remove: name must be one of {self.active}; got '{name}'.")
        delta, _ = self._patches.pop(name)
        self._rebuild(delta)
        kept = {n for other, _ in self._patches.values() for n in other}
        for tensor in delta:
            if tensor not in kept:
                self._spare[tensor] = self._originals.pop(tensor).values

    def clear(self) -> None:
        """Take all patches off, and give the memory of the originals back."""
        self._patches.clear()
        self._rebuild(self._originals)
        self._originals.clear()
        self._spare.clear()

    def __enter__(self) -> Patcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.clear()

    def _room(self, name: str, value: Tensor) -> SavedCopy:
        spare = self._spare.pop(name, None)
        if spare is None or (spare.dtype, spare.device) != (value.dtype, value.device):
            spare = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        return SavedCopy(spare)

    def _rebuild(self, tensors: Iterable[str]) -> None:
        state = self.model.state_dict(keep_vars=True)
        with torch.no_grad():
            for tensor in tensors:
                original = self._originals[tensor]
                if not original.filled:  # nothing was added to this one
                    continue
                state[tensor].copy_(original.values)
                for delta, scale in self._patches.values():
                    if tensor in delta:
                        _add(delta, tensor, state[tensor], scale)

    def _free_name(self) -> str:
        number = len(self._patches)
        while f"patch{number}" in self._patches:
            number += 1
        return f"patch{number}"


def _add(
    delta: Delta, name: str, target: Tensor, scale: float, original: SavedCopy | None = None
) -> None:
    if scale != 0:
        delta.add_to_(name, target, scale, original)
    elif original is not None:  # not even a sign of zero changes
        original.fill(target)
