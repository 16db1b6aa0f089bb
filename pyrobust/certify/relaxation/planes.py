"""Planes: linear functions below and above an operation of several numbers over a box.

Lines bound a function of one number. A product, a maximum or a sum of exponentials is a function of
several, and its linear bounds are planes. A backward pass meets the lower plane of an element where
its coefficient is positive and the upper plane where it is negative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Ends", "Planes", "Pulled", "Relaxation", "dot", "open_elements", "summed_to"]

Ends = tuple[Tensor, Tensor]
Take = Callable[[Tensor], Tensor]


@dataclass
class Pulled:
    """Coefficients before an operation.

    Attributes:
        parts: ``(S, b, *input)`` for each input.
        value: ``(S, b)``, what the constants of the planes add.
        reach: ``(S, b)``, sum of the magnitudes of all terms over the box; None where rounding is
            not counted.
    """

    parts: list[Tensor]
    value: Tensor
    reach: Tensor | None


class Planes(Protocol):
    """The planes of every element of a value over one box; valid as the numbers are stored.

    Attributes:
        terms: roundings that a coefficient passes beyond one for each element of the value.
    """

    terms: int

    def pull(self, a: Tensor, take: Take) -> Pulled:
        """Coefficients ``(S, b, *value)`` to those of the inputs.

        Args:
            a: coefficients.
            take: from ``(B, ...)`` to the ``(b, ...)`` that the coefficients are of.
        """
        ...


class Relaxation(Protocol):
    """Makes the planes of an operation."""

    def planes(self, boxes: list[Ends], sound: bool) -> Planes:
        """The planes over the boxes of the inputs, ``(B, *input)`` ends in the working dtype."""
        ...

    def undecided(self, boxes: list[Ends]) -> list[Tensor]:
        """For each input ``(B, N)`` bool: whether tighter ends of an element may help."""
        ...


def summed_to(a: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """``(S, b, *value)`` summed over the axes along which an input of ``shape`` was broadcast."""
    extra = a.ndim - 2 - len(shape)
    if extra > 0:
        a = a.sum(tuple(range(2, 2 + extra)))
    repeated = [i + 2 for i, size in enumerate(shape) if size == 1 and a.shape[i + 2] != 1]
    return a.sum(repeated, keepdim=True) if repeated else a


def dot(a: Tensor, values: Tensor) -> Tensor:
    """``(S, b)`` sums of ``(S, 1 or b, *value)`` coefficients times ``(1 or b, *value)`` values."""
    flat, points = a.flatten(2), values.flatten(1)
    if flat.shape[1] == 1 and points.shape[0] != 1:
        return flat[:, 0] @ points.mT
    return torch.einsum("sbn,bn->sb", flat, points.expand(flat.shape[1], -1))


def open_elements(box: Ends) -> Tensor:
    """``(B, N)``, true where an element is not known to the last bit."""
    return (box[1] > box[0]).flatten(1)
