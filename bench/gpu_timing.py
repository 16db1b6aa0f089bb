"""Times on a GPU: calls in a CUDA graph over rotating operands, medians of replays."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Clock", "Row", "copies_beyond_cache", "no_time", "seconds_of", "table"]

_ROTATED_BYTES = 256 << 20  # of operands between two uses of one: four times an H200's L2
_REPLAYS = 15


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        part: which part measured it.
        what: kernel, widths and shape.
        value: the figure that the targets speak of, NaN where it could not be measured.
        unit: of ``value``: ``"x torch bf16"``, ``"of fill_"``, ...
        must: the least (or, with ``below``, largest) acceptable value, or None.
        lead: the value that would lead, or None.
        detail: times behind it.
        below: whether smaller is better.
    """

    part: str
    what: str
    value: float
    unit: str
    must: float | None = None
    lead: float | None = None
    detail: str = ""
    below: bool = False

    def verdict(self) -> str:
        """``lead``, ``yes``, ``NO``, or empty where there is no target or no measurement."""
        if math.isnan(self.value):
            return "not measured"
        sign = -1 if self.below else 1
        if self.lead is not None and sign * self.value >= sign * self.lead:
            return "lead"
        if self.must is None:
            return ""
        return "yes" if sign * self.value >= sign * self.must else "NO"


def no_time(
    part: str, what: str, unit: str = "", must: float | None = None, lead: float | None = None
) -> Row:
    """The row of a cell that the budget did not reach."""
    return Row(part, what, math.nan, unit, must, lead, "no time left")


class Clock:
    """How much of the time for the whole report is left."""

    def __init__(self, budget: float) -> None:
        self.end = time.monotonic() + budget

    def left(self) -> float:
        """Seconds until the report must be written."""
        return self.end - time.monotonic()


def copies_beyond_cache(nbytes: int) -> int:
    """Copies of an operand that together exceed the cache several times over."""
    return max(1, math.ceil(_ROTATED_BYTES / max(1, nbytes)))


def seconds_of(calls: Sequence[Callable[[], object]], *, graph: bool = True) -> float:
    """Median seconds of one call, over replays of all ``calls`` in a row.

    Args:
        calls: the same work on different operands.
        graph: whether to capture them; else they run eagerly, launches included.
    """
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    run = _captured(calls) if graph else _in_a_row(calls)
    run()
    torch.cuda.synchronize()
    times = []
    for _ in range(_REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3 / len(calls))
    return statistics.median(times)


def _captured(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _in_a_row(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def table(rows: Sequence[Row]) -> str:
    """Markdown, one table a part."""
    lines: list[str] = []
    for part in dict.fromkeys(row.part for row in rows):
        lines += [f"\n## {part}", "", "| what | value | must | lead | met | times |"]
        lines.append("| --- | --- | --- | --- | --- | --- |")
        for row in rows:
            if row.part == part:
                cells = [row.what, f"{_number(row.value)} {row.unit}", _number(row.must)]
                cells += [_number(row.lead), row.verdict(), row.detail]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return "-" if math.isnan(value) else f"{value:.3g}"
