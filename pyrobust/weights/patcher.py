"""Put task vectors on a model and take them off again, exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from pyrobust._checks import check_instance
from pyrobust.ops.add_packed import SavedCopy, saved_copies
from pyrobust.weights.named_vector import Change, find_targets
from pyrobust.weights.packed_delta import PackedDelta
from pyrobust.weights.task_vector import TaskVector

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
        check_instance("Patcher", "model", model, nn.Module)
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
        if not math.isfinite(scale):
            raise ValueError(f"Patcher.apply: scale must be finite; got {scale}.")
        targets = find_targets("Patcher.apply", self.model, delta.shapes)
        rooms = self._rooms({n: t for n, t in targets.items() if n not in self._originals})
        try:
            self._originals.update(rooms)
            _add(delta, [Change(n, target, scale, rooms.get(n)) for n, target in targets.items()])
        except BaseException:
            self._rebuild([n for n in targets if n in self._originals])
            for n in rooms:
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

    def _rooms(self, targets: Mapping[str, Tensor]) -> dict[str, SavedCopy]:
        rooms = {}
        for name, value in targets.items():
            form, spare = (value.shape, value.dtype, value.device), self._spare.pop(name, None)
            if spare is not None and (spare.shape, spare.dtype, spare.device) == form:
                rooms[name] = SavedCopy(spare)
        missing = [name for name in targets if name not in rooms]
        copies = saved_copies([targets[name] for name in missing])
        return {**rooms, **dict(zip(missing, copies, strict=True))}

    def _rebuild(self, tensors: Iterable[str]) -> None:
        state = self.model.state_dict(keep_vars=True)
        changed = [n for n in tensors if self._originals[n].filled]  # others were not added to
        with torch.no_grad():
            for n in changed:
                state[n].copy_(self._originals[n].values)
        for delta, scale in self._patches.values():
            _add(delta, [Change(n, state[n], scale) for n in changed if n in delta])

    def _free_name(self) -> str:
        number = len(self._patches)
        while f"patch{number}" in self._patches:
            number += 1
        return f"patch{number}"


def _add(delta: Delta, changes: Sequence[Change]) -> None:
    nothing = [change for change in changes if change.scale == 0]  # not even a sign of zero changes
    with torch.no_grad():
        delta.add_each_(change for change in changes if change.scale != 0)
        for change in nothing:
            if change.saved is not None:
                change.saved.fill(change.target)
