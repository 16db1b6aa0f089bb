"""SmoothedMixture: an accurate classifier mixed with a Gaussian-smoothed one, with l2 radii.

The probabilities ``(1 - a) softmax(s g(x)) + a h(x)``, where ``h_i(x)`` is the share of noisy
copies of ``x`` that the base calls ``i``. The certificate of ``h`` carries over for ``a >= 1/2``,
whatever ``g`` does inside the ball; it costs the samples of plain smoothing.

Source: Bai et al., arXiv 2301.12554 (:mod:`pyrobust.nn.adaptive_smoothing`), theorem 4.5.
Departures: ``h`` is known through votes only, so all statements use a confidence bound, and the
class that the mixture answers is itself certain at that confidence; the radius is the tight one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyrobust._checks import (
    check_eval_mode,
    check_integer,
    check_open_unit,
    check_positive,
    check_unit,
)
from pyrobust.certify.certificates import ABSTAIN, SmoothingCertificate
from pyrobust.certify.mixture_radius import NO_RADIUS, smoothed_mixture_radius
from pyrobust.certify.noise import GaussianNoise
from pyrobust.certify.statistics import clopper_pearson_lower, union_bound
from pyrobust.certify.voting import check_voting, count_parts, device_of
from pyrobust.ops._sampling_checks import check_counters

__all__ = ["SmoothedMixture"]

_ASSUMPTION = (
    "the votes are independent draws of the base under exactly Gaussian noise; inside the ball the "
    "standard classifier may answer anything"
)


class SmoothedMixture(nn.Module):
    """An accurate classifier and a smoothed one, mixed in probability space.

    Args:
        standard: accurate classifier of clean inputs, ``(N, ...)`` to ``(N, K)`` logits; float or
            packed.
        base: classifier that is smoothed, of noisy inputs.
        sigma: standard deviation of the noise, ``> 0``, in the units of the input.
        num_classes: ``K >= 2``.
        alpha: weight of the smoothed classifier, in [0, 1], or a function of ``(N, ...)`` inputs
            that returns ``(N,)`` weights, as ``AdaptiveMixedClassifier.weights``.
        alpha_range: with a function, the weights it can return; it is held to them, and the
            certificate counts on the lower.
        standard_scale: factor of the logits of ``standard``, ``> 0``.

    Raises:
        ValueError: an argument out of range, or a function without ``alpha_range``.

    Example:
        >>> standard, base = nn.Linear(2, 2).eval(), nn.Linear(2, 2).eval()
        >>> mixture = SmoothedMixture(standard, base, 0.25, 2, alpha=0.9).eval()
        >>> mixture.certify(torch.tensor([[3.0, 1.0]]), n=1000).samples.item()
        1100
    """

    def __init__(
        self,
        standard: nn.Module,
        base: nn.Module,
        sigma: float,
        num_classes: int,
        alpha: float | Callable[[Tensor], Tensor] = 0.85,
        *,
        alpha_range: tuple[float, float] | None = None,
        standard_scale: float = 1.0,
    ) -> None:
        super().__init__()
        subject = type(self).__name__
        check_positive(subject, "sigma", sigma)
        check_integer(subject, "num_classes", num_classes, 2)
        check_positive(subject, "standard_scale", standard_scale)
        if callable(alpha):
            if alpha_range is None or not 0 <= alpha_range[0] <= alpha_range[1] <= 1:
                raise ValueError(
                    f"{subject}: alpha_range must be (low, high) inside [0, 1] when alpha is a "
                    f"function; got {alpha_range}."
                )
            self.alpha_range = alpha_range
        else:
            check_unit(subject, "alpha", alpha)
            self.alpha_range = (alpha, alpha)
        self.standard, self.base = standard, base
        self.alpha = alpha
        self.sigma, self.num_classes = sigma, num_classes
        self.standard_scale = standard_scale

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
        """The mixture's class, wrong with probability at most ``alpha``.

        The answer's mixed score must lead every other by the weight times ``sqrt(2 ln((K - 1) /
        alpha) / n)``: Hoeffding's inequality for the difference of two votes, and a union bound.

        Args:
            x: ``(B, ...)`` float inputs.
            n: noisy copies per input, ``>= 1``.
            alpha: probability, per input, that the answer is not the most likely class.
            seed: key of the noise, in ``[0, 2**63)``.
            first_index: position of ``x[0]`` in the data set.
            batch_size: copies per forward pass; it changes the speed only.
            progress: show a progress bar.

        Returns:
            ``(B,)`` int64, -1 where the two best classes are too close to tell.

        Raises:
            TypeError: ``x`` is not float32, bfloat16 or float16.
            ValueError: an argument out of range, training mode, or NaN logits.
        """
        subject = "SmoothedMixture.predict"
        self._check(subject, x, alpha, batch_size, n=n)
        check_counters(subject, len(x), n, seed, 0, first_index)
        shares, weight = self._standard_shares(subject, x)
        parts = [(0, n)]
        counts = self._count(subject, x, parts, seed, first_index, batch_size, progress)[0]
        scores = (1 - weight)[:, None] * shares + weight[:, None] * counts / n
        best = scores.topk(2, dim=1)
        level = union_bound(alpha, self.num_classes - 1)
        lead = weight * math.sqrt(-2 * math.log(level) / n) * (1 + 1e-12) + 1e-12
        certain = best.values[:, 0] - best.values[:, 1] > lead
        return torch.where(certain, best.indices[:, 0], ABSTAIN).to(x.device)

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

        ``n0`` copies choose the mixture's class; ``n`` fresh ones bound its smoothed probability
        from below, at level ``alpha``. All statements follow from that one bound, as the other
        classes share what is left.

        Args:
            x: ``(B, ...)`` float inputs.
            n0: copies that select the class, ``>= 1``.
            n: copies that estimate its probability, ``>= 1``.
            alpha: probability of error per input, in (0, 1).
            seed: key of the noise, in ``[0, 2**63)``.
            first_index: position of ``x[0]`` in the data set; with it, each input's result does
                not depend on the batch it came in.
            batch_size: copies per forward pass; it changes the speed only.
            progress: show a progress bar.

        Returns:
            The certificate, on the device of ``x``. ``prediction`` is the mixture's class where it
            is certain at ``x`` itself, and then ``radius`` may be 0; -1 elsewhere. With a lowest
            weight below 1/2 every radius is 0; ``assumption`` and a warning say why.

        Raises:
            TypeError: ``x`` is not float32, bfloat16 or float16.
            ValueError: an argument out of range, training mode, or NaN logits.
        """
        subject = "SmoothedMixture.certify"
        self._check(subject, x, alpha, batch_size, n0=n0, n=n)
        check_counters(subject, len(x), n0 + n, seed, 0, first_index)
        shares, weight = self._standard_shares(subject, x)
        parts = [(0, n0), (n0, n)]
        selection, counts = self._count(subject, x, parts, seed, first_index, batch_size, progress)
        mixed = (1 - weight)[:, None] * shares + weight[:, None] * selection / n0
        top = mixed.argmax(1)
        p_lower = clopper_pearson_lower(counts.gather(1, top[:, None])[:, 0], n, alpha)
        radius = smoothed_mixture_radius(p_lower, None, self.alpha_range[0], self.sigma)
        others = shares.scatter(1, top[:, None], -math.inf).amax(1)
        own = shares.gather(1, top[:, None])[:, 0]
        lead = (1 - weight) * (own - others) + weight * (2 * p_lower - 1)
        certain = (lead > 1e-12) | (radius > 0)
        return SmoothingCertificate(
            prediction=torch.where(certain, top, ABSTAIN).to(x.device),
            radius=torch.where(certain, radius, 0.0).to(x.device),
            alpha=alpha,
            assumption=_ASSUMPTION if self.alpha_range[0] >= 0.5 else f"{_ASSUMPTION}; {NO_RADIUS}",
            p_lower=p_lower.to(x.device),
            counts=counts.to(x.device),
            selection_counts=selection.to(x.device),
            samples=torch.full_like(top, n0 + n).to(x.device),
            sigma=self.sigma,
        )

    def extra_repr(self) -> str:
        """Weights, sigma and the number of classes."""
        return f"alpha_range={self.alpha_range}, sigma={self.sigma}, classes={self.num_classes}"

    def _check(self, subject: str, x: Tensor, alpha: float, batch_size: int, **sizes: int) -> None:
        for name, value in sizes.items():
            check_integer(subject, name, value, 1)
        check_open_unit(subject, "alpha", alpha)
        check_voting(subject, self.base, x, batch_size, GaussianNoise(self.sigma))
        check_eval_mode(subject, self)

    def _standard_shares(self, subject: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, K)`` softmax of the standard classifier and ``(B,)`` weights, float64, CPU."""
        with torch.no_grad():
            logits = self.standard(x.to(device_of(self.standard))).double().cpu()
            if callable(self.alpha):
                weight = self.alpha(x).double().cpu()
            else:
                weight = torch.full((len(x),), self.alpha, dtype=torch.float64)
        if logits.shape != (len(x), self.num_classes) or not bool(torch.isfinite(logits).all()):
            raise ValueError(
                f"{subject}: standard must return finite logits ({len(x)}, {self.num_classes}); "
                f"got shape {tuple(logits.shape)}."
            )
        low, high = self.alpha_range
        slack = 1e-6  # weights are float32 sums
        if weight.shape != (len(x),) or bool(
            ((weight < low - slack) | (weight > high + slack)).any()
        ):
            raise ValueError(
                f"{subject}: alpha must return ({len(x)},) weights in [{low}, {high}]; "
                f"got shape {tuple(weight.shape)}, {weight.min():g} to {weight.max():g}."
            )
        return (self.standard_scale * logits).softmax(1), weight.clamp(low, high)

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
        return count_parts(
            self.base,
            x,
            GaussianNoise(self.sigma),
            parts,
            num_classes=self.num_classes,
            seed=seed,
            first_index=first_index,
            batch_size=batch_size,
            subject=subject,
            progress=progress,
        )
