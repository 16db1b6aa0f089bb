"""study: which choices of learned rounding matter on a model, as a table.

Source: the audit of Yvinec, Dapogny, Bailly, "Gradient-based post-training quantization:
challenging the status quo", 2023, arXiv 2308.07662.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from pyrobust._checks import check_instance, check_unit
from pyrobust.quantize.calibration import Call, read_calibration
from pyrobust.quantize.call_rows import batch_size, rows_of
from pyrobust.quantize.learned_rounding import learned_rounding

__all__ = ["StudyTable", "study"]


@dataclass(frozen=True)
class StudyTable:
    """Results of a study.

    Attributes:
        rows: for each run, what was changed (factor to level; empty for the common options) and
            what ``evaluate`` gave.
    """

    rows: tuple[tuple[dict[str, Any], float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "rows": [
                {"changed": {k: _plain(v) for k, v in changed.items()}, "result": result}
                for changed, result in self.rows
            ]
        }

    def summary(self) -> str:
        """One line per run."""
        names = [", ".join(f"{k}={v}" for k, v in c.items()) or "(common)" for c, _ in self.rows]
        width = max(map(len, names))
        return "\n".join(
            f"{name:<{width}}  {result:.4f}"
            for name, (_, result) in zip(names, self.rows, strict=True)
        )

    __str__ = summary

    def spread(self) -> dict[str, float]:
        """For each factor, the largest less the smallest result among runs that change it alone.

        The run with the common options counts as one level of each.
        """
        base = [result for changed, result in self.rows if not changed]
        found: dict[str, list[float]] = {}
        for changed, result in self.rows:
            if len(changed) == 1:
                found.setdefault(next(iter(changed)), list(base)).append(result)
        return {factor: max(results) - min(results) for factor, results in found.items()}


def study(
    model: nn.Module,
    calibration: Any,
    grid: Mapping[str, Sequence[Any]],
    *,
    evaluate: Callable[[nn.Module], float],
    full: bool = False,
    progress: bool = False,
    **common: Any,
) -> StudyTable:
    """Run learned rounding once with the common options and once for every level of every factor.

    Args:
        model: in evaluation mode.
        calibration: as for :func:`~pyrobust.quantize.learned_rounding`.
        grid: factors and their levels: options of :func:`~pyrobust.quantize.learned_rounding` and
            of :class:`~pyrobust.quantize.LearnedRounding`, and ``"calibration_share"``, the share
            of every batch that is used.
        evaluate: of the packed model; accuracy, say.
        full: all combinations of levels instead of one change at a time.
        progress: show a progress bar.
        common: options of all runs.

    Raises:
        TypeError: a factor is no option.
        ValueError: ``grid`` is empty, a level is out of range, or calibration data are bad.
    """
    check_instance("study", "model", model, nn.Module)
    if not grid or not all(grid.values()):
        raise ValueError("study: grid must hold at least one factor with at least one level.")
    calls = read_calibration("study", calibration, model)
    rows = []
    for changed in tqdm(list(_runs(grid, full)), desc="study", disable=not progress):
        options = {**common, **changed}
        share = options.pop("calibration_share", 1.0)
        check_unit("study", "calibration_share", share)
        packed = learned_rounding(model, [_batch(call, share) for call in calls], **options)
        rows.append((changed, float(evaluate(packed))))
    return StudyTable(tuple(rows))


def _runs(grid: Mapping[str, Sequence[Any]], full: bool) -> Iterator[dict[str, Any]]:
    if full:
        for combination in product(*grid.values()):
            yield dict(zip(grid, combination, strict=True))
        return
    yield {}
    for factor, levels in grid.items():
        for level in levels:
            yield {factor: level}


def _batch(call: Call, share: float) -> Any:
    """The first part of a batch, in a form that calibration is read from."""
    size = batch_size(call)
    part = rows_of(call, torch.arange(max(1, round(share * size))))
    return part.args[0] if part.args else part.kwargs


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
