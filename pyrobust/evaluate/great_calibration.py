"""Temperature of the GREAT score, calibrated on several models against a reference.

Source: Z. Li, P.-Y. Chen, T.-Y. Ho, "GREAT Score: Global Robustness Evaluation of Adversarial
Perturbation using Generative Models", NeurIPS 2024, arXiv 2304.09875, section 3.5.
Departures: the grid is searched on cached logits, no model runs again; ties take the smallest
temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from pyrobust._checks import check_choice, check_finite, check_float_tensor, check_shape
from pyrobust.evaluate.confidence_margin import (
    GREAT_SCORE_MAX,
    SQUASHINGS,
    check_labels,
    confidence_margin,
)

__all__ = ["CalibratedGreatScore", "calibrate_great_score"]


@dataclass(frozen=True)
class CalibratedGreatScore:
    """Result of :func:`calibrate_great_score` over ``m`` models.

    Attributes:
        temperature: the chosen temperature.
        scores: ``(m,)`` float64 GREAT scores at it.
        correlation: their Spearman correlation with the reference.
        activation: squashing of the logits.
        temperatures: ``(t,)`` float64, every temperature tried.
        correlations: ``(t,)`` float64 correlation at each; NaN where all scores are equal.
        feasible: ``(t,)`` bool, whether every score stays at or below its upper bound.
    """

    temperature: float
    scores: Tensor
    correlation: float
    activation: str
    temperatures: Tensor
    correlations: Tensor
    feasible: Tensor

    def summary(self) -> str:
        """One line for people."""
        kept = f"{int(self.feasible.sum())} of {len(self.feasible)} temperatures feasible"
        return (
            f"{self.activation} at temperature {self.temperature:g}: Spearman "
            f"{self.correlation:.3f} over {len(self.scores)} models; {kept}"
        )


def calibrate_great_score(
    logits_per_model: Tensor,
    labels: Tensor,
    reference: Tensor | Sequence[float],
    *,
    upper: Tensor | Sequence[float] | None = None,
    activation: str = "sigmoid",
    temperatures: Tensor | Sequence[float] | None = None,
    progress: bool = False,
) -> CalibratedGreatScore:
    """Choose the temperature at which the scores of several models rank like a reference.

    The temperature maximises Spearman's correlation with ``reference`` among those at which no
    score exceeds its model's ``upper``; of several the smallest.

    Args:
        logits_per_model: ``(m, n, K)`` float logits of ``m >= 2`` models on the same samples.
        labels: ``(n,)`` int64 in ``[0, K)``.
        reference: ``(m,)`` robustness of each model, such as accuracy under attack.
        upper: ``(m,)`` upper bounds of the true robustness, such as the mean l2 distortion of an
            attack; None constrains nothing.
        activation: as in :func:`~pyrobust.evaluate.squash`.
        temperatures: grid of values ``> 0``; None takes the paper's, 1e-4 to 2 in steps of 1e-4.
        progress: show a progress bar.

    Returns:
        The choice, with the correlation and the feasibility of every temperature.

    Raises:
        TypeError: logits are not float or labels not integers.
        ValueError: sizes disagree, a value is NaN, a temperature is not positive, the scores are
            equal at every temperature, or every temperature breaks an upper bound (the message
            says which comes closest).
    """
    subject = "calibrate_great_score"
    check_float_tensor(subject, "logits_per_model", logits_per_model)
    check_shape(subject, "logits_per_model", logits_per_model, (None, None, None))
    models, count, classes = logits_per_model.shape
    if models < 2:
        raise ValueError(f"{subject}: logits_per_model must hold at least 2 models; got {models}.")
    check_finite(subject, "logits_per_model", logits_per_model)
    check_labels(subject, labels, count, classes)
    check_choice(subject, "activation", activation, SQUASHINGS)
    grid = _grid(subject, temperatures)
    target = _per_model(subject, "reference", reference, models)
    limit = torch.full((models,), torch.inf, dtype=torch.float64)
    if upper is not None:
        limit = _per_model(subject, "upper", upper, models)
    logits = logits_per_model.detach().cpu().double()
    rows = [
        GREAT_SCORE_MAX
        * confidence_margin(SQUASHINGS[activation](logits, t), labels.cpu()).clamp(min=0).mean(-1)
        for t in tqdm(grid.tolist(), desc=subject, disable=not progress)
    ]
    scores = torch.stack(rows)
    feasible = (scores <= limit).all(-1)
    correlations = _spearman(scores, target)
    best = _choose(subject, grid, scores - limit, feasible, correlations)
    return CalibratedGreatScore(
        temperature=float(grid[best]),
        scores=scores[best],
        correlation=float(correlations[best]),
        activation=activation,
        temperatures=grid,
        correlations=correlations,
        feasible=feasible,
    )


def _grid(subject: str, temperatures: Tensor | Sequence[float] | None) -> Tensor:
    if temperatures is None:
        return torch.arange(1, 20001, dtype=torch.float64) * 1e-4
    grid = torch.as_tensor(temperatures, dtype=torch.float64).flatten()
    if len(grid) == 0 or not bool(((grid > 0) & torch.isfinite(grid)).all()):
        raise ValueError(f"{subject}: temperatures must be finite and positive; got {grid}.")
    return grid


def _per_model(subject: str, name: str, values: Tensor | Sequence[float], models: int) -> Tensor:
    tensor = torch.as_tensor(values, dtype=torch.float64).cpu()
    check_shape(subject, name, tensor, (models,))
    if bool(torch.isnan(tensor).any()):
        raise ValueError(f"{subject}: {name} must not hold NaN.")
    return tensor


def _spearman(scores: Tensor, target: Tensor) -> Tensor:
    """``(t,)`` rank correlations of rows with ``target``; NaN where a row is constant."""
    ranks = stats.rankdata(scores.numpy(), axis=1)
    wanted = stats.rankdata(target.numpy())
    ranks = ranks - ranks.mean(1, keepdims=True)
    wanted = wanted - wanted.mean()
    with np.errstate(invalid="ignore"):
        result = ranks @ wanted / np.sqrt((ranks**2).sum(1) * (wanted**2).sum())
    return torch.from_numpy(result)


def _choose(
    subject: str, grid: Tensor, excess: Tensor, feasible: Tensor, correlations: Tensor
) -> int:
    if not bool(feasible.any()):
        worst = excess.amax(-1)
        closest = int(worst.argmin())
        raise ValueError(
            f"{subject}: at every temperature a score exceeds its upper bound; the closest is "
            f"{float(grid[closest]):g}, by {float(worst[closest]):.3g}."
        )
    usable = feasible & ~correlations.isnan()
    if not bool(usable.any()):
        raise ValueError(f"{subject}: the scores or the reference are equal for all models.")
    return int(torch.where(usable, correlations, -torch.inf).argmax())
