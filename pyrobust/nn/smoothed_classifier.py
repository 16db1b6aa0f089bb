"""Randomized smoothing: a classifier that votes over Gaussian copies of its input, with l2 radii.

Any base classifier becomes a smoothed one whose class provably does not change inside an l2 ball.
The noise is reproducible to the bit: it depends on the seed, the position of the image in the data
set and the number of the sample, not on batches, threads or instruction sets.

Source: J. Cohen, E. Rosenfeld, Z. Kolter, "Certified adversarial robustness via randomized
smoothing", ICML 2019, arXiv 1902.02918; algorithms PREDICT and CERTIFY, theorem 1.
Departures: the noise is counter-based; the confidence bound is pushed outward by the rounding of
the special functions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from scipy import special, stats
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyrobust._checks import check_integer, check_open_unit, check_positive
from pyrobust.certify.certificates import ABSTAIN, SequentialCertificate, SmoothingCertificate
from pyrobust.certify.continuous_batching import decide_radii
from pyrobust.certify.sequential import sequential_design
from pyrobust.certify.statistics import clopper_pearson_lower, gaussian_radius
from pyrobust.certify.voting import check_voting, count_noisy_votes, device_of
from pyrobust.ops.sampling import gaussian_samples

__all__ = ["SmoothedClassifier"]

_ASSUMPTION = "the votes are independent draws of the base under exactly Gaussian noise"


class SmoothedClassifier(nn.Module):
    """A base classifier smoothed by Gaussian noise.

    Args:
        base: any module that maps ``(N, ...)`` to ``(N, num_classes)`` logits: float or packed, on
            any device.
        sigma: standard deviation of the noise, ``> 0``, in the units of the input.
        num_classes: number of classes ``K >= 2``.

    Raises:
        ValueError: ``sigma`` is not positive or ``num_classes`` below 2.

    Example:
        >>> base = nn.Linear(2, 2).eval()
        >>> smoothed = SmoothedClassifier(base, sigma=0.25, num_classes=2)
        >>> certificate = smoothed.certify(torch.tensor([[3.0, 1.0]]), n=1000)
        >>> certificate.counts.sum().item(), certificate.samples.item()
        (1000, 1100)
    """

    def __init__(self, base: nn.Module, sigma: float, num_classes: int) -> None:
        super().__init__()
        check_positive("SmoothedClassifier", "sigma", sigma)
        check_integer("SmoothedClassifier", "num_classes", num_classes, 2)
        self.base = base
        self.sigma = sigma
        self.num_classes = num_classes

    def forward(
        self, x: Tensor, *, n: int = 16, seed: int | None = None, first_index: int = 0
    ) -> Tensor:
        """Smoothed class probabilities: the mean softmax over ``n`` noisy copies; differentiable.

        Args:
            x: ``(B, ...)`` float inputs.
            n: copies per input, ``>= 1``.
            seed: key of the noise; None draws one from torch's default generator, so that each
                call sees fresh noise and ``torch.manual_seed`` fixes it.
            first_index: position of ``x[0]`` in the data set.

        Returns:
            ``(B, K)`` probabilities.

        Raises:
            ValueError: ``n`` below 1.
        """
        check_integer("SmoothedClassifier", "n", n, 1)
        if seed is None:
            seed = int(torch.randint(2**62, ()).item())
        noisy = gaussian_samples(x.cpu(), self.sigma, n, seed=seed, first_index=first_index)
        logits = self.base(noisy.flatten(0, 1).to(device_of(self.base)))
        probabilities = torch.softmax(logits, dim=-1)
        return probabilities.view(x.shape[0], n, -1).mean(dim=1)

    def predict(
        self,
        x: Tensor,
        n: int = 1000,
        alpha: float = 1e-3,
        seed: int = 0,
        *,
        first_index: int = 0,
        batch_size: int = 512,
        progress: bool = False,
    ) -> Tensor:
        """The class of the smoothed classifier, wrong with probability at most ``alpha``.

        Args:
            x: ``(B, ...)`` float inputs.
            n: noisy copies per input, ``>= 1``.
            alpha: probability, per input, that the answer is a class that is not the most likely.
            seed: key of the noise, in ``[0, 2**63)``.
            first_index: position of ``x[0]`` in the data set.
            batch_size: copies per forward pass; it changes the speed only.
            progress: show a progress bar.

        Returns:
            ``(B,)`` int64, -1 where the two best classes are too close to tell.

        Raises:
            TypeError: ``x`` is not floating-point.
            ValueError: an argument out of range, the base in training mode, or NaN logits.
        """
        subject = "SmoothedClassifier.predict"
        self._check(subject, x, alpha, batch_size, n=n)
        counts = self._count(subject, x, [(0, n)], seed, first_index, batch_size, progress)[0]
        best = counts.topk(2, dim=-1).values.numpy()
        # Two-sided binomial test of the two best counts against a fair coin.
        p_value = 2 * stats.binom.sf(best[:, 0] - 1, best.sum(-1), 0.5)
        certain = torch.from_numpy(p_value * (1 + 1e-9) <= alpha)
        return torch.where(certain, _top_class(counts), ABSTAIN).to(x.device)

    def certify(
        self,
        x: Tensor,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 1e-3,
        seed: int = 0,
        *,
        first_index: int = 0,
        batch_size: int = 512,
        progress: bool = False,
    ) -> SmoothingCertificate:
        """A class and an l2 radius per input that hold with probability at least ``1 - alpha``.

        ``n0`` copies choose the class; ``n`` fresh copies bound its probability from below.

        Args:
            x: ``(B, ...)`` float inputs.
            n0: copies that select the class, ``>= 1``.
            n: copies that estimate its probability, ``>= 1``.
            alpha: probability of error per input, in (0, 1).
            seed: key of the noise, in ``[0, 2**63)``.
            first_index: position of ``x[0]`` in the data set; with it, each input's result does
                not depend on the batch it came in.
            batch_size: copies per forward pass; it changes the speed only (as far as the base
                rounds the same way in every batch).
            progress: show a progress bar.

        Returns:
            The certificate, on the device of ``x``.

        Raises:
            TypeError: ``x`` is not floating-point.
            ValueError: an argument out of range, the base in training mode, or NaN logits.
        """
        subject = "SmoothedClassifier.certify"
        self._check(subject, x, alpha, batch_size, n0=n0, n=n)
        parts = [(0, n0), (n0, n)]
        selection, counts = self._count(subject, x, parts, seed, first_index, batch_size, progress)
        top = _top_class(selection)
        p_lower = clopper_pearson_lower(counts.gather(1, top[:, None])[:, 0], n, alpha)
        radius = gaussian_radius(p_lower, self.sigma)
        certain = radius > 0
        return SmoothingCertificate(
            prediction=torch.where(certain, top, ABSTAIN).to(x.device),
            radius=torch.where(certain, radius, 0.0).to(x.device),
            alpha=alpha,
            assumption=_ASSUMPTION,
            p_lower=p_lower.to(x.device),
            counts=counts.to(x.device),
            selection_counts=selection.to(x.device),
            samples=torch.full_like(top, n0 + n).to(x.device),
            sigma=self.sigma,
        )

    def certify_at(
        self,
        x: Tensor,
        radius: float | Sequence[float],
        alpha: float = 1e-3,
        budget: int = 100_000,
        *,
        n0: int = 100,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 512,
        design: str = "optimal",
        progress: bool = False,
    ) -> SequentialCertificate:
        """Decide whether each input is certified at given radii, with as few samples as it takes.

        A sequential test per radius stops as soon as the votes suffice; several radii share the
        samples, and since their hypotheses are nested each is tested at the full level. Samples of
        many inputs share each forward batch. The first design for a radius takes about a second
        to compute; it is cached.

        Args:
            x: ``(B, ...)`` float inputs.
            radius: one l2 radius ``>= 0`` or an increasing sequence, in the units of ``x``.
            alpha: probability of error per input, over all radii together, in (0, 1).
            budget: most test samples per input, ``>= 1``.
            n0: most samples that select the class, ``>= 1``; it stops once one class leads by 10.
            seed: key of the noise, in ``[0, 2**63)``.
            first_index: position of ``x[0]`` in the data set.
            batch_size: rows per forward pass.
            design: ``"optimal"`` or ``"spending"`` (:mod:`pyrobust.certify.sequential`).
            progress: show a progress bar.

        Returns:
            The certificate; ``radius`` is the largest one certified together with all smaller
            ones, ``prediction`` -1 where none is.

        Raises:
            TypeError: ``x`` is not floating-point.
            ValueError: an argument out of range, the base in training mode, or NaN logits.
        """
        subject = "SmoothedClassifier.certify_at"
        self._check(subject, x, alpha, batch_size, n0=n0, budget=budget)
        radii = _radii(subject, radius)
        # Phi rounded up: a null hypothesis that is too large only costs samples.
        nulls = [min(float(special.ndtr(r / self.sigma)) + 1e-15, 1 - 2**-53) for r in radii]
        tests = [sequential_design(p, alpha, budget, kind=design) for p in nulls]
        with tqdm(total=x.shape[0], disable=not progress, unit="image", desc=subject) as bar:
            decisions = decide_radii(
                self.base,
                x,
                self.sigma,
                tests,
                num_classes=self.num_classes,
                n0=n0,
                seed=seed,
                first_index=first_index,
                batch_size=batch_size,
                subject=subject,
                bar=bar,
            )
        reached = torch.tensor([d.certified for d in decisions], dtype=torch.int64)
        labels = torch.tensor([d.label for d in decisions], dtype=torch.int64)
        steps = torch.tensor([0.0, *radii], dtype=torch.float64)
        selection = [torch.from_numpy(d.selection) for d in decisions]
        return SequentialCertificate(
            prediction=torch.where(reached > 0, labels, ABSTAIN).to(x.device),
            radius=steps[reached].to(x.device),
            alpha=alpha,
            assumption=_ASSUMPTION,
            radii=steps[1:].to(x.device),
            errors=torch.tensor([test.error for test in tests], dtype=torch.float64),
            successes=torch.tensor([d.successes for d in decisions], dtype=torch.int64),
            trials=torch.tensor([d.trials for d in decisions], dtype=torch.int64),
            selection_counts=torch.stack(selection) if selection else torch.zeros(0, 0),
            samples=torch.tensor([d.samples for d in decisions], dtype=torch.int64),
            sigma=self.sigma,
        )

    def extra_repr(self) -> str:
        """Sigma and the number of classes."""
        return f"sigma={self.sigma}, num_classes={self.num_classes}"

    def _check(self, subject: str, x: Tensor, alpha: float, batch_size: int, **sizes: int) -> None:
        for name, value in sizes.items():
            check_integer(subject, name, value, 1)
        check_open_unit(subject, "alpha", alpha)
        check_voting(subject, self.base, x, batch_size)

    def _count(
        self,
        subject: str,
        x: Tensor,
        parts: list[tuple[int, int]],
        seed: int,
        first_index: int,
        batch_size: int,
        progress: bool,
    ) -> list[Tensor]:
        """``(B, K)`` counts for each (first sample, number of samples)."""
        total = x.shape[0] * sum(n for _, n in parts)
        with tqdm(total=total, disable=not progress, unit="sample", desc=subject) as bar:
            return [
                count_noisy_votes(
                    self.base,
                    x,
                    self.sigma,
                    n,
                    num_classes=self.num_classes,
                    seed=seed,
                    first_sample=first,
                    first_index=first_index,
                    batch_size=batch_size,
                    subject=subject,
                    bar=bar,
                )
                for first, n in parts
            ]


def _radii(subject: str, radius: float | Sequence[float]) -> list[float]:
    """The radii as an increasing list."""
    radii = [float(radius)] if isinstance(radius, (int, float)) else [float(r) for r in radius]
    increasing = all(low < high for low, high in itertools.pairwise(radii))
    if not radii or radii[0] < 0 or not increasing or not math.isfinite(radii[-1]):
        raise ValueError(
            f"{subject}: radius must be a number >= 0 or increasing numbers; got {radius}."
        )
    return radii


def _top_class(counts: Tensor) -> Tensor:
    """``(B,)`` most frequent class, the lowest among equals."""
    return torch.from_numpy(counts.numpy().argmax(-1))
