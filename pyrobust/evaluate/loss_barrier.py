"""Loss barrier: how far the loss rises on the straight line between two networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyrobust._checks import check_integer, require_extra
from pyrobust.weights.batch_norm import reset_batchnorm
from pyrobust.weights.interpolate import interpolate
from pyrobust.weights.weight_matching import check_loader

__all__ = ["BarrierCurve", "loss_barrier"]


@dataclass(frozen=True)
class BarrierCurve:
    """Losses along a line.

    Attributes:
        lambdas: ``(n,)`` positions, 0 is ``a`` and 1 is ``b``.
        losses: ``(n,)`` float64.
    """

    lambdas: Tensor
    losses: Tensor

    @property
    def excess(self) -> Tensor:
        """``(n,)``: the loss above the chord between the end points."""
        return self.losses - torch.lerp(self.losses[0], self.losses[-1], self.lambdas)

    @property
    def barrier(self) -> float:
        """The largest excess; 0 or more, as the end points have none."""
        return float(self.excess.max())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a file."""
        return {
            "lambdas": self.lambdas.tolist(),
            "losses": self.losses.tolist(),
            "barrier": self.barrier,
        }

    def plot(self, ax: Any = None, **line: Any) -> Any:
        """Draw the losses over the line with matplotlib; returns the axes."""
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise require_extra("BarrierCurve.plot", "matplotlib", "plot") from error
            ax = pyplot.subplots()[1]
        ax.plot(self.lambdas, self.losses, **line)
        ax.set(xlabel="position between a and b", ylabel="loss")
        return ax


def loss_barrier(
    a: nn.Module,
    b: nn.Module,
    loss_fn: Callable[[nn.Module], float],
    n: int = 25,
    *,
    loader: Iterable[Any] | None = None,
    reset_bn: bool = True,
) -> BarrierCurve:
    """Losses at ``n`` points of the line from ``a`` to ``b``.

    Args:
        a: one end point; not changed.
        b: the other, of the same architecture (and matched, for a flat line); not changed.
        loss_fn: a model's loss on the data of interest (training or test).
        n: points, ``>= 2``, both ends included.
        loader: training batches, to estimate the running statistics of batch norms anew.
        reset_bn: False keeps interpolated statistics.

    Raises:
        ValueError: the states differ, or batch norms would be averaged without a loader.
    """
    check_integer("loss_barrier", "n", n, 2)
    check_loader("loss_barrier", a, loader, reset_bn)
    probe = copy.deepcopy(a)
    ends = a.state_dict(), b.state_dict()
    lambdas = torch.linspace(0, 1, n, dtype=torch.float64)
    losses = []
    for position in lambdas.tolist():
        probe.load_state_dict(interpolate(*ends, position))
        if reset_bn and loader is not None and 0 < position < 1:
            reset_batchnorm(probe, loader)
        losses.append(float(loss_fn(probe)))
    return BarrierCurve(lambdas, torch.tensor(losses, dtype=torch.float64))
