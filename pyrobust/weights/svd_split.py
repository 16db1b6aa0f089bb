"""Split a matrix into its leading singular triples and a residual."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrobust._checks import check_choice, check_finite, check_integer

__all__ = ["SVDSplit", "rank_for_energy", "svd_split"]


@dataclass(frozen=True)
class SVDSplit:
    """``matrix = u @ diag(s) @ vh + residual`` in float32 (float64 for float64 input).

    Attributes:
        u: ``(rows, rank)``, orthonormal columns.
        s: ``(rank,)``, non-increasing, ``>= 0``.
        vh: ``(rank, columns)``, orthonormal rows.
        residual: ``(rows, columns)``.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    residual: Tensor

    @property
    def rank(self) -> int:
        """Number of triples."""
        return self.s.numel()


def rank_for_energy(values: Tensor, energy: float, *, measure: str = "sum") -> int:
    """Smallest rank whose share of the spectrum reaches ``energy``.

    Args:
        values: ``(n,)`` singular values, non-increasing.
        energy: in ``(0, 1]``.
        measure: "sum" of the singular values or "squares".

    Returns:
        A rank in ``[1, n]``; 1 for a zero matrix.

    Raises:
        ValueError: ``energy`` or ``measure`` is not accepted.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"rank_for_energy: energy must lie in (0, 1]; got {energy}.")
    check_choice("rank_for_energy", "measure", measure, ["sum", "squares"])
    weights = values.double() if measure == "sum" else values.double().square()
    total = weights.sum()
    if total == 0:
        return 1
    share = torch.cumsum(weights, 0) / total
    # the last share may round below 1, so a rank beyond the values is brought back
    return min(int((share < energy).sum()) + 1, values.numel())


def svd_split(
    matrix: Tensor,
    *,
    rank: int | None = None,
    energy: float = 0.99,
    measure: str = "sum",
) -> SVDSplit:
    """Leading singular triples of ``matrix`` and the rest.

    Args:
        matrix: ``(rows, columns)`` floating point; half precisions are decomposed in float32.
        rank: number of triples in ``[1, min(rows, columns)]``; None chooses by ``energy``.
        energy: see :func:`rank_for_energy`; used when ``rank`` is None.
        measure: see :func:`rank_for_energy`.

    Returns:
        The split. At full rank the residual is the rounding error of the decomposition.

    Raises:
        ValueError: not a matrix, NaN or infinite values, or rank out of range.
    """
    if matrix.ndim != 2:
        raise ValueError(f"svd_split: matrix must be 2-D; got shape {tuple(matrix.shape)}.")
    check_finite("svd_split", "matrix", matrix)
    wide = matrix.detach() if matrix.dtype == torch.float64 else matrix.detach().float()
    if rank is not None:
        check_integer("svd_split", "rank", rank, 1)
        if rank > min(matrix.shape):
            raise ValueError(f"svd_split: rank must be at most {min(matrix.shape)}; got {rank}.")
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    r = rank_for_energy(s, energy, measure=measure) if rank is None else rank
    u, s, vh = u[:, :r].contiguous(), s[:r].contiguous(), vh[:r].contiguous()
    return SVDSplit(u, s, vh, wide - (u * s) @ vh)
