"""Task vectors: the difference of two checkpoints as a vector one can add, scale, store and undo.

Source: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv 2212.04089. Shared
by robust weight signatures (method 1) and aTLAS (method 43).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pyrobust._checks import check_shape
from pyrobust._safetensors import write_safetensors
from pyrobust.ops.add_packed import SavedCopy, add_values_, as_matrix
from pyrobust.weights._state import check_names, check_no_ties, check_same_state, check_state_finite
from pyrobust.weights._state import shorten as _shorten

__all__ = ["TaskVector", "WeightDelta", "state_checksum"]

_STATISTICS = ("running_mean", "running_var")
_FORMAT = "1"


def state_checksum(state: Mapping[str, Tensor], names: Iterable[str] | None = None) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the (named) entries, in sorted order."""
    digest = hashlib.sha256()
    for name in sorted(state if names is None else names):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class TaskVector(Mapping[str, Tensor]):
    """``tuned - base``, tensor by tensor; a mapping from names to tensors.

    Integer entries (counters) are never part of it. Running statistics of batch norms are left
    out unless asked for: added to another model they describe no data; re-estimate them instead
    (:func:`recalibrate_batchnorm`).

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
        self._deltas = {
            name: (tuned_state[name].detach() - value.detach())
            for name, value in base_state.items()
            if value.is_floating_point()
            and (include_buffers or name.rpartition(".")[2] not in _STATISTICS)
        }
        self.base_checksum: str | None = state_checksum(base_state, self._deltas)

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
    def between(cls, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> TaskVector:
        """``b - a``: the step that leads from ``a`` to ``b``."""
        return cls(a, b)

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
        vector._deltas = {name: value.detach() for name, value in deltas.items()}
        vector.base_checksum = base_checksum
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

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors by name."""
        return {name: tuple(value.shape) for name, value in self._deltas.items()}

    def select(self, names: Iterable[str]) -> TaskVector:
        """Only the named tensors.

        Raises:
            ValueError: a name is unknown.
        """
        wanted = list(names)
        unknown = [name for name in wanted if name not in self._deltas]
        if unknown:
            raise ValueError(f"TaskVector: there is no {_shorten(unknown)} to select.")
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

    def add_to_(
        self, name: str, target: Tensor, scale: float = 1.0, saved: SavedCopy | None = None
    ) -> None:
        """Add ``scale`` times the tensor ``name`` to ``target`` in place.

        Contiguous float16 and bfloat16 weights on the CPU are added to as packed vectors are
        (:mod:`pyrobust.ops.add_packed`): with equal bits for every number of threads.

        Args:
            name: of a tensor of the vector.
            target: of its shape.
            scale: finite factor.
            saved: receives what ``target`` held, in the same pass where that is possible.

        Raises:
            KeyError: there is no such tensor.
            ValueError: ``target`` has another shape.
        """
        value = self[name]
        check_shape("TaskVector.add_to_", "target", target, tuple(value.shape))
        if (matrix := _half_matrix(target.detach(), value)) is not None:
            add_values_(matrix, value.reshape(matrix.shape), alpha=scale, saved=saved)
            return
        if saved is not None:
            saved.fill(target)
        target.add_(value.to(target.device, target.dtype), alpha=scale)

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
        return add_everywhere("TaskVector.apply_to", module, self.shapes, scale, self.add_to_)

    def check_base(self, state: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless ``state`` is, to the bit, the base of this vector."""
        check_base("TaskVector", self, self.base_checksum, state)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all, with the checksum of the base."""
        metadata = {"format": _FORMAT, "base_checksum": self.base_checksum or ""}
        write_safetensors(path, dict(self.items()), metadata)

    @classmethod
    def load(cls, path: str | Path) -> TaskVector:
        """Read what :meth:`save` wrote."""
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return cls.from_deltas(values, metadata.get("base_checksum") or None)


WeightDelta = TaskVector
"""The same type under the name that robust weight signatures use."""


def _half_matrix(target: Tensor, value: Tensor) -> Tensor | None:
    """``target`` as one row of float16 or bfloat16 to which ``value`` can be added, or None."""
    if target.dtype not in (torch.float16, torch.bfloat16) or type(value) is not Tensor:
        return None
    if value.device.type != "cpu" or value.dtype not in (torch.float32, target.dtype):
        return None
    return as_matrix(target, (1, target.numel())) if value.is_contiguous() else None


def check_base(
    subject: str, names: Iterable[str], base_checksum: str | None, state: Mapping[str, Tensor]
) -> None:
    """Raise ValueError unless the named tensors of ``state`` have the checksum, where there is one.

    Wrong bases are not refused on every application: a signature is made for descendants of its
    base, whose bytes differ.
    """
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"{subject}: the base must hold all names; missing {_shorten(missing)}.")
    if base_checksum is not None and state_checksum(state, names) != base_checksum:
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


def add_everywhere(
    subject: str,
    module: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    scale: float | Mapping[str, float],
    add: Callable[[str, Tensor, float], None],
) -> nn.Module:
    """Call ``add`` with the name, target and factor of every tensor; raises before the first."""
    targets = find_targets(subject, module, shapes)
    factors = check_scales(subject, shapes, scale)
    with torch.no_grad():
        for name, target in targets.items():
            add(name, target, factors[name])
    return module


def find_targets(
    subject: str, module: nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The tensors of ``module`` that a vector changes; raises where one is missing or differs."""
    state = check_no_ties(subject, module)
    missing = [name for name in shapes if name not in state]
    if missing:
        raise ValueError(
            f"{subject}: the model must hold every tensor; missing {_shorten(missing)}."
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
