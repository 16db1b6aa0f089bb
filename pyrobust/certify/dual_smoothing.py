"""Dual randomized smoothing (DRS): smooth two halves of the image, certify the whole image.

The upper limit of a smoothed classifier's l2 radius shrinks with the dimension. DRS splits the
image into two interleaved halves, smooths a classifier of each half with noise on that half alone,
adds the two smoothed probabilities and certifies the original image. It pays where neighbouring
pixels repeat each other (natural images), and loses where they do not (8 by 8 digits).

Source: S. Xia, Y. Yu, X. Jiang, H. Ding, "Mitigating the curse of dimensionality for certified
robustness via dual randomized smoothing", ICLR 2024, arXiv 2404.09586.
Departures, all because the released scripts claim too much: the radius is ``(r_l + r_r) / sqrt(2)``
with signed half radii (not their root sum of squares, not clamped at 0), each half is bounded at
``alpha / 2``, and counts are never scaled. Two noise levels are allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyrobust._checks import check_integer, check_open_unit, check_positive
from pyrobust.certify.certificates import ABSTAIN, Certificate
from pyrobust.certify.noise import GaussianNoise
from pyrobust.certify.statistics import clopper_pearson_lower, gaussian_radius, union_bound
from pyrobust.certify.sub_image import SubImage
from pyrobust.certify.voting import check_voting, classify, device_of
from pyrobust.ops._sampling_checks import check_counters
from pyrobust.ops.masking import split_gaussian_samples

__all__ = ["DualSmoothedClassifier", "DualSmoothingCertificate", "dual_radius"]

_ASSUMPTION = (
    "the votes of each half are independent draws of its base under exactly Gaussian noise"
)


def dual_radius(p_left: Any, p_right: Any, sigma_left: Any, sigma_right: Any = None) -> Tensor:
    """The l2 radius of the sum of two Gaussian-smoothed classifiers of disjoint coordinates.

    ``(z_l + z_r) / sqrt(1 / sigma_l^2 + 1 / sigma_r^2)`` with the signed quantile ``z = Phi^-1(p)``
    of each half. A shift of ``d_l`` and ``d_r`` leaves at least ``Phi(z_l - d_l / sigma_l) +
    Phi(z_r - d_r / sigma_r)`` of the summed probability 2; the class wins while that exceeds 1.
    Tight for linear classifiers. Signed: nothing is certified where it is not positive.

    Args:
        p_left: lower bounds of the class's probability on the left half, in ``[0, 1]``, any shape.
        p_right: the same on the right half, broadcastable.
        sigma_left: standard deviation of the left noise, ``> 0``, in the units of the input.
        sigma_right: standard deviation of the right noise; None takes ``sigma_left``.

    Returns:
        float64 tensor, rounded down; ``-inf`` where a probability is 0, else ``inf`` where one
        is 1.

    Raises:
        ValueError: a probability outside ``[0, 1]`` or NaN, or a sigma not positive and finite.

    Example:
        >>> dual_radius(0.9331927987311419, 0.15865525393145707, 1.0)  # z = 1.5 and -1
        tensor(0.3536, dtype=torch.float64)
    """
    right = sigma_left if sigma_right is None else sigma_right
    # Each quantile is rounded down by far more than the few roundings below lose.
    z_left, z_right = gaussian_radius(p_left, 1.0), gaussian_radius(p_right, 1.0)
    slope = (_inverse_square(sigma_left) + _inverse_square(right)).sqrt().to(z_left.device)
    radius = (z_left + z_right.to(z_left.device)) / slope
    return torch.where(radius.isnan(), -math.inf, radius)  # one half certain, the other impossible


@dataclass(frozen=True)
class DualSmoothingCertificate(Certificate):
    """A certificate of a :class:`DualSmoothedClassifier`, with the votes behind it.

    Attributes:
        p_left: ``(B,)`` float64 lower bound of the class's probability on the left half, wrong
            with probability at most ``alpha / 2``.
        p_right: the same on the right half.
        counts: ``(B, 2, K)`` int64 votes of the left and right half behind the bounds.
        selection_counts: ``(B, 2, K)`` int64 votes that chose the class; never reused.
        samples: ``(B,)`` int64 forward passes spent by both halves, selection included.
        sigma: standard deviations of the left and the right noise, in the units of the input.
    """

    p_left: Tensor | None = None
    p_right: Tensor | None = None
    counts: Tensor | None = None
    selection_counts: Tensor | None = None
    samples: Tensor | None = None
    sigma: tuple[float, float] = (0.0, 0.0)


class DualSmoothedClassifier(nn.Module):
    """Two classifiers, each of one half of the input, smoothed apart and added.

    Args:
        left: maps what a :class:`SubImage` of the first mask returns to ``(N, num_classes)``
            logits; float or packed, on any device.
        right: the same for the second mask.
        sigma: standard deviation of the noise, ``> 0``, in the units of the input; a pair gives
            each half its own.
        num_classes: number of classes ``K >= 2``.
        masks: ``(2, 1, H, W)`` bool from :func:`partition_masks`, or ``(2, ...)`` over the shape of
            one input of other data; disjoint and covering.
        fill: see :class:`SubImage`.
        reduce: see :class:`SubImage`.

    Raises:
        TypeError: ``masks`` is not a bool tensor.
        ValueError: an argument out of range, or masks that overlap or leave a coordinate out.

    Example:
        >>> left, right = nn.Flatten(), nn.Flatten()  # logits: the pixels themselves
        >>> masks = torch.tensor([[[[True, False]]], [[[False, True]]]])
        >>> dual = DualSmoothedClassifier(left, right, 0.25, 2, masks, fill="zero").eval()
        >>> dual.certify(torch.tensor([[[[0.9, 0.0]]]]), n=100).abstained
        tensor([False])
    """

    def __init__(
        self,
        left: nn.Module,
        right: nn.Module,
        sigma: float | tuple[float, float],
        num_classes: int,
        masks: Tensor,
        *,
        fill: str = "pool",
        reduce: str = "keep",
    ) -> None:
        super().__init__()
        subject = type(self).__name__
        pair = sigma if isinstance(sigma, tuple) else (sigma, sigma)
        for value in pair:
            check_positive(subject, "sigma", value)
        check_integer(subject, "num_classes", num_classes, 2)
        _check_masks(subject, masks)
        self.left, self.right = left, right
        self.left_part = SubImage(masks[0], fill=fill, reduce=reduce)
        self.right_part = SubImage(masks[1], fill=fill, reduce=reduce)
        self.sigma = pair
        self.num_classes = num_classes

    def forward(
        self, x: Tensor, *, n: int = 16, seed: int | None = None, first_index: int = 0
    ) -> Tensor:
        """Mean of the two smoothed class probabilities (softmax, not votes); differentiable.

        Args:
            x: ``(B, ...)`` float inputs.
            n: noisy copies per input and half, ``>= 1``.
            seed: key of the noise; None draws one from torch's default generator.
            first_index: position of ``x[0]`` in the data set.

        Returns:
            ``(B, K)`` probabilities.

        Raises:
            ValueError: ``n`` below 1, or inputs of another shape than the masks.
        """
        check_integer(type(self).__name__, "n", n, 1)
        if seed is None:
            seed = int(torch.randint(2**62, ()).item())
        self.left_part.gather(x[:0])  # checks the shape
        halves = []
        for half, noisy in zip(
            self._halves(), self._noisy(x, 0, n, seed, first_index), strict=True
        ):
            logits = half(noisy.flatten(0, 1).to(device_of(half)))
            halves.append(torch.softmax(logits, dim=-1).view(x.shape[0], n, -1).mean(dim=1))
        return (halves[0] + halves[1].to(halves[0].device)) / 2

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
        """The class of the largest summed probability, wrong with probability at most ``alpha``.

        The lead of the answer over every other class must exceed ``sqrt(4 ln((K - 1) / alpha) /
        n)`` in summed probability: Hoeffding's inequality over the ``2 n`` votes, and a union
        bound.

        Args:
            x: ``(B, ...)`` float inputs.
            n: noisy copies per input and half, ``>= 1``.
            alpha: probability, per input, that the answer is not the most likely class.
            seed: key of the noise, in ``[0, 2**63)``.
            first_index: position of ``x[0]`` in the data set.
            batch_size: copies per forward pass; it changes the speed only.
            progress: show a progress bar.

        Returns:
            ``(B,)`` int64, -1 where the two best classes are too close to tell.

        Raises:
            TypeError: ``x`` is not float32, bfloat16 or float16.
            ValueError: an argument out of range, a half in training mode, or NaN logits.
        """
        subject = "DualSmoothedClassifier.predict"
        self._check(subject, x, alpha, batch_size, n=n)
        check_counters(subject, len(x), n, seed, 0, first_index)
        parts = [(0, n)]
        counts = self._count(subject, x, parts, seed, first_index, batch_size, progress)[0].sum(1)
        best = counts.topk(2, dim=-1).values
        level = union_bound(alpha, self.num_classes - 1)
        lead = math.sqrt(-4.0 * math.log(level) / n) * n
        certain = (best[:, 0] - best[:, 1]) > lead
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
    ) -> DualSmoothingCertificate:
        """A class and an l2 radius per input that hold with probability at least ``1 - alpha``.

        ``n0`` copies of each half choose the class; ``n`` fresh ones of each half bound its two
        probabilities from below, each at ``alpha / 2``. Costs twice a plain certification.

        Args:
            x: ``(B, ...)`` float inputs.
            n0: copies per half that select the class, ``>= 1``.
            n: copies per half that estimate its probabilities, ``>= 1``.
            alpha: probability of error per input, in (0, 1).
            seed: key of the noise, in ``[0, 2**63)``.
            first_index: position of ``x[0]`` in the data set; with it, each input's result does
                not depend on the batch it came in.
            batch_size: copies per forward pass; it changes the speed only.
            progress: show a progress bar.

        Returns:
            The certificate, on the device of ``x``. An abstention has radius 0.

        Raises:
            TypeError: ``x`` is not float32, bfloat16 or float16.
            ValueError: an argument out of range, a half in training mode, or NaN logits.
        """
        subject = "DualSmoothedClassifier.certify"
        self._check(subject, x, alpha, batch_size, n0=n0, n=n)
        check_counters(subject, len(x), n0 + n, seed, 0, first_index)
        parts = [(0, n0), (n0, n)]
        selection, counts = self._count(subject, x, parts, seed, first_index, batch_size, progress)
        top = _top_class(selection.sum(1))
        votes = counts.gather(2, top[:, None, None].expand(-1, 2, 1))[..., 0]
        p_lower = clopper_pearson_lower(votes, n, union_bound(alpha, 2))
        radius = dual_radius(p_lower[:, 0], p_lower[:, 1], *self.sigma)
        certain = radius > 0
        return DualSmoothingCertificate(
            prediction=torch.where(certain, top, ABSTAIN).to(x.device),
            radius=torch.where(certain, radius, 0.0).to(x.device),
            alpha=alpha,
            assumption=_ASSUMPTION,
            p_left=p_lower[:, 0].to(x.device),
            p_right=p_lower[:, 1].to(x.device),
            counts=counts.to(x.device),
            selection_counts=selection.to(x.device),
            samples=torch.full_like(top, 2 * (n0 + n)).to(x.device),
            sigma=self.sigma,
        )

    def extra_repr(self) -> str:
        """The two sigmas and the number of classes."""
        return f"sigma={self.sigma}, num_classes={self.num_classes}"

    def _halves(self) -> list[_Half]:
        """The classifiers of noisy inputs that are 0 outside their half."""
        return [_Half(self.left_part, self.left), _Half(self.right_part, self.right)]

    def _noisy(
        self, x: Tensor, first_sample: int, n: int, seed: int, first_index: int
    ) -> tuple[Tensor, Tensor]:
        """``(B, n, ...)`` noisy copies of both halves: disjoint coordinates of one draw."""
        left, right = split_gaussian_samples(
            x.cpu().float(),
            self.left_part.mask.cpu(),
            self.sigma,
            n,
            seed=seed,
            first_sample=first_sample,
            first_index=first_index,
        )
        return left.to(x.dtype), right.to(x.dtype)

    def _check(self, subject: str, x: Tensor, alpha: float, batch_size: int, **sizes: int) -> None:
        for name, value in sizes.items():
            check_integer(subject, name, value, 1)
        check_open_unit(subject, "alpha", alpha)
        check_voting(subject, self, x, batch_size, GaussianNoise(self.sigma[0]))
        self.left_part.gather(x[:0])  # checks the shape

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
        """``(B, 2, K)`` counts for each (first sample, number of samples)."""
        total = 2 * x.shape[0] * sum(n for _, n in parts)
        results = []
        with tqdm(total=total, disable=not progress, unit="sample", desc=subject) as bar:
            for first, n in parts:
                counts = torch.zeros(x.shape[0], 2, self.num_classes, dtype=torch.int64)
                for b in range(x.shape[0]):
                    # Batches start at multiples of their size: an image meets the same ones
                    # whatever images stand beside it.
                    for start in range(first, first + n, batch_size):
                        size = min(batch_size, first + n - start)
                        image = x[b : b + 1].detach()
                        counts[b] += self._votes(subject, image, start, size, seed, first_index + b)
                        bar.update(2 * size)
                results.append(counts)
        return results

    def _votes(
        self, subject: str, image: Tensor, first: int, n: int, seed: int, index: int
    ) -> Tensor:
        """``(2, K)`` votes on ``n`` noisy copies of one image."""
        counts = []
        with torch.no_grad():
            drawn = self._noisy(image, first, n, seed, index)
        for half, noisy, name in zip(self._halves(), drawn, ("left", "right"), strict=True):
            votes, nan = classify(half, noisy[0], self.num_classes, subject)
            if nan >= 0:
                raise ValueError(
                    f"{subject}: the base must not return NaN; the {name} one does for sample "
                    f"{first + nan} of image {index} (seed {seed})."
                )
            counts.append(torch.bincount(votes, minlength=self.num_classes))
        return torch.stack(counts)


class _Half(nn.Module):
    """A classifier of inputs that are 0 outside one half."""

    def __init__(self, part: SubImage, classifier: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.classifier = classifier

    def forward(self, placed: Tensor) -> Tensor:
        result: Tensor = self.classifier(self.part.finish(placed))
        return result


def _check_masks(subject: str, masks: Tensor) -> None:
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        raise TypeError(f"{subject}: masks must be a bool tensor (2, ...); got {masks!r:.80}.")
    if masks.ndim < 2 or masks.shape[0] != 2:
        raise ValueError(
            f"{subject}: masks must have shape (2, 1, H, W) or (2, ...); got {tuple(masks.shape)}."
        )
    wrong = masks[0] == masks[1]
    if bool(wrong.any()):
        both = int((masks[0] & masks[1]).sum())
        raise ValueError(
            f"{subject}: masks must be disjoint and cover; {both} coordinates are in both parts "
            f"and {int(wrong.sum()) - both} in none."
        )


def _inverse_square(sigma: Any) -> Tensor:
    value = torch.as_tensor(sigma, dtype=torch.float64)
    if not bool((value.isfinite() & (value > 0)).all()):
        raise ValueError(f"dual_radius: sigma must be finite and positive; got {sigma}.")
    return value**-2.0


def _top_class(counts: Tensor) -> Tensor:
    """``(B,)`` most frequent class, the lowest among equals."""
    return torch.from_numpy(counts.numpy().argmax(-1))
