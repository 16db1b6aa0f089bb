"""RoundingGrid: the levels that the weights of one layer may take, and weights as steps on it.

A weight is ``scale * sign(u) |u|^(1/power)`` for a real number ``u``, its steps; the levels are its
values at integers. ``power = 1`` is the uniform grid; smaller powers put more levels near zero.

Source: uniform grids with a searched scale as in Nagel et al., "Up or down? Adaptive rounding for
post-training quantization", ICML 2020, arXiv 2004.10568; power grids of Yvinec, Dapogny, Cord,
Bailly, "PowerQuant", ICLR 2023, arXiv 2301.09858.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrobust._checks import check_choice
from pyrobust.quantize.grid import store_scale
from pyrobust.quantize.power_levels import power_codebook, power_unit
from pyrobust.quantize.qtensor import QTensor

__all__ = ["GRID_BITS", "RoundingGrid", "search_grid"]

GRID_BITS = (2, 3, 4, 8)
_FACTORS = 25  # scales tried, from 0.4 to 1 of the one that covers the group


@dataclass(frozen=True)
class RoundingGrid:
    """The grid of a ``(rows, cols)`` weight.

    Attributes:
        scale: positive float32, one per group: ``(rows, groups)`` or ``(groups, cols)``.
        zero: the code of 0 per group, float32 integers, or None for ``2^(bits - 1)``.
        bits: 2, 3, 4 or 8.
        shape: ``(rows, cols)``.
        group_size: weights that share a scale.
        group_dim: 1 or 0.
        power: in (0, 1].
    """

    scale: Tensor
    zero: Tensor | None
    bits: int
    shape: tuple[int, int]
    group_size: int
    group_dim: int = 1
    power: float = 1.0

    def spread(self, per_group: Tensor) -> Tensor:
        """One entry per weight from one per group."""
        wide = per_group.repeat_interleave(self.group_size, self.group_dim)
        return wide.narrow(self.group_dim, 0, self.shape[self.group_dim])

    @property
    def low(self) -> Tensor:
        """The lowest step of each weight (or of all, as a scalar)."""
        if self.zero is None:
            return torch.tensor(-(2.0 ** (self.bits - 1)), device=self.scale.device)
        return -self.spread(self.zero)

    @property
    def high(self) -> Tensor:
        """The highest step of each weight (or of all, as a scalar)."""
        return self.low + float(2**self.bits - 1)

    def steps(self, weight: Tensor) -> Tensor:
        """``u``: the real steps of a weight, not clipped."""
        ratio = weight / self.spread(self.scale)
        return ratio if self.power == 1.0 else ratio.sign() * ratio.abs().pow(self.power)

    def values(self, steps: Tensor, scale: Tensor | None = None) -> Tensor:
        """The weight at real steps: the inverse of :meth:`steps`, differentiable.

        Args:
            steps: ``(rows, cols)``.
            scale: in place of the grid's own.
        """
        return self.spread(self.scale if scale is None else scale) * self.unit_values(steps)

    def unit_values(self, steps: Tensor) -> Tensor:
        """The values at a scale of 1."""
        if self.power == 1.0:
            return steps
        # |u|^(1/power) has no second derivative trouble: 1/power >= 1.
        return steps.sign() * steps.abs() ** (1 / self.power)

    def nearest(self, weight: Tensor) -> Tensor:
        """The integer steps whose value is closest."""
        floor = torch.floor(self.steps(weight))
        candidates = [torch.minimum(torch.maximum(floor + i, self.low), self.high) for i in (0, 1)]
        errors = [(self.values(each) - weight).abs() for each in candidates]
        return torch.where(errors[1] < errors[0], candidates[1], candidates[0])

    def as_stored(self) -> RoundingGrid:
        """The grid whose scales are those that :meth:`qtensor` stores."""
        if self.power != 1.0:
            unit = power_unit(self.bits, self.power)
            return replace(self, scale=(_stored(self.scale * unit) / unit).to(self.scale))
        return replace(self, scale=_stored(self.scale).to(self.scale))

    def qtensor(self, steps: Tensor) -> QTensor:
        """Integer steps as packed codes; scales are rounded to what a packed weight stores.

        Args:
            steps: ``(rows, cols)`` integers between :attr:`low` and :attr:`high`.
        """
        codes = (steps - self.low).to(torch.uint8).cpu()
        layout: dict[str, Any] = {
            "bits": self.bits,
            "group_size": self.group_size,
            "group_dim": self.group_dim,
        }
        if self.power != 1.0:
            scale = _stored(self.scale * power_unit(self.bits, self.power))
            book = power_codebook(self.bits, self.power)
            return QTensor.from_codes(codes, scale, **layout, codebook=book)
        zero = None if self.zero is None else self.zero.to(torch.uint8).cpu()
        return QTensor.from_codes(codes, _stored(self.scale), zero, **layout)


def _stored(scale: Tensor) -> Tensor:
    return store_scale(scale.detach().float().cpu(), up=False)


def search_grid(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    group_dim: int = 1,
    symmetric: bool = True,
    power: float = 1.0,
) -> RoundingGrid:
    """The grid with the least squared error of rounding to nearest, group by group.

    25 scales are tried, from 0.4 to 1 times the one that covers the group.

    Args:
        weight: ``(rows, cols)`` float.
        bits: 2 to 8 (2, 3 or 4 where ``power < 1``); only 2, 3, 4 and 8 can be packed.
        group_size: weights that share a scale; the last group may be shorter.
        group_dim: 1 or 0.
        symmetric: without zero-points; always so where ``power < 1``.
        power: in (0, 1].

    Raises:
        ValueError: ``bits`` is another number.
    """
    check_choice("search_grid", "bits", bits, range(2, 9) if power == 1.0 else GRID_BITS[:3])
    weight = weight.detach().float()
    along = weight if group_dim == 1 else weight.t()
    size = min(group_size, max(1, along.shape[1]))
    groups = torch.nn.functional.pad(along, (0, -along.shape[1] % size))
    groups = groups.reshape(along.shape[0], -1, size)
    symmetric = symmetric or power != 1.0
    best = _search(groups, bits, symmetric, power)
    scale, zero = best
    if group_dim == 0:
        scale, zero = scale.t().contiguous(), None if zero is None else zero.t().contiguous()
    shape = (weight.shape[0], weight.shape[1])
    return RoundingGrid(scale, zero, bits, shape, size, group_dim, power)


def _search(
    groups: Tensor, bits: int, symmetric: bool, power: float
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of each group of ``(lines, groups, size)``."""
    flat = groups.flatten(0, 1)
    shape = (flat.shape[0], flat.shape[1])
    best: RoundingGrid | None = None
    least = torch.full(shape[:1], torch.inf, device=groups.device)
    for factor in torch.linspace(1.0, 0.4, _FACTORS).tolist():
        grid = _covering(flat, bits, symmetric, power, factor, shape)
        error = (grid.values(grid.nearest(flat)) - flat).square().sum(1)
        better = error < least
        least = torch.where(better, error, least)
        if best is None:
            best = grid
        else:
            keep = better[:, None]
            zero = None
            if grid.zero is not None and best.zero is not None:
                zero = torch.where(keep, grid.zero, best.zero)
            best = replace(best, scale=torch.where(keep, grid.scale, best.scale), zero=zero)
    assert best is not None
    lines = groups.shape[:2]
    zero = None if best.zero is None else best.zero.reshape(lines)
    return best.scale.reshape(lines), zero


def _covering(
    flat: Tensor, bits: int, symmetric: bool, power: float, factor: float, shape: tuple[int, int]
) -> RoundingGrid:
    """The grid that covers ``factor`` of the range of each line."""
    levels, zero = 2**bits, None
    if symmetric:
        top = levels // 2 - 1
        scale = flat.abs().amax(1, keepdim=True) * (factor / top) ** (1 / power)
    else:
        low = flat.amin(1, keepdim=True).clamp(max=0) * factor
        high = flat.amax(1, keepdim=True).clamp(min=0) * factor
        scale = high / (levels - 1) - low / (levels - 1)
    scale = _stored(torch.where(scale > 0, scale, 1.0)).float().to(flat.device)
    if not symmetric:
        zero = torch.round(-low / scale).clamp(0, levels - 1)
    return RoundingGrid(scale, zero, bits, shape, shape[1], 1, power)
