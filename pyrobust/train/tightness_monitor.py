"""TightnessMonitor: propagation tightness recorded while a network trains.

Source: Mao, Mueller, Fischer, Vechev, ICLR 2024, arXiv 2306.10426 (figures over training);
:mod:`pyrobust.certify.propagation_tightness` measures.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyrobust._checks import check_at_least, check_integer, require_extra
from pyrobust.certify.propagation_tightness import propagation_tightness
from pyrobust.evaluate.attack_objective import evaluation_mode
from pyrobust.train.loop import Objective

__all__ = ["TightnessMonitor"]


class TightnessMonitor:
    """An objective of :func:`pyrobust.train.fit` that measures tightness now and then.

    Args:
        objective: what is trained; its value is passed on unchanged.
        x: ``(N, ...)`` inputs to measure at; a few suffice.
        eps: radius of the boxes, ``>= 0``.
        y: ``(N,)`` classes: measure margins; None for outputs.
        every: steps between measurements, ``>= 1``; the first step is measured.
        clamp: range of valid inputs; None for any.

    Attributes:
        history: ``(done, mean tightness)`` pairs, ``done`` the share of training.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        objective: Objective,
        x: Tensor,
        eps: float,
        *,
        y: Tensor | None = None,
        every: int = 100,
        clamp: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        check_at_least("TightnessMonitor", "eps", eps, 0.0)
        check_integer("TightnessMonitor", "every", every, 1)
        self.objective, self.x, self.eps, self.y = objective, x, eps, y
        self.every, self.clamp = every, clamp
        self.history: list[tuple[float, float]] = []
        self._calls = 0

    def __call__(self, model: nn.Module, x: Tensor, labels: Tensor, done: float) -> Tensor:
        """The objective of a batch; measures the model in evaluation mode where it is due."""
        if self._calls % self.every == 0:
            with evaluation_mode(model):
                ratio = propagation_tightness(model, self.x, self.eps, self.y, clamp=self.clamp)
            self.history.append((done, float(ratio.mean())))
        self._calls += 1
        return self.objective(model, x, labels, done)

    def plot(self, ax: Any = None, *, label: str | None = None) -> Any:
        """Draw tightness over training on a logarithmic axis; needs matplotlib."""
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise require_extra("TightnessMonitor.plot", "matplotlib", "plot") from error
        if ax is None:
            ax = pyplot.subplots()[1]
        ax.semilogy(*zip(*self.history, strict=True), label=label)
        ax.set(xlabel="share of training", ylabel="propagation tightness")
        return ax
