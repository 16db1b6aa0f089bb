"""Randomized smoothing: a classifier that votes over noisy copies of its input, with radii.

Any base classifier becomes a smoothed one whose class provably does not change inside a ball: l2
under Gaussian noise, l1 under uniform or Laplace noise, l0 under ablation of pixels. The noise is
reproducible to the bit: it depends on the seed, the position of the image in the data set and the
number of the sample, not on batches, threads or instruction sets.

Source: J. Cohen, E. Rosenfeld, Z. Kolter, "Certified adversarial robustness via randomized
smoothing", ICML 2019, arXiv 1902.02918; algorithms PREDICT and CERTIFY, theorem 1. Other norms:
:mod:`pyrobust.certify.radii`.
Departures: the noise is counter-based; the confidence bound is pushed outward by the rounding of
the special functions; sequential tests and planned numbers of samples beside a fixed number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from scipy import stats
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyrobust._checks import check_integer, check_open_unit, check_positive
from pyrobust.certify.certificates import ABSTAIN, SequentialCertificate, SmoothingCertificate
from pyrobust.certify.continuous_batching import decide_radii
from pyrobust.certify.first_layer_noise import split_first_linear
from pyrobust.certify.noise import AfterLinearNoise, GaussianNoise, GridGaussianNoise, noise_of
from pyrobust.certify.planning import PRICE, plan_for
from pyrobust.certify.sequential import table_designs
from pyrobust.certify.statistics import class_bounds, clopper_pearson_lower, randomised_lower
from pyrobust.certify.voting import (
    check_voting,
    count_parts,
    device_of,
    forward_rows,
    uniform_shares,
)
from pyrobust.ops._sampling_checks import check_counters

__all__ = ["SmoothedClassifier"]


class SmoothedClassifier(nn.Module):
    """A base classifier smoothed by noise.

    Args:
        base: any module that maps ``(N, ...)`` to ``(N, num_classes)`` logits: float or packed, on
            any device, also under ``torch.autocast``.
        sigma: standard deviation of the noise, ``> 0``, in the units of the input; for ``"l0"`` the
            probability, in (0, 1), that a pixel is hidden (set to 0).
        num_classes: number of classes ``K >= 2``.
        norm: of the radii: ``"l2"``, ``"l1"`` or ``"l0"`` (changed pixels).
        noise: ``"gaussian"`` (l2), ``"uniform"`` or ``"laplace"`` (l1), ``"ablation"`` (l0); None
            takes the first of the norm. ``"after_first_layer"`` (l2) draws Gaussian noise on the
            inputs as what a narrowing first ``nn.Linear`` makes of it: the same law from fewer
            random numbers (:mod:`pyrobust.certify.first_layer_noise`); ``forward`` keeps noise on
            the inputs, so that gradients reach the layer.
        grid: for integer images: steps per unit, 255 for 8 bits. Inputs are then uint8, the base
            sees multiples of ``1 / grid``, and the radius, in the units of images in [0, 1], holds
            without a word about floating point. None for float inputs.

    Raises:
        ValueError: ``sigma`` out of range, ``num_classes`` below 2, an unknown norm or noise, or a
            grid with another norm than l2.

    Example:
        >>> base = nn.Linear(2, 2).eval()
        >>> smoothed = SmoothedClassifier(base, sigma=0.25, num_classes=2)
        >>> certificate = smoothed.certify(torch.tensor([[3.0, 1.0]]), n=1000)
        >>> certificate.counts.sum().item(), certificate.samples.item()
        (1000, 1100)
    """

    def __init__(
        self,
        base: nn.Module,
        sigma: float,
        num_classes: int,
        *,
        norm: str = "l2",
        noise: str | None = None,
        grid: int | None = None,
    ) -> None:
        super().__init__()
        after = noise == "after_first_layer" and norm == "l2" and grid is None
        self.noise = noise_of("SmoothedClassifier", sigma, norm, None if after else noise, grid)
        if after:
            self.noise = AfterLinearNoise(sigma, split_first_linear(base)[0])
        check_integer("SmoothedClassifier", "num_classes", num_classes, 2)
        self.base = base
        self.sigma = sigma
        self.num_classes = num_classes

    def forward(
        self, x: Tensor, *, n: int = 16, seed: int | None = None, first_index: int = 0
    ) -> Tensor:
        """Smoothed class probabilities: the mean softmax over ``n`` noisy copies; differentiable.

        Args:
            x: ``(B, ...)`` float inputs; with ``grid`` also uint8 ones (floats see noise that is
                not rounded, so that gradients pass).
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
        noise = self.noise
        on_input = isinstance(noise, GridGaussianNoise) and x.is_floating_point()
        if on_input or isinstance(noise, AfterLinearNoise):
            noise = GaussianNoise(self.sigma)
        noisy = noise.samples(x.cpu(), n, seed=seed, first_index=first_index)
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
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """The class of the smoothed classifier, wrong with probability at most ``alpha``.

        Args:
            x: ``(B, ...)`` float inputs.
            n: noisy copies per input, ``>= 1``.
            alpha: probability, per input, that the answer is a class that is not the most likely.
            seed: key of the noise, in ``[0, 2**63)``.
            first_index: position of ``x[0]`` in the data set.
            batch_size: copies per forward pass; it changes the speed only. None: on the CPU what
                fits 4 MiB, 8 to 512, elsewhere 512.
            progress: show a progress bar.

        Returns:
            ``(B,)`` int64, -1 where the two best classes are too close to tell.

        Raises:
            TypeError: ``x`` is not float32, bfloat16 or float16, or with ``grid`` not uint8.
            ValueError: an argument out of range, the base in training mode, or NaN logits.
        """
        subject = "SmoothedClassifier.predict"
        rows = self._check(subject, x, alpha, batch_size, (seed, first_index), n=n)
        counts = self._count(subject, x, [(0, n)], seed, first_index, rows, progress)[0]
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
        planned: bool = False,
        price: float = PRICE,
        runner_up: bool = False,
        randomised: bool = False,
        first_index: int = 0,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> SmoothingCertificate:
        """A class and a radius per input that hold with probability at least ``1 - alpha``.

        ``n0`` copies choose the class; ``n`` fresh copies bound its probability from below. With
        ``planned`` the first copies (up to ``5 n0``) also choose how many fresh ones the radius is
        worth, ``n`` at most, none where the class will not be certified.

        Args:
            x: ``(B, ...)`` inputs: float, or uint8 with ``grid``.
            n0: copies that select the class, ``>= 1``.
            n: copies that estimate its probability, ``>= 1``.
            alpha: probability of error per input, in (0, 1).
            seed: key of the noise, in ``[0, 2**63)``.
            planned: choose the number of copies per input (:mod:`pyrobust.certify.planning`).
            price: of a copy when planning, in standard deviations of radius, ``> 0``.
            runner_up: also bound the other classes from above, at half of alpha; for classes that
                win with less than half of the votes.
            randomised: use :func:`pyrobust.certify.randomised_lower`, with one number per input
                drawn from the seed beforehand: longer radii at the same level. Not with
                ``runner_up``.
            first_index: position of ``x[0]`` in the data set; with it, each input's result does
                not depend on the batch it came in.
            batch_size: copies per forward pass; it changes the speed only (as far as the base
                rounds the same way in every batch). None as in :meth:`predict`.
            progress: show a progress bar.

        Returns:
            The certificate, on the device of ``x``.

        Raises:
            TypeError: ``x`` is not float32, bfloat16 or float16, or with ``grid`` not uint8.
            ValueError: an argument out of range, the base in training mode, another number of
                classes, or NaN logits.
        """
        subject = "SmoothedClassifier.certify"
        rows = self._check(subject, x, alpha, batch_size, (seed, first_index), n0=n0, n=n)
        check_positive(subject, "price", price)
        if randomised and runner_up:
            raise ValueError(f"{subject}: randomised must be False with runner_up=True.")
        place = (seed, first_index, rows, progress)
        if planned:
            selection, counts = self._planned_counts(subject, x, n0, n, alpha, price, place)
        else:
            selection, counts = self._count(subject, x, [(0, n0), (n0, n)], *place)
        top, drawn = _top_class(selection), counts.sum(-1)
        p_upper: Tensor | None = None
        if runner_up:
            p_lower, p_upper = class_bounds(counts, top, alpha)
        else:
            votes = counts.gather(1, top[:, None])[:, 0]
            if randomised:
                share = uniform_shares(x.shape[0], seed, first_index)
                p_lower = randomised_lower(votes, drawn.clamp_min(1), alpha, share)
                p_lower = torch.where(drawn > 0, p_lower, 0.0)
            else:
                p_lower = clopper_pearson_lower(votes, drawn.clamp_min(1), alpha)
        radius = self.noise.radius(p_lower, p_upper)
        certain = radius >= 0 if self.noise.norm == "l0" else radius > 0
        return SmoothingCertificate(
            prediction=torch.where(certain, top, ABSTAIN).to(x.device),
            radius=torch.where(certain, radius, 0.0).to(x.device),
            alpha=alpha,
            assumption=self.noise.assumption,
            norm=self.noise.norm,
            p_lower=p_lower.to(x.device),
            counts=counts.to(x.device),
            selection_counts=selection.to(x.device),
            samples=(selection.sum(-1) + drawn).to(x.device),
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
        batch_size: int | None = None,
        design: str = "optimal",
        progress: bool = False,
    ) -> SequentialCertificate:
        """Decide whether each input is certified at given radii, with as few samples as it takes.

        A sequential test per radius stops as soon as the votes suffice; several radii share the
        samples, and since their hypotheses are nested each is tested at the full level. Samples of
        many inputs share each forward batch. The first design for a radius takes about a second
        to compute; it is cached.

        Args:
            x: ``(B, ...)`` inputs: float, or uint8 with ``grid``.
            radius: one radius ``>= 0`` or an increasing sequence, in the units of ``x``.
            alpha: probability of error per input, over all radii together, in (0, 1).
            budget: most test samples per input, ``>= 1``.
            n0: most samples that select the class, ``>= 1``; it stops once one class leads by 10.
            seed: key of the noise, in ``[0, 2**63)``.
            first_index: position of ``x[0]`` in the data set.
            batch_size: rows per forward pass; None as in :meth:`predict`.
            design: ``"optimal"``, ``"spending"`` or ``"fixed"``
                (:mod:`pyrobust.certify.sequential`).
            progress: show a progress bar.

        Returns:
            The certificate; ``radius`` is the largest one certified together with all smaller
            ones, ``prediction`` -1 where none is.

        Raises:
            TypeError: ``x`` is not float32, bfloat16 or float16, or with ``grid`` not uint8.
            ValueError: an argument out of range, the base in training mode, or NaN logits.
        """
        subject = "SmoothedClassifier.certify_at"
        rows = self._check(subject, x, alpha, batch_size, (seed, first_index), n0=n0, budget=budget)
        radii = _radii(subject, radius)
        nulls = [self.noise.needs(r) for r in radii]
        if nulls[-1] >= 1:
            raise ValueError(
                f"{subject}: radius must be one that this noise can certify; got {radii[-1]:g}."
            )
        tests = table_designs(nulls, alpha, budget, kind=design)
        with tqdm(total=x.shape[0], disable=not progress, unit="image", desc=subject) as bar:
            decisions = decide_radii(
                self._voter(),
                x,
                self.noise,
                tests,
                num_classes=self.num_classes,
                n0=n0,
                seed=seed,
                first_index=first_index,
                batch_size=rows,
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
            assumption=self.noise.assumption,
            norm=self.noise.norm,
            radii=steps[1:].to(x.device),
            errors=torch.tensor([test.error for test in tests], dtype=torch.float64),
            successes=torch.tensor([d.successes for d in decisions], dtype=torch.int64),
            trials=torch.tensor([d.trials for d in decisions], dtype=torch.int64),
            selection_counts=torch.stack(selection) if selection else torch.zeros(0, 0),
            samples=torch.tensor([d.samples for d in decisions], dtype=torch.int64),
            sigma=self.sigma,
        )

    def extra_repr(self) -> str:
        """The noise and the number of classes."""
        return f"sigma={self.sigma}, num_classes={self.num_classes}, noise={self.noise}"

    def _voter(self) -> nn.Module:
        """What reads the copies: the base, or its layers after the first linear one."""
        if isinstance(self.noise, AfterLinearNoise):
            return split_first_linear(self.base)[1]
        return self.base

    def _check(
        self,
        subject: str,
        x: Tensor,
        alpha: float,
        batch_size: int | None,
        place: tuple[int, int],
        **sizes: int,
    ) -> int:
        """Raise for bad arguments, then the copies per forward pass."""
        for name, value in sizes.items():
            check_integer(subject, name, value, 1)
        check_open_unit(subject, "alpha", alpha)
        check_voting(subject, self.base, x, batch_size, self.noise)
        # planning takes its pilot from the first 5 n0 copies
        copies = 5 * sizes.get("n0", 0) + sum(sizes.values())
        check_counters(subject, len(x), copies, place[0], 0, place[1])
        if isinstance(self.noise, AfterLinearNoise):
            first = split_first_linear(self.base)[0]
            if first is not self.noise.linear:  # the layer was replaced
                self.noise = AfterLinearNoise(self.sigma, first)
        return forward_rows(batch_size, self.base, self.noise.shape(tuple(x.shape[1:])))

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
            self._voter(),
            x,
            self.noise,
            parts,
            num_classes=self.num_classes,
            seed=seed,
            first_index=first_index,
            batch_size=batch_size,
            subject=subject,
            progress=progress,
        )

    def _planned_counts(
        self,
        subject: str,
        x: Tensor,
        n0: int,
        budget: int,
        alpha: float,
        price: float,
        place: tuple[int, int, int, bool],
    ) -> tuple[Tensor, Tensor]:
        """``(B, K)`` votes of the pilot, and of as many fresh copies as it found worth while."""
        seed, first_index, batch_size, progress = place
        plan = plan_for(self.noise, alpha, budget, price)
        pilot = torch.zeros(x.shape[0], self.num_classes, dtype=torch.int64)
        counts = torch.zeros_like(pilot)
        with tqdm(total=x.shape[0], disable=not progress, unit="image", desc=subject) as bar:
            for b in range(x.shape[0]):
                one = (seed, first_index + b, batch_size, False)
                image = x[b : b + 1]
                pilot[b] = self._count(subject, image, [(0, n0)], *one)[0][0]
                if 2 * int(pilot[b].max()) > n0:  # worth a closer look before the large number
                    pilot[b] += self._count(subject, image, [(n0, 4 * n0)], *one)[0][0]
                size = int(plan.choose(pilot[b].max()[None], pilot[b].sum()[None]))
                if size > 0:
                    counts[b] = self._count(subject, image, [(5 * n0, size)], *one)[0][0]
                bar.update()
        return pilot, counts


def _radii(subject: str, radius: float | Sequence[float]) -> list[float]:
    """The radii as an increasing list."""
    given = torch.as_tensor(radius, dtype=torch.float64)
    radii = given.flatten().tolist() if given.ndim < 2 else []
    increasing = all(low < high for low, high in itertools.pairwise(radii))
    if not radii or radii[0] < 0 or not increasing or not math.isfinite(radii[-1]):
        raise ValueError(
            f"{subject}: radius must be a number >= 0 or increasing numbers; got {radius}."
        )
    return radii


def _top_class(counts: Tensor) -> Tensor:
    """``(B,)`` most frequent class, the lowest among equals."""
    return torch.from_numpy(counts.numpy().argmax(-1))
