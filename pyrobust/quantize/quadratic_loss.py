"""The squared error of a layer's outputs as a function of its weight, without the data.

Outputs are linear in the weight, so their mean squared distance from any targets is a quadratic
function: its gradient at one weight and the second moments of the inputs say all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["QuadraticLoss"]

_JITTER = 1e-6  # of the mean of the diagonal: makes the moments invertible


class QuadraticLoss:
    """``loss(W) - loss(base) = <gradient, D> + sum of D A D^T`` for ``D = W - base``.

    Args:
        base: ``(rows, cols)``.
        gradient: of the loss at ``base``, the same shape.
        hessian: as :class:`~pyrobust.quantize.HessianAccumulator` gives it: ``2 A``, ``(cols,
            cols)``, or ``(parts, cols, cols)`` where equal parts of the rows have inputs of their
            own.
        damp: adds the squared distance from ``base``, times this share of the mean of the diagonal
            of ``A``: what few data do not determine stays as it is.
    """

    def __init__(self, base: Tensor, gradient: Tensor, hessian: Tensor, damp: float = 0.0) -> None:
        self.base, self.slope = base, gradient
        moments = (hessian if hessian.ndim == 3 else hessian[None]).to(base) / 2
        diagonal = moments.diagonal(dim1=1, dim2=2)
        self.moments = moments + damp * torch.diag_embed(
            diagonal.mean(1, keepdim=True).expand_as(diagonal)
        )

    @property
    def diagonal(self) -> Tensor:
        """The diagonal of ``A`` for each row of the weight, ``(rows, cols)``."""
        per_part = self.moments.diagonal(dim1=1, dim2=2)
        return per_part.repeat_interleave(len(self.base) // len(per_part), 0)

    def times(self, change: Tensor, columns: slice = slice(None)) -> Tensor:
        """``change A`` for a change of some columns, ``(rows, len(columns))``: ``(rows, cols)``."""
        split = change.reshape(len(self.moments), -1, change.shape[1])
        return (split @ self.moments[:, columns]).flatten(0, 1)

    def gradient(self, weight: Tensor) -> Tensor:
        """Of the loss at ``weight``."""
        return self.slope + 2 * self.times(weight - self.base)

    def value(self, weight: Tensor) -> float:
        """By how much the loss exceeds that of ``base``."""
        change = weight - self.base
        return float(((self.slope + self.times(change)) * change).sum(dtype=torch.float64))

    def minimizer(self) -> Tensor:
        """The real weight of least loss; where that is not determined, one near ``base``."""
        mean = self.moments.diagonal(dim1=1, dim2=2).mean(1)
        mean = _JITTER * torch.where(mean > 0, mean, 1.0)
        eye = torch.eye(self.moments.shape[1], dtype=mean.dtype, device=mean.device)
        split = self.slope.reshape(len(self.moments), -1, self.slope.shape[1])
        moments = self.moments + mean[:, None, None] * eye
        change = torch.linalg.solve(moments, split.transpose(1, 2)).transpose(1, 2)
        best: Tensor = self.base - change.flatten(0, 1) / 2
        return best
