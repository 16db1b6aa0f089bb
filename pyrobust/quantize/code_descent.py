"""Coordinate descent on the codes of one layer, and the best scales for given codes.

Both go down the squared error of the layer's outputs exactly: a code moves by one level where that
lowers the error, all else as it is, column by column until no single move does; a scale takes the
value at which the error is least, its codes as they are.

Source: coordinate descent on codes as in Behdin et al., QuantEase, 2023, arXiv 2309.01885,
algorithm 1 (there without scales, and from the float weight's own outputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrobust.quantize.quadratic_loss import QuadraticLoss
from pyrobust.quantize.rounding_grid import RoundingGrid

__all__ = ["descend_codes", "fit_scales"]

_MARGIN = 1 + 1e-4  # of a gain over its own rounding errors
_LIMITS = (0.5, 2.0)  # of the scale it started from, between which a scale stays


def descend_codes(
    loss: QuadraticLoss,
    grid: RoundingGrid,
    steps: Tensor,
    *,
    low: Tensor | None = None,
    high: Tensor | None = None,
    sweeps: int = 20,
) -> Tensor:
    """Integer steps from which no single move by one level lowers the loss.

    Args:
        loss: to go down.
        grid: whose levels they are.
        steps: ``(rows, cols)`` integers to start from.
        low: the lowest steps allowed, the same shape; None means those of the grid.
        high: the highest.
        sweeps: times to go over all columns at most.
    """
    low = (grid.low if low is None else low).expand_as(steps)
    high = (grid.high if high is None else high).expand_as(steps)
    steps, spread, diagonal = steps.clone(), grid.spread(grid.scale), loss.diagonal
    slope = loss.gradient(grid.values(steps))
    for _ in range(sweeps):
        moved = False
        for j in range(steps.shape[1]):
            new, change = _best_move(
                steps[:, j], grid, spread[:, j], slope[:, j], diagonal[:, j], low[:, j], high[:, j]
            )
            if bool(change.any()):
                moved = True
                steps[:, j] = new
                slope += 2 * loss.times(change[:, None], slice(j, j + 1))
        if not moved:
            break
    return steps


def _best_move(
    steps: Tensor,
    grid: RoundingGrid,
    scale: Tensor,
    slope: Tensor,
    curvature: Tensor,
    low: Tensor,
    high: Tensor,
) -> tuple[Tensor, Tensor]:
    """New steps of one column, and the changes of its weights; 0 where no move helps."""
    value = grid.unit_values(steps)
    best, change, least = steps, torch.zeros_like(scale), torch.zeros_like(scale)
    for direction in (-1.0, 1.0):
        moved = steps + direction
        delta = scale * (grid.unit_values(moved) - value)
        gain = slope * delta + _MARGIN * curvature * delta.square()
        better = (gain < least) & (moved >= low) & (moved <= high)
        best = torch.where(better, moved, best)
        change = torch.where(better, delta, change)
        least = torch.where(better, gain, least)
    return best, change


def fit_scales(
    loss: QuadraticLoss, grid: RoundingGrid, steps: Tensor, *, rounds: int = 3
) -> Tensor:
    """Scales of less loss for the given steps, of the shape of ``grid.scale``.

    Each in turn takes its best value between half of and twice what it was; ``rounds`` times over.
    """
    unit = grid.unit_values(steps)
    scale = grid.scale.clone()
    slope = loss.gradient(grid.spread(scale) * unit)
    columns = steps.shape[1]
    low, high = (factor * grid.scale for factor in _LIMITS)
    for _ in range(rounds):
        if grid.group_dim == 1:
            for group in range(scale.shape[1]):
                part = slice(group * grid.group_size, min(columns, (group + 1) * grid.group_size))
                push = loss.times(unit[:, part], part)
                curvature = (push[:, part] * unit[:, part]).sum(1)
                best = _best_scale(
                    scale[:, group], (slope[:, part] * unit[:, part]).sum(1), curvature
                ).clamp(low[:, group], high[:, group])
                change, scale[:, group] = best - scale[:, group], best
                slope += 2 * change[:, None] * push
            continue
        diagonal = loss.diagonal
        for j in range(columns):
            along = unit[:, j]
            slopes = _per_group(slope[:, j] * along, grid.group_size)
            curvature = _per_group(along.square() * diagonal[:, j], grid.group_size)
            best = _best_scale(scale[:, j], slopes, curvature).clamp(low[:, j], high[:, j])
            change, scale[:, j] = best - scale[:, j], best
            wide = change.repeat_interleave(grid.group_size)[: len(along)] * along
            slope += 2 * loss.times(wide[:, None], slice(j, j + 1))
    return scale


def _best_scale(scale: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
    exact = scale - slope / (2 * curvature.clamp(min=torch.finfo(curvature.dtype).tiny))
    return torch.where(curvature > 0, exact, scale)


def _per_group(values: Tensor, size: int) -> Tensor:
    padded = torch.nn.functional.pad(values, (0, -len(values) % size))
    return padded.reshape(-1, size).sum(1)
