"""What the table of packed products holds a row of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Call = Callable[[], object]


@dataclass(frozen=True)
class Peer:
    """A product to time: ``prepare(x)`` gives the call, ``nbytes`` is what it reads of weights.

    ``weight`` is the float weight whose product with x the result must be near.
    """

    name: str
    bits: float
    prepare: Callable[[Tensor], Call]
    weight: Tensor
    nbytes: int

    @property
    def ours(self) -> bool:
        """Whether it is pyrobust's."""
        return self.name.startswith("pyrobust")
