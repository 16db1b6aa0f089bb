"""The sound variant of the GREAT score: certified l2 radii of smoothed confidences, averaged.

For a label ``y`` the smoothed margin ``m_k(x) = E[a_y(f(x + sigma e)) - a_k(f(x + sigma e))]``,
``e`` standard normal, has values in [-1, 1] and changes by at most ``sqrt(2 / pi) / sigma`` per
unit of l2 distance. So the smoothed classifier, which answers with the largest mean score, answers
``y`` within ``sigma sqrt(pi / 2) min_k m_k``, and a lower confidence bound of the margins gives a
certified radius.

Source: Z. Li, P.-Y. Chen, T.-Y. Ho, "GREAT Score", NeurIPS 2024, arXiv 2304.09875 (the score);
H. Salman et al., "Provably Robust Deep Learning via Adversarially Trained Smoothed Classifiers",
NeurIPS 2019, arXiv 1906.04584, lemma 1 (the Lipschitz constant).
Departures: the statement is about the smoothed classifier, for which it is true; margins are
bounded by the empirical Bernstein inequality with a union over the other classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyrobust._checks import check_choice, check_integer, check_open_unit, check_positive
from pyrobust.certify.certificates import ABSTAIN, Certificate
from pyrobust.certify.noise import GaussianNoise
from pyrobust.certify.statistics import (
    bernstein_margin,
    empirical_bernstein_margin,
    union_bound,
)
from pyrobust.certify.voting import check_voting, device_of
from pyrobust.evaluate.confidence_margin import SQUASHINGS, check_labels, squash
from pyrobust.ops._sampling_checks import check_counters
from pyrobust.ops.sampling import gaussian_samples

__all__ = ["SmoothedGreatScore", "smoothed_great_score"]

_ASSUMPTION = (
    "the classifier that answers with the largest mean score under exactly Gaussian noise; "
    "independent noise"
)


@dataclass(frozen=True)
class SmoothedGreatScore:
    """Certified radii of generated samples and their mean.

    Attributes:
        value: mean certified radius over the samples.
        lower: with probability at least ``1 - alpha`` over independent samples and noise, at or
            below the expected true radius over the distribution of the samples.
        certificate: per sample, its label and radius; each holds with probability ``1 - alpha``.
        margin: ``(n,)`` float64 lower bounds of the smoothed margin, in [-1, 1].
        sigma: standard deviation of the noise, in the units of the input.
        samples_per_input: noisy copies per sample.
        activation: squashing of the logits.
        temperature: its temperature.
        certified: True.
    """

    value: float
    lower: float
    certificate: Certificate
    margin: Tensor
    sigma: float
    samples_per_input: int
    activation: str
    temperature: float
    certified: bool = True

    def summary(self) -> str:
        """One line for people."""
        return (
            f"mean certified l2 radius {self.value:.4f} over {len(self.margin)} samples, at least "
            f"{self.lower:.4f} in expectation over their distribution (alpha = "
            f"{self.certificate.alpha:g}; {self.certificate.assumption})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON."""
        return {
            **self.certificate.to_dict(),
            "value": self.value,
            "lower": self.lower,
            "margin": self.margin.tolist(),
            "sigma": self.sigma,
            "samples_per_input": self.samples_per_input,
            "activation": self.activation,
            "temperature": self.temperature,
        }


@torch.no_grad()
def smoothed_great_score(
    model: nn.Module,
    samples: Tensor,
    labels: Tensor,
    *,
    sigma: float,
    n: int = 1000,
    alpha: float = 1e-3,
    activation: str = "sigmoid",
    temperature: float = 1.0,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int = 512,
    progress: bool = False,
) -> SmoothedGreatScore:
    """Certified GREAT score of a smoothed classifier on labelled samples.

    Args:
        model: classifier in evaluation mode, ``(B, ...)`` to ``(B, K)`` logits; float or packed.
        samples: ``(m, ...)`` float, ``m >= 1``.
        labels: ``(m,)`` int64 in ``[0, K)``.
        sigma: standard deviation of the noise, ``> 0``, in the units of the input.
        n: noisy copies per sample, ``>= 2``.
        alpha: probability of error of each sample's radius, and of ``lower``, in (0, 1).
        activation: squashing of the logits, as in :func:`pyrobust.evaluate.squash`.
        temperature: its temperature, ``> 0``.
        seed: key of the noise, in ``[0, 2**63)``.
        first_index: position of ``samples[0]`` in the data set.
        batch_size: copies per forward pass; it changes the speed only.
        progress: show a progress bar.

    Returns:
        The score; radii at most ``sigma * sqrt(pi / 2)``, and 0 (prediction -1) where the label is
        not proven to win.

    Raises:
        TypeError: samples are not float32, bfloat16 or float16, or labels not integers.
        ValueError: the model is in training mode, a label or an option is out of range, or the
            model returns NaN (the sample is named).
    """
    subject = "smoothed_great_score"
    check_positive(subject, "sigma", sigma)
    check_integer(subject, "n", n, 2)
    check_open_unit(subject, "alpha", alpha)
    check_choice(subject, "activation", activation, SQUASHINGS)
    check_positive(subject, "temperature", temperature)
    check_voting(subject, model, samples, batch_size, GaussianNoise(sigma))
    check_counters(subject, len(samples), n, seed, 0, first_index)
    check_labels(subject, labels, len(samples), _classes(model, samples[:1]))
    bounds = []
    for i in tqdm(range(len(samples)), desc=subject, disable=not progress):
        mean, variance = _margins(
            model,
            samples[i : i + 1],
            int(labels[i]),
            n,
            sigma,
            (activation, temperature),
            (seed, first_index + i, batch_size),
        )
        level = union_bound(alpha, len(mean))
        margin = mean - bernstein_margin(variance, n, level, span=2.0)
        bounds.append(margin.min())
    margin = torch.stack(bounds)
    return _collect(margin, labels.cpu().long(), sigma, n, alpha, activation, temperature)


def _margins(
    model: nn.Module,
    image: Tensor,
    label: int,
    n: int,
    sigma: float,
    squashing: tuple[str, float],
    noise: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance, ``(K - 1,)``, of the label's score minus each other one."""
    seed, index, batch_size = noise
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for start in range(0, n, batch_size):
        size = min(batch_size, n - start)
        noisy = gaussian_samples(
            image.cpu(), sigma, size, seed=seed, first_sample=start, first_index=index
        )
        logits = model(noisy[0].to(device_of(model))).cpu().double()
        if bool(torch.isnan(logits).any()):
            raise ValueError(
                f"smoothed_great_score: the model must not return NaN; it does for image {index}."
            )
        scores = squash(logits, *squashing)
        others = torch.cat([scores[:, :label], scores[:, label + 1 :]], dim=1)
        margins = scores[:, label, None] - others
        # Chan's update of mean and squared deviations: no cancellation over many batches
        step = margins.mean(0) - mean
        mean = mean + step * size / (count + size)
        squares = squares + ((margins - margins.mean(0)) ** 2).sum(0)
        squares = squares + step**2 * count * size / (count + size)
        count += size
    return mean, squares / (n - 1)


def _classes(model: nn.Module, image: Tensor) -> int:
    if len(image) == 0:
        raise ValueError("smoothed_great_score: samples must hold at least one sample.")
    shape = model(image.to(device_of(model))).shape
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(
            "smoothed_great_score: the model must return (B, K) logits with K >= 2; got "
            f"{tuple(shape)}."
        )
    return int(shape[1])


def _collect(
    margin: Tensor,
    labels: Tensor,
    sigma: float,
    n: int,
    alpha: float,
    activation: str,
    temperature: float,
) -> SmoothedGreatScore:
    largest = sigma * math.sqrt(math.pi / 2)
    radius = (largest * margin).clamp(min=0) * (1 - 1e-12)
    certificate = Certificate(
        prediction=torch.where(radius > 0, labels, ABSTAIN),
        radius=radius,
        alpha=alpha,
        assumption=_ASSUMPTION,
    )
    return SmoothedGreatScore(
        value=float(radius.mean()),
        lower=float(_expected_lower(radius, alpha, largest)),
        certificate=certificate,
        margin=margin,
        sigma=sigma,
        samples_per_input=n,
        activation=activation,
        temperature=temperature,
    )


def _expected_lower(radius: Tensor, alpha: float, largest: float) -> Tensor:
    """Lower confidence bound of the expected true radius from ``(..., m)`` certified ones.

    A radius is too large with probability at most ``alpha``, and then by at most ``largest``.
    """
    margin = empirical_bernstein_margin(radius, alpha, span=largest, dim=-1)
    return (radius.mean(-1) - margin - alpha * largest).clamp(min=0)
