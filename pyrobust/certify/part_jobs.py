"""Certification jobs of methods that need two networks, held by one saved module.

The architecture makes a module with the named parts as submodules; ``nn.ModuleDict`` serves. Both
parts may be packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from pyrobust._checks import (
    check_at_least,
    check_choice,
    check_integer,
    check_open_unit,
    check_positive,
    check_unit,
)
from pyrobust.certify.dual_smoothing import DualSmoothedClassifier
from pyrobust.certify.log import LogRow
from pyrobust.certify.smoothed_mixture import SmoothedMixture
from pyrobust.certify.sub_image import partition_masks

__all__ = ["AdaptiveJob", "DualJob", "MixtureJob"]


@dataclass(frozen=True)
class DualJob:
    """Dual smoothing (:class:`DualSmoothedClassifier`); the parts are ``left`` and ``right``.

    Attributes:
        sigma: standard deviation of the noise of both halves, ``> 0``.
        samples: noisy copies per half that bound its probability, ``>= 1``.
        selection: noisy copies per half that choose the class, ``>= 1``.
        alpha: probability of error per image, in (0, 1).
        seed: of the noise, ``>= 0``.
        scheme: ``"checkerboard"`` or ``"columns"``.
        fill: what stands at hidden pixels: ``"pool"``, ``"zero"`` or ``"bilinear"``.
        batch_size: copies per forward pass, ``>= 1``.
    """

    sigma: float = 0.25
    samples: int = 1000
    selection: int = 100
    alpha: float = 1e-3
    seed: int = 0
    scheme: str = "checkerboard"
    fill: str = "pool"
    batch_size: int = 512
    norm: ClassVar[str] = "l2"
    block: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]] = ("selection", "counts")

    def __post_init__(self) -> None:
        _check_sampling(self)
        check_choice("certify", "scheme", self.scheme, ("checkerboard", "columns"))
        check_choice("certify", "fill", self.fill, ("pool", "zero", "bilinear"))

    def rows(
        self, model: nn.Module, images: Tensor, labels: Tensor, first: int, num_classes: int
    ) -> Iterator[LogRow]:
        """The certificate of each image; counts of the left half, then of the right."""
        left, right = _parts(model, "left", "right")
        masks = partition_masks(tuple(images.shape[1:]), scheme=self.scheme)
        dual = DualSmoothedClassifier(left, right, self.sigma, num_classes, masks, fill=self.fill)
        yield from _sampled_rows(self, dual.eval(), images, labels, first)


@dataclass(frozen=True)
class AdaptiveJob:
    """An accurate and a smoothed classifier mixed (:class:`SmoothedMixture`).

    The parts are ``standard`` and ``base``.

    Attributes:
        sigma: standard deviation of the noise, ``> 0``.
        weight: of the smoothed classifier, in [0, 1]; below 1/2 no radius is certified.
        samples: noisy copies that bound the probability of the class, ``>= 1``.
        selection: noisy copies that choose the class, ``>= 1``.
        alpha: probability of error per image, in (0, 1).
        seed: of the noise, ``>= 0``.
        standard_scale: factor of the logits of ``standard``, ``> 0``.
        batch_size: copies per forward pass, ``>= 1``.
    """

    sigma: float = 0.25
    weight: float = 0.85
    samples: int = 1000
    selection: int = 100
    alpha: float = 1e-3
    seed: int = 0
    standard_scale: float = 1.0
    batch_size: int = 512
    norm: ClassVar[str] = "l2"
    block: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]] = ("selection", "counts")

    def __post_init__(self) -> None:
        _check_sampling(self)
        check_unit("certify", "weight", self.weight)
        check_positive("certify", "standard_scale", self.standard_scale)

    def rows(
        self, model: nn.Module, images: Tensor, labels: Tensor, first: int, num_classes: int
    ) -> Iterator[LogRow]:
        """The certificate of each image; a class may be certain at radius 0."""
        standard, base = _parts(model, "standard", "base")
        mixture = SmoothedMixture(
            standard,
            base,
            self.sigma,
            num_classes,
            self.weight,
            standard_scale=self.standard_scale,
        )
        yield from _sampled_rows(self, mixture.eval(), images, labels, first)


@dataclass(frozen=True)
class MixtureJob:
    """A mixture whose robust part is bounded by intervals, in l-infinity.

    The parts are ``standard`` and ``robust`` (:class:`pyrobust.nn.MixedClassifier`).

    Attributes:
        eps: radius, ``>= 0``; pixels in [0, 1], and perturbed images are valid ones.
        weight: of the robust classifier, in [0, 1]; below 1/2 nothing is certified.
        standard_scale: factor of the logits of ``standard``, ``> 0``.
        robust_scale: factor of the logits of ``robust``, ``> 0``.
    """

    eps: float = 0.1
    weight: float = 0.85
    standard_scale: float = 1.0
    robust_scale: float = 1.0
    norm: ClassVar[str] = "linf"
    block: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]] = ("certified",)

    def __post_init__(self) -> None:
        check_at_least("certify", "eps", self.eps, 0.0)
        check_unit("certify", "weight", self.weight)
        check_positive("certify", "standard_scale", self.standard_scale)
        check_positive("certify", "robust_scale", self.robust_scale)

    def rows(
        self, model: nn.Module, images: Tensor, labels: Tensor, first: int, num_classes: int
    ) -> Iterator[LogRow]:
        """The mixture's class of each image, with radius ``eps`` where it is proven."""
        from pyrobust.nn.adaptive_smoothing import MixedClassifier

        standard, robust = (
            part.requires_grad_(False) for part in _parts(model, "standard", "robust")
        )
        scales = (self.standard_scale, self.robust_scale)
        mixed = MixedClassifier(standard, robust, self.weight, *scales).eval()
        for offset in range(len(images)):
            x = images[offset : offset + 1]
            certificate = mixed.certify(x, self.eps)
            proven = not bool(certificate.abstained)
            yield LogRow(
                idx=first + offset,
                label=int(labels[offset]),
                predict=int(mixed(x).argmax(1)),
                radius=float(certificate.radius),
                time=3,
                extra=(str(int(proven)),),
            )


def _check_sampling(job: Any) -> None:
    """Check the fields that all sampling jobs share."""
    check_positive("certify", "sigma", job.sigma)
    for name in ("samples", "selection", "batch_size"):
        check_integer("certify", name, getattr(job, name), 1)
    check_open_unit("certify", "alpha", job.alpha)
    check_integer("certify", "seed", job.seed, 0)


def _parts(model: nn.Module, *names: str) -> list[nn.Module]:
    """The submodules of these names."""
    known = dict(model.named_children())
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(
            f"certify: architecture must make a module with submodules {', '.join(names)} for this "
            f"method; got {', '.join(known) or 'none'}."
        )
    return [known[name] for name in names]


def _sampled_rows(
    job: DualJob | AdaptiveJob,
    smoothed: DualSmoothedClassifier | SmoothedMixture,
    images: Tensor,
    labels: Tensor,
    first: int,
) -> Iterator[LogRow]:
    """Rows with the exact counts behind each certificate."""
    for offset in range(len(images)):
        certificate: Any = smoothed.certify(
            images[offset : offset + 1],
            n0=job.selection,
            n=job.samples,
            alpha=job.alpha,
            seed=job.seed,
            first_index=first + offset,
            batch_size=job.batch_size,
        )
        columns = (certificate.selection_counts[0], certificate.counts[0])
        yield LogRow(
            idx=first + offset,
            label=int(labels[offset]),
            predict=int(certificate.prediction[0]),
            radius=float(certificate.radius[0]),
            time=int(certificate.samples[0]),
            extra=tuple(",".join(map(str, c.flatten().tolist())) for c in columns),
        )
