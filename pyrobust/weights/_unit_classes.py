"""Classes of units that must be reordered together, found while a model is traced.

A class starts as one layer's output channels. Adding two tensors joins their classes; grouping
channels (heads, convolution groups) narrows a class to whole blocks; an operation that is not
known to commute with a reordering pins a class to the identity. Each step only restricts the
group of permutations, so what is left at the end always preserves the function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Axis", "Run", "UnitClass", "join", "narrow", "pin", "regroup"]


class UnitClass:
    """One node of a union-find forest; the root holds the number of units (1: pinned)."""

    def __init__(self, count: int, name: str) -> None:
        self.parent: UnitClass | None = None
        self.count = count
        self.name = name
        self.runs: list[Run] = []

    def root(self) -> UnitClass:
        """The representative of this class."""
        node = self
        while node.parent is not None:
            node = node.parent
        return node


@dataclass(eq=False)
class Run:
    """A stretch of an axis ordered ``(outer, units, inner)``."""

    units: UnitClass
    length: int
    outer: int = 1

    def __post_init__(self) -> None:
        self.units.root().runs.append(self)

    @property
    def count(self) -> int:
        """Units in the class of this run."""
        return self.units.root().count


Axis = tuple[Run, ...]


def pin(axis: Axis | None) -> None:
    """Keep every class of ``axis`` in place."""
    for run in axis or ():
        run.units.root().count = 1


def narrow(run: Run, blocks: int) -> None:
    """Permute only whole blocks of channels: ``blocks`` equal ones along the run."""
    root = run.units.root()
    root.count = math.gcd(root.count, blocks)


def regroup(run: Run, outer: int) -> bool:
    """See the run as ``outer`` repetitions of the same, smaller set of units, if it can be."""
    root = run.units.root()
    if root.count % outer or any(other.outer != 1 for other in root.runs):
        pin((run,))
        return False
    root.count //= outer
    for other in root.runs:
        other.outer = outer
    return True


def join(first: Axis | None, second: Axis | None) -> Axis | None:
    """Force two axes to be reordered alike; the common axis (None: not at all)."""
    if first is None or second is None:
        pin(first)
        pin(second)
        return None
    if [run.length for run in first] != [run.length for run in second]:
        pin(first)
        pin(second)
        return None
    for a, b in zip(first, second, strict=True):
        _join_runs(a, b)
    return first


def _join_runs(a: Run, b: Run) -> None:
    if a.outer != b.outer and not (
        (a.outer == 1 and regroup(a, b.outer)) or (b.outer == 1 and regroup(b, a.outer))
    ):
        pin((a, b))
        return
    tie(a, b)


def tie(a: Run, b: Run) -> None:
    """Give two runs (of any inner widths) one class."""
    x, y = a.units.root(), b.units.root()
    if x is y:
        return
    x.count = math.gcd(x.count, y.count)
    y.parent = x
    x.runs += y.runs
