"""GREAT score: rank classifiers by robustness on generated samples, one forward pass each.

Labelled samples come from a generative model (or from anywhere); each sample's confidence margin is
turned into an l2 "attack-proof level" and averaged. No attack and no gradient is needed, so remote
models that return only scores can be audited, and subgroups by generating one at a time.

**It is a score, not a certificate.** The factor sqrt(pi / 2) is the inverse Lipschitz constant of
a function *convolved with a Gaussian* of standard deviation 1; the raw classifier need not have
it, and for a steep linear classifier the score exceeds the true distance to the boundary many
times over (tests/evaluate/test_great_score.py). ``certified`` is therefore always False here.
:func:`pyrobust.certify.smoothed_great_score` is the sound variant.

Source: Z. Li, P.-Y. Chen, T.-Y. Ho, "GREAT Score: Global Robustness Evaluation of Adversarial
Perturbation using Generative Models", NeurIPS 2024, arXiv 2304.09875; local score (equation 6),
score (equation 8); the calibration stands in `great_calibration.py`.
Departures: the sample size follows from Hoeffding's inequality for values in [0, sqrt(pi / 2)],
which is tighter than the paper's bound; the interval is the empirical Bernstein bound of A. Maurer
and M. Pontil, COLT 2009, theorem 4.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyrobust._checks import (
    check_choice,
    check_eval_mode,
    check_float_tensor,
    check_integer,
    check_open_unit,
    check_positive,
    check_shape,
)
from pyrobust.certify.statistics import empirical_bernstein_margin
from pyrobust.evaluate.confidence_margin import (
    GREAT_SCORE_MAX,
    SQUASHINGS,
    check_labels,
    confidence_margin,
    squash,
)

__all__ = [
    "GreatScore",
    "great_sample_size",
    "great_score",
    "great_score_from_logits",
    "merge_great_scores",
]


@dataclass(frozen=True)
class GreatScore:
    """A GREAT score with its parts.

    Attributes:
        value: mean local score, in ``[0, sqrt(pi / 2)]``, l2 units of the input.
        local: ``(n,)`` float64 local scores; 0 where the model is wrong.
        accuracy: share of samples classified as their label.
        ci: confidence interval of the expected local score over the sample distribution, for
            independent samples.
        confidence: confidence of ``ci``.
        n: number of samples.
        activation: squashing of the logits.
        temperature: its temperature.
        groups: mean local score by group, or None.
        certified: False: the score bounds no distance (module docstring).
    """

    value: float
    local: Tensor
    accuracy: float
    ci: tuple[float, float]
    confidence: float
    n: int
    activation: str
    temperature: float
    groups: dict[int, float] | None = None
    certified: bool = False

    def summary(self) -> str:
        """One line for people."""
        low, high = self.ci
        return (
            f"GREAT score {self.value:.4f} [{low:.4f}, {high:.4f}] at {self.confidence:.0%}, "
            f"accuracy {self.accuracy:.1%}, {self.n} samples, {self.activation} at temperature "
            f"{self.temperature:g} (a score, not a certificate)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON."""
        result = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**result, "local": self.local.tolist(), "ci": list(self.ci)}


def great_sample_size(eps: float, delta: float) -> int:
    """Samples that bring the mean local score within ``eps`` of its expectation.

    Hoeffding's inequality for values in ``[0, sqrt(pi / 2)]``, two-sided.

    Args:
        eps: accepted error, ``> 0``, in the units of the score.
        delta: probability of a larger error, in (0, 1).

    Returns:
        The smallest ``n >= pi ln(2 / delta) / (4 eps^2)``.

    Raises:
        ValueError: ``eps`` is not positive or ``delta`` outside (0, 1).

    Example:
        >>> great_sample_size(0.05, 0.05)
        1159
    """
    check_positive("great_sample_size", "eps", eps)
    check_open_unit("great_sample_size", "delta", delta)
    return math.ceil(math.pi * math.log(2 / delta) / (4 * eps * eps))


def great_score(
    model: nn.Module,
    samples: Tensor,
    labels: Tensor,
    *,
    activation: str = "sigmoid",
    temperature: float = 1.0,
    batch_size: int = 256,
    confidence: float = 0.95,
    groups: Tensor | None = None,
    progress: bool = False,
) -> GreatScore:
    """The GREAT score of a model on labelled samples.

    Args:
        model: classifier in evaluation mode, ``(B, ...)`` to ``(B, K)`` logits; float or packed.
        samples: ``(n, ...)`` float, ``n >= 1``, in the model's own input range, on any device; see
            :func:`pyrobust.data.draw_labelled` for samples from a generative model.
        labels: ``(n,)`` int64 in ``[0, K)``.
        activation: as in :func:`~pyrobust.evaluate.squash`. It changes the ranking: softmax
            rewards confidence, right or not.
        temperature: ``> 0``; see :func:`calibrate_great_score`.
        batch_size: samples per forward pass; it changes the speed only.
        confidence: of the interval, in (0, 1).
        groups: ``(n,)`` int64 group of each sample, for an audit by subgroup.
        progress: show a progress bar.

    Returns:
        The score.

    Raises:
        TypeError: samples are not float or labels not integers.
        ValueError: the model is in training mode, there is no sample, a label is out of range, the
            logits hold NaN, or an option is out of range.
    """
    subject = "great_score"
    check_float_tensor(subject, "samples", samples)
    check_integer(subject, "batch_size", batch_size, 1)
    check_eval_mode(subject, model)
    _check_options(subject, activation, temperature, confidence)
    starts = range(0, len(samples), batch_size)
    with torch.no_grad():
        parts = [
            model(samples[i : i + batch_size])
            for i in tqdm(starts, desc=subject, disable=not progress)
        ]
    logits = torch.cat(parts) if parts else torch.zeros(0, 2)
    return _score(subject, logits, labels, activation, temperature, confidence, groups)


def great_score_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    activation: str = "sigmoid",
    temperature: float = 1.0,
    confidence: float = 0.95,
    groups: Tensor | None = None,
) -> GreatScore:
    """The GREAT score of a model known only by its outputs, as behind a remote interface.

    Args:
        logits: ``(n, K)`` float, ``n >= 1``. A warning says when they look like probabilities.
        labels: ``(n,)`` int64 in ``[0, K)``.
        activation: as in :func:`~pyrobust.evaluate.squash`.
        temperature: ``> 0``.
        confidence: of the interval, in (0, 1).
        groups: ``(n,)`` int64 group of each sample.

    Raises:
        TypeError: logits are not float or labels not integers.
        ValueError: as :func:`great_score`.

    Example:
        >>> score = great_score_from_logits(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        >>> score.value, score.certified
        (0.0, False)
    """
    subject = "great_score_from_logits"
    check_float_tensor(subject, "logits", logits)
    _check_options(subject, activation, temperature, confidence)
    return _score(subject, logits, labels, activation, temperature, confidence, groups)


def merge_great_scores(parts: Sequence[GreatScore]) -> GreatScore:
    """The score over all samples of several, as when samples were sharded over processes.

    Args:
        parts: scores of one model with the same options; their order is the order of samples.

    Returns:
        The score that one call over all samples gives, groups included where every part has them.

    Raises:
        ValueError: there is no part, or their options differ.
    """
    if not parts:
        raise ValueError("merge_great_scores: parts must not be empty.")
    options = {(p.activation, p.temperature, p.confidence) for p in parts}
    if len(options) > 1:
        raise ValueError(
            "merge_great_scores: parts must share activation, temperature and confidence; got "
            f"{sorted(options)}."
        )
    local = torch.cat([part.local for part in parts])
    count = len(local)
    first = parts[0]
    return GreatScore(
        value=float(local.mean()),
        local=local,
        accuracy=sum(p.accuracy * p.n for p in parts) / count,
        ci=_interval(local, first.confidence),
        confidence=first.confidence,
        n=count,
        activation=first.activation,
        temperature=first.temperature,
    )


def _check_options(subject: str, activation: str, temperature: float, confidence: float) -> None:
    check_choice(subject, "activation", activation, SQUASHINGS)
    check_positive(subject, "temperature", temperature)
    check_open_unit(subject, "confidence", confidence)


def _score(
    subject: str,
    logits: Tensor,
    labels: Tensor,
    activation: str,
    temperature: float,
    confidence: float,
    groups: Tensor | None,
) -> GreatScore:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"{subject}: logits must have shape (n, K) with K >= 2; got {tuple(logits.shape)}."
        )
    check_labels(subject, labels, *logits.shape)
    if bool(torch.isnan(logits).any()):
        raise ValueError(f"{subject}: logits must not be NaN; sample {_first_nan(logits)} is.")
    wide, target = logits.detach().cpu().double(), labels.cpu().long()
    _warn_of_probabilities(subject, wide)
    margin = confidence_margin(squash(wide, activation, temperature), target)
    local = GREAT_SCORE_MAX * margin.clamp(min=0)
    return GreatScore(
        value=float(local.mean()),
        local=local,
        accuracy=float((wide.argmax(-1) == target).double().mean()),
        ci=_interval(local, confidence),
        confidence=confidence,
        n=len(local),
        activation=activation,
        temperature=temperature,
        groups=None if groups is None else _group_means(subject, local, groups),
    )


def _first_nan(logits: Tensor) -> int:
    return int(torch.isnan(logits).any(-1).nonzero()[0])


def _warn_of_probabilities(subject: str, logits: Tensor) -> None:
    inside = bool(((logits >= 0) & (logits <= 1)).all())
    if inside and bool(((logits.sum(-1) - 1).abs() < 1e-4).all()):
        warnings.warn(
            f"{subject}: the logits lie in [0, 1] and sum to 1 like probabilities; pass logits, "
            "or their logarithm, unless they really are such.",
            stacklevel=4,
        )


def _interval(local: Tensor, confidence: float) -> tuple[float, float]:
    mean = float(local.mean())
    margin = float(
        empirical_bernstein_margin(local, (1 - confidence) / 2, span=GREAT_SCORE_MAX, dim=0)
    )
    return max(mean - margin, 0.0), min(mean + margin, GREAT_SCORE_MAX)


def _group_means(subject: str, local: Tensor, groups: Tensor) -> dict[int, float]:
    check_shape(subject, "groups", groups, (len(local),))
    return {int(g): float(local[groups.cpu() == g].mean()) for g in groups.cpu().unique()}
