"""PowerQuantizer: rounding to nearest on a grid with more levels near zero.

Weights crowd around zero; a power ``a < 1`` spends levels there: ``sign(w) |w|^a`` is what is
rounded to a uniform grid. ``a = 1`` is the uniform grid itself.

Source: Yvinec, Dapogny, Cord, Bailly, "PowerQuant", ICLR 2023, arXiv 2301.09858, as the non-uniform
scheme of the same authors' arXiv 2308.07662.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyrobust._checks import check_finite, check_float_tensor, check_shape
from pyrobust.quantize.hessian import relative_output_error
from pyrobust.quantize.qtensor import QTensor
from pyrobust.quantize.rounding_grid import RoundingGrid, search_grid

__all__ = ["PowerQuantizer"]

_POWERS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


@dataclass(frozen=True)
class PowerQuantizer:
    """A quantizer for ``pyrobust.pack(model, quantizer=PowerQuantizer(0.7))`` at 2, 3 or 4 bits.

    Attributes:
        a: the power, in (0, 1]; None searches 0.4, 0.5, ..., 1 per layer, for the least error of
            the weights (of the outputs, within learned rounding).

    Raises:
        ValueError: ``a`` lies outside (0, 1].

    Example:
        >>> import torch
        >>> weight = torch.tensor([[-1.0, -0.25, 0.0, 0.25]])
        >>> PowerQuantizer(0.5)(weight, bits=3, group_size=4).dequantize().round(decimals=2)
        tensor([[-1.0000, -0.2500,  0.0000,  0.2500]])
    """

    a: float | None = None

    def __post_init__(self) -> None:
        if self.a is not None and not 0 < self.a <= 1:
            raise ValueError(f"PowerQuantizer: a must lie in (0, 1]; got {self.a}.")

    def __call__(
        self,
        weight: Tensor,
        *,
        bits: int,
        group_size: int = 128,
        group_dim: int = 1,
        symmetric: bool = True,
    ) -> QTensor:
        """Round ``weight`` to the nearest level of its grid.

        Args:
            weight: ``(rows, cols)`` floating point, finite.
            bits: 2, 3 or 4 (8 too where ``a`` is 1).
            group_size: weights that share a scale.
            group_dim: 1 or 0.
            symmetric: not used where ``a < 1``: power grids have no zero-points.
        """
        check_float_tensor("PowerQuantizer", "weight", weight)
        check_shape("PowerQuantizer", "weight", weight, (None, None))
        check_finite("PowerQuantizer", "weight", weight)
        weight = weight.detach().float()
        grid = self.grid(
            weight, bits=bits, group_size=group_size, group_dim=group_dim, symmetric=symmetric
        )
        return grid.qtensor(grid.nearest(weight))

    def grid(
        self,
        weight: Tensor,
        *,
        bits: int,
        group_size: int,
        group_dim: int = 1,
        symmetric: bool = True,
        hessian: Tensor | None = None,
    ) -> RoundingGrid:
        """The grid of a weight: with the power ``a``, or with the best one.

        Args:
            weight: ``(rows, cols)`` float32.
            bits: 2, 3 or 4.
            group_size: weights that share a scale.
            group_dim: 1 or 0.
            symmetric: for ``a = 1``.
            hessian: of the inputs, to compare powers by the error of the outputs.
        """
        best, least = None, float("inf")
        for power in _POWERS if self.a is None else (self.a,):
            grid = search_grid(
                weight,
                bits=bits,
                group_size=group_size,
                group_dim=group_dim,
                symmetric=symmetric,
                power=power,
            )
            rounded = grid.qtensor(grid.nearest(weight)).dequantize().to(weight.device)
            error = float((rounded - weight).square().sum())
            if hessian is not None:
                error = relative_output_error(hessian, weight, rounded)
            if error < least or best is None:
                best, least = grid, error
        assert best is not None
        return best
