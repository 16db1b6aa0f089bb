"""Task vectors: the difference of two checkpoints as a vector one can add, scale, store and undo.

Source: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv 2212.04089. Shared
by robust weight signatures (method 1) and aTLAS (method 43).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pyrobust._safetensors import write_safetensors
from pyrobust.ops.add_packed import Summand, takes, values_summand
from pyrobust.weights._state import check_no_ties, check_same_state, check_state_finite, shorten
from pyrobust.weights._vector_file import read_vector_file
from pyrobust.weights.named_vector import Change, NamedVector, state_checksum

__all__ = ["TaskVector", "WeightDelta"]

_STATISTICS = ("running_mean", "running_var")
_FORMAT = "1"


class TaskVector(NamedVector):
    """``tuned - base``, tensor by tensor; a mapping from names to tensors.

    Integer entries (counters) are never part of it. Running statistics of batch norms are left
    out unless asked for: added to another model they describe no data; re-estimate them instead
    (:func:`recalibrate_batchnorm`).

    Contiguous float16 and bfloat16 weights on the CPU are added to as packed vectors are
    (:mod:`pyrobust.ops.add_packed`): with equal bits for every number of threads.

    Args:
        base_state: state before tuning.
        tuned_state: state after tuning; same names, shapes and dtypes.
        include_buffers: keep the running statistics too.

    Raises:
        TypeError: dtypes differ.
        ValueError: names or shapes differ, or a weight is not finite.

    Example:
        >>> step = TaskVector({"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 2.0])})
        >>> (0.5 * step - step)["w"]
        tensor([-0.5000, -1.0000])
    """

    def __init__(
        self,
        base_state: Mapping[str, Tensor],
        tuned_state: Mapping[str, Tensor],
        *,
        include_buffers: bool = False,
    ) -> None:
        check_same_state("TaskVector", base_state, tuned_state)
        check_state_finite("TaskVector", base_state)
        check_state_finite("TaskVector", tuned_state)
        deltas = {
            name: (tuned_state[name].detach() - value.detach())
            for name, value in base_state.items()
            if value.is_floating_point()
            and (include_buffers or name.rpartition(".")[2] not in _STATISTICS)
        }
        self._hold(deltas, state_checksum(base_state, deltas))

    def _hold(self, deltas: dict[str, Tensor], base_checksum: str | None) -> None:
        self._deltas, self.base_checksum = deltas, base_checksum
        self.shapes = {name: tuple(value.shape) for name, value in deltas.items()}

    @classmethod
    def from_modules(
        cls, base: nn.Module, tuned: nn.Module, *, include_buffers: bool = False
    ) -> TaskVector:
        """The difference of two modules; without ``include_buffers`` exactly their parameters.

        Raises:
            ValueError: weights are tied, or as the constructor.
        """
        check_no_ties("TaskVector", base)
        check_no_ties("TaskVector", tuned)
        states = base.state_dict(), tuned.state_dict()
        check_same_state("TaskVector", *states)
        if not include_buffers:
            wanted = {name for name, _ in base.named_parameters()}
            states = tuple({n: v for n, v in s.items() if n in wanted} for s in states)  # type: ignore[assignment]
        return cls(*states, include_buffers=True)

    @classmethod
    def between(
        cls, a: nn.Module | Mapping[str, Tensor], b: nn.Module | Mapping[str, Tensor]
    ) -> TaskVector:
        """``b - a``: the step that leads from ``a`` to ``b``, two modules or two state dicts."""
        if isinstance(a, nn.Module) and isinstance(b, nn.Module):
            return cls.from_modules(a, b)
        for name, value in (("a", a), ("b", b)):
            if not isinstance(value, Mapping):
                raise TypeError(
                    f"TaskVector.between: {name} must be a state dict, or both must be modules; "
                    f"got {type(value).__name__}."
                )
        return cls(a, b)  # type: ignore[arg-type]

    @classmethod
    def from_deltas(
        cls, deltas: Mapping[str, Tensor], base_checksum: str | None = None
    ) -> TaskVector:
        """A task vector of given tensors.

        Raises:
            ValueError: a tensor is not finite or not floating point.
        """
        for name, value in deltas.items():
            if not value.is_floating_point():
                raise ValueError(f"TaskVector: '{name}' must be floating point; got {value.dtype}.")
        check_state_finite("TaskVector", deltas)
        vector = cls.__new__(cls)
        vector._hold({name: value.detach() for name, value in deltas.items()}, base_checksum)
        return vector

    def __getitem__(self, name: str) -> Tensor:
        return self._deltas[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)

    def _map(self, function: Callable[[str, Tensor], Tensor]) -> TaskVector:
        values = {name: function(name, value) for name, value in self._deltas.items()}
        return TaskVector.from_deltas(values, self.base_checksum)

    def __add__(self, other: TaskVector) -> TaskVector:
        check_same_state("TaskVector", self, other)
        return self._map(lambda name, value: value + other[name])

    def __sub__(self, other: TaskVector) -> TaskVector:
        check_same_state("TaskVector", self, other)
        return self._map(lambda name, value: value - other[name])

    def __mul__(self, scale: float) -> TaskVector:
        return self._map(lambda _, value: value * scale)

    __rmul__ = __mul__

    def __neg__(self) -> TaskVector:
        return self._map(lambda _, value: -value)

    def select(self, names: Iterable[str]) -> TaskVector:
        """Only the named tensors.

        Raises:
            ValueError: a name is unknown.
        """
        wanted = list(names)
        unknown = [name for name in wanted if name not in self._deltas]
        if unknown:
            raise ValueError(f"TaskVector: there is no {shorten(unknown)} to select.")
        values = {name: self._deltas[name] for name in wanted}
        return TaskVector.from_deltas(values)

    def dot(self, other: TaskVector) -> float:
        """Inner product over all tensors, in float64."""
        check_same_state("TaskVector", self, other)
        return sum(
            float(v.double().flatten() @ other[n].double().flatten()) for n, v in self.items()
        )

    def norm(self) -> float:
        """Euclidean length over all tensors."""
        return math.sqrt(self.dot(self))

    def cosine(self, other: TaskVector) -> float:
        """Cosine of the angle between two vectors; 0 where one of them is zero."""
        length = self.norm() * other.norm()
        return self.dot(other) / length if length else 0.0

    def astype(self, dtype: torch.dtype) -> TaskVector:
        """The same vector stored in another floating type."""
        return self._map(lambda _, value: value.to(dtype))

    def to(self, device: torch.device | str) -> TaskVector:
        """The same vector on another device."""
        return self._map(lambda _, value: value.to(device))

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return dict(self._deltas)

    def _summand(self, name: str, target: Tensor) -> Summand | None:
        if target.dtype not in (torch.float16, torch.bfloat16):
            return None
        value, row = self[name], (1, target.numel())
        plain = type(value) is Tensor and value.device.type == "cpu" and value.is_contiguous()
        if not plain or value.dtype not in (torch.float32, target.dtype) or not takes(target, row):
            return None
        return values_summand(value, row)

    def _add_apart_(self, change: Change) -> None:
        value = self[change.name].to(change.target.device, change.target.dtype)
        change.target.add_(value, alpha=change.scale)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all, with the checksum of the base."""
        metadata = {"format": _FORMAT, "base_checksum": self.base_checksum or ""}
        write_safetensors(path, dict(self.items()), metadata)

    @classmethod
    def load(cls, path: str | Path) -> TaskVector:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or not a task vector.
        """
        metadata, values = read_vector_file("TaskVector", path)
        if metadata.get("format") != _FORMAT or "parts" in metadata:
            raise ValueError(f"TaskVector: {path} is not a task vector of format {_FORMAT}.")
        return cls.from_deltas(values, metadata.get("base_checksum") or None)


WeightDelta = TaskVector
"""The same type under the name that robust weight signatures use."""
