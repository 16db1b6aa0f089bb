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

import torch
from scipy import stats
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyrobust._checks import check_integer, check_open_unit, check_positive
from pyrobust.certify.certificates import ABSTAIN, SmoothingCertificate
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


def _top_class(counts: Tensor) -> Tensor:
    """``(B,)`` most frequent class, the lowest among equals."""
    return torch.from_numpy(counts.numpy().argmax(-1))
