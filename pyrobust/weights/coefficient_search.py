"""The loop behind every learned composition: AdamW on coefficients, the best epoch kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyrobust.weights.anisotropic_composition import AnisotropicComposition

__all__ = ["CoefficientSearch", "Fitting", "Head", "Loader", "accuracy_of", "run_epochs"]

Head = Callable[[Any], Tensor]
Loader = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class CoefficientSearch:
    """What a search over coefficients found; the composition holds the chosen coefficients.

    Attributes:
        epoch: the chosen epoch, counted from 1; 0 is the start.
        score: its value of the criterion (see the function that returns this).
        history: one dict for each epoch, the start first: figures by name.
    """

    epoch: int
    score: float
    history: tuple[dict[str, float], ...]


class Fitting:
    """AdamW on the coefficients alone, with clipping, and the best epoch kept."""

    def __init__(
        self,
        composition: AnisotropicComposition,
        *,
        lr: float,
        weight_decay: float,
        clip: float | None = 1.0,
        penalty: tuple[int, float] | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.composition, self.clip, self.penalty = composition, clip, penalty
        self.autocast = autocast
        self.optimizer = torch.optim.AdamW(
            [composition.coefficients], lr=lr, weight_decay=weight_decay
        )
        self.best = composition.coefficients.detach().clone()

    def step(self, loss_of: Callable[[], Tensor]) -> float:
        """One step down ``loss_of()``; returns the loss."""
        device = self.composition.coefficients.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            loss = loss_of()
        if self.penalty is not None:
            loss = loss + self.penalty[1] * self.composition.penalty(self.penalty[0])
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"aTLAS: the loss became {loss.item()}.")
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_([self.composition.coefficients], self.clip)
        self.optimizer.step()
        return float(loss.detach())

    def keep(self) -> None:
        """Remember the present coefficients as the best."""
        self.best = self.composition.coefficients.detach().clone()

    def restore(self) -> None:
        """Go back to the best coefficients."""
        with torch.no_grad():
            self.composition.coefficients.copy_(self.best)


@torch.no_grad()
def accuracy_of(composition: nn.Module, head: Head, loader: Loader) -> float:
    """Share of correct predictions of ``head(composition(x))``."""
    flags = [(module, module.training) for module in composition.modules()]
    right = count = 0
    try:
        composition.eval()
        for x, y in loader:
            right += int((head(composition(x)).argmax(1) == y).sum())
            count += len(y)
    finally:
        for module, training in flags:
            module.training = training
    if count == 0:
        raise ValueError("aTLAS: loaders must yield at least one batch; got 0.")
    return right / count


def run_epochs(
    fitting: Fitting,
    epoch: Callable[[], float],
    judge: Callable[[], dict[str, float]],
    epochs: int,
    progress: bool,
    words: str,
    choose: str = "best",
) -> CoefficientSearch:
    """Run epochs and end with the highest score (the start counts) or, if asked, the last."""
    history = [judge()]
    best = 0
    for number in tqdm(range(1, epochs + 1), words, disable=not progress, unit="epoch"):
        loss = epoch()
        history.append({**judge(), "loss": loss})
        if choose == "last" or history[-1]["score"] > history[best]["score"]:
            best = number
            fitting.keep()
    fitting.restore()
    return CoefficientSearch(best, history[best]["score"], tuple(history))
