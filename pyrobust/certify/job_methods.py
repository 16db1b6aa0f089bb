"""The methods of a certification job, one class each; ``METHODS`` is the table of their names.

A new method adds a frozen dataclass with the interface of :class:`JobMethod` here or in a file of
its own, a row in ``METHODS``, and its options in ``pyrobust_cli/certify_options.py``, where each
option bears the name of a field. A test compares the two tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from pyrobust._checks import (
    check_at_least,
    check_choice,
    check_integer,
    check_open_unit,
    check_positive,
)
from pyrobust.certify.bound import METHODS as BOUNDS
from pyrobust.certify.great_job import GreatJob
from pyrobust.certify.log import LogRow
from pyrobust.certify.modality_job import MultimodalJob
from pyrobust.certify.noise import noise_of
from pyrobust.certify.part_jobs import AdaptiveJob, DualJob, MixtureJob
from pyrobust.certify.planning import PRICE
from pyrobust.certify.ranking_job import RankingJob
from pyrobust.certify.tightness_job import TightnessJob
from pyrobust.certify.verification import verified

__all__ = ["METHODS", "IntervalJob", "JobMethod", "SmoothingJob", "grid_images", "method_of"]


class JobMethod(Protocol):
    """What a job needs of a method: a dataclass whose fields describe it in the log's head.

    Attributes:
        norm: the norm of the radii.
        columns: names of the columns that follow the common ones. Where ``"certified"`` is one, it
            says (1 or 0) whether the class is certain; otherwise each prediction but -1 is.
        block: images certified together. Rows of a block may depend on the whole block (through
            the shared batches of a base that rounds differently in each), never on another block.
    """

    columns: ClassVar[tuple[str, ...]]

    @property
    def norm(self) -> str:
        """The norm of the radii."""

    @property
    def block(self) -> int:
        """Images certified together."""

    def rows(
        self, model: Any, images: Any, labels: Tensor, first: int, num_classes: int
    ) -> Iterator[LogRow]:
        """One row per image, in order; ``images[0]`` has position ``first`` in the data set.

        The images are a block of the job's data (:mod:`pyrobust.certify.job_data`).
        """


@dataclass(frozen=True)
class IntervalJob:
    """Bounds: the class cannot change within ``eps`` in l-infinity.

    Attributes:
        eps: radius, ``>= 0``; pixels in [0, 1], and perturbed images are valid ones.
        bound: a method of :func:`pyrobust.certify.bound`; interval propagation by default.
    """

    eps: float = 0.1
    bound: str = "ibp"
    norm: ClassVar[str] = "linf"
    block: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]] = ("certified",)

    def __post_init__(self) -> None:
        check_at_least("certify", "eps", self.eps, 0.0)
        check_choice("certify", "bound", self.bound, BOUNDS)

    def rows(
        self, model: nn.Module, images: Tensor, labels: Tensor, first: int, num_classes: int
    ) -> Iterator[LogRow]:
        """The class of each image, with radius ``eps`` where bounds prove it and 0 elsewhere."""
        for offset in range(len(images)):
            x = images[offset : offset + 1]
            with torch.no_grad():
                top = model(x).argmax(-1)
            certificate = verified(model, x, top, self.eps, method=self.bound)
            predict, proven = int(top), not bool(certificate.abstained)
            yield LogRow(
                idx=first + offset,
                label=int(labels[offset]),
                predict=predict,
                radius=self.eps if proven else 0.0,
                time=2,
                extra=(str(int(proven)),),
            )


@dataclass(frozen=True)
class SmoothingJob:
    """Randomized smoothing, by votes on noisy copies (:class:`pyrobust.nn.SmoothedClassifier`).

    Attributes:
        sigma: standard deviation of the noise, ``> 0``; for l0 the share of hidden pixels.
        samples: noisy copies that bound the probability of the class, ``>= 1``; with ``radii`` or
            ``planned`` the most that one image may take.
        selection: noisy copies that choose the class, ``>= 1``.
        alpha: probability of error per image, in (0, 1).
        seed: of the noise, ``>= 0``.
        radii: decide these radii by sequential tests; empty gives a radius per image.
        batch_size: copies per forward pass, ``>= 1``.
        block: images whose sequential tests share forward passes, ``>= 1``.
        norm: ``"l2"``, ``"l1"`` or ``"l0"``.
        noise: see :class:`pyrobust.nn.SmoothedClassifier`.
        grid: steps per unit of integer images; 255 for 8 bits. Images must be multiples of
            ``1 / grid``.
        planned: let the first copies choose how many a radius is worth.
        price: of a copy when planning, in standard deviations of radius, ``> 0``.
        randomised: use the randomised bound of the probability; not with ``radii``.
    """

    sigma: float = 0.25
    samples: int = 1000
    selection: int = 100
    alpha: float = 1e-3
    seed: int = 0
    radii: tuple[float, ...] = ()
    batch_size: int = 512
    block: int = 64
    norm: str = "l2"
    noise: str | None = None
    grid: int | None = None
    planned: bool = False
    price: float = PRICE
    randomised: bool = False
    columns: ClassVar[tuple[str, ...]] = ("selection", "counts")

    def __post_init__(self) -> None:
        noise_of("certify", self.sigma, self.norm, self.noise, self.grid)
        for name in ("samples", "selection", "batch_size", "block"):
            check_integer("certify", name, getattr(self, name), 1)
        check_open_unit("certify", "alpha", self.alpha)
        check_integer("certify", "seed", self.seed, 0)
        check_positive("certify", "price", self.price)
        for name in ("planned", "randomised"):
            if getattr(self, name) and self.radii:
                raise ValueError(
                    f"certify: {name} must be False with radii; got radii={self.radii}."
                )

    def rows(
        self, model: nn.Module, images: Tensor, labels: Tensor, first: int, num_classes: int
    ) -> Iterator[LogRow]:
        """The certificate of each image, with its exact counts."""
        from pyrobust.nn import SmoothedClassifier

        smoothed = SmoothedClassifier(
            model, self.sigma, num_classes, norm=self.norm, noise=self.noise, grid=self.grid
        ).eval()
        if self.grid is not None:
            images = grid_images("certify", images, self.grid)
        shared: dict[str, Any] = {
            "n0": self.selection,
            "alpha": self.alpha,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }
        # Fixed numbers of copies fill batches of their own, so such images need not wait.
        step = len(images) if self.radii else 1
        for start in range(0, len(images), step):
            x, place = images[start : start + step], first + start
            certificate: Any
            if self.radii:
                certificate = smoothed.certify_at(
                    x, self.radii, budget=self.samples, first_index=place, **shared
                )
                hits, drawn = certificate.successes, certificate.trials
                counts = torch.stack([hits, drawn - hits], 1).tolist()
            else:
                certificate = smoothed.certify(
                    x,
                    n=self.samples,
                    planned=self.planned,
                    price=self.price,
                    randomised=self.randomised,
                    first_index=place,
                    **shared,
                )
                counts = certificate.counts.tolist()
            for i, label in enumerate(labels[start : start + step].tolist()):
                selection = certificate.selection_counts[i].tolist()
                yield LogRow(
                    idx=place + i,
                    label=label,
                    predict=int(certificate.prediction[i]),
                    radius=float(certificate.radius[i]),
                    time=int(certificate.samples[i]),
                    extra=(",".join(map(str, selection)), ",".join(map(str, counts[i]))),
                )


def grid_images(subject: str, images: Tensor, grid: int) -> Tensor:
    """Images in [0, 1] as uint8 numbers of grid steps.

    Raises:
        ValueError: some value is not a multiple of ``1 / grid``, or there are more than 255 steps.
    """
    steps = images.double() * grid
    whole = steps.round()
    apart = float((steps - whole).abs().max()) if images.numel() else 0.0
    if apart > 1e-3 or grid > 255 or float(whole.min()) < 0 or float(whole.max()) > 255:
        raise ValueError(
            f"{subject}: images must be multiples of 1 / grid in [0, 1] for grid={grid}, at most "
            f"255; they are up to {apart:.2g} steps away."
        )
    return whole.to(torch.uint8)


METHODS: dict[str, type[Any]] = {
    "ibp": IntervalJob,
    "smoothing": SmoothingJob,
    "dual": DualJob,
    "adaptive": AdaptiveJob,
    "mixture": MixtureJob,
    "great": GreatJob,
    "ranking": RankingJob,
    "multimodal": MultimodalJob,
    "tightness": TightnessJob,
}


def method_of(name: str, options: dict[str, Any]) -> JobMethod:
    """The method called ``name`` with its options.

    Raises:
        ValueError: no method has this name, an option is not one of its, or is out of range.
    """
    check_choice("certify", "method", name, METHODS)
    kind = METHODS[name]
    known = [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            raise ValueError(
                f"certify: {option} must be an option of method {name} ({', '.join(known)})."
            )
    method: JobMethod = kind(**options)
    return method
