"""Modules that simulate low bits while they train, as packing sees them.

Such a module has two methods: ``to_packed()`` returns the module that takes its place, and
``simulated_weights()`` tells the weights that it packs, by their names below the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

__all__ = ["SimulatedModule", "SimulatedWeight", "StoredWeight", "simulated_modules"]


class StoredWeight(Protocol):
    """What is asked of a packed weight: a :class:`~pyrobust.quantize.QTensor`, or a complex one."""

    @property
    def bits(self) -> float:
        """Bits of a code."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        ...

    def dequantize(self) -> Tensor:
        """The weight that it stands for, ``(rows, columns)``."""
        ...


@dataclass(frozen=True)
class SimulatedWeight:
    """One weight before and after.

    Attributes:
        weight: the float (or complex) weight, ``(rows, ...)``.
        qtensor: its packed form, ``(rows, columns)``.
        bytes_before: of the parameters that it is made of.
    """

    weight: Tensor
    qtensor: StoredWeight
    bytes_before: int


@runtime_checkable
class SimulatedModule(Protocol):
    """What ``pyrobust.pack`` asks of a module to let it pack itself."""

    def to_packed(self) -> nn.Module:
        """The packed module; it shares no parameter with this one."""
        ...

    def simulated_weights(self) -> dict[str, SimulatedWeight]:
        """The weights by their names below the module ("" for the module's own)."""
        ...


def simulated_modules(model: nn.Module) -> dict[str, SimulatedModule]:
    """The outermost simulating modules of ``model``, by their first names."""
    found: dict[str, SimulatedModule] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") if outer else True for outer in found)
        if isinstance(module, SimulatedModule) and not inside:
            found[name] = module
    return found
