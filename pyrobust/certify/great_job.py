"""Certification job of the sound GREAT score: l2 radii of smoothed confidences of the labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from pyrobust._checks import check_choice, check_integer, check_open_unit, check_positive
from pyrobust.certify.log import LogRow

__all__ = ["GreatJob"]


@dataclass(frozen=True)
class GreatJob:
    """Certified radii of the labels (:func:`pyrobust.certify.smoothed_great_score`).

    Attributes:
        sigma: standard deviation of the noise, ``> 0``.
        samples: noisy copies per image, ``>= 2``.
        alpha: probability of error per image, in (0, 1).
        seed: of the noise, ``>= 0``.
        activation: ``"sigmoid"`` or ``"softmax"``, the squashing of the logits.
        temperature: its temperature, ``> 0``.
        batch_size: copies per forward pass, ``>= 1``.
    """

    sigma: float = 0.25
    samples: int = 1000
    alpha: float = 1e-3
    seed: int = 0
    activation: str = "sigmoid"
    temperature: float = 1.0
    batch_size: int = 512
    norm: ClassVar[str] = "l2"
    block: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]] = ("margin",)

    def __post_init__(self) -> None:
        from pyrobust.evaluate.confidence_margin import SQUASHINGS

        check_positive("certify", "sigma", self.sigma)
        check_positive("certify", "temperature", self.temperature)
        check_integer("certify", "samples", self.samples, 2)
        check_integer("certify", "batch_size", self.batch_size, 1)
        check_integer("certify", "seed", self.seed, 0)
        check_open_unit("certify", "alpha", self.alpha)
        check_choice("certify", "activation", self.activation, SQUASHINGS)

    def rows(
        self, model: nn.Module, images: Tensor, labels: Tensor, first: int, num_classes: int
    ) -> Iterator[LogRow]:
        """The label of each image with its radius, or -1 where it is not proven to win."""
        from pyrobust.certify.smoothed_great_score import smoothed_great_score

        for offset in range(len(images)):
            score = smoothed_great_score(
                model,
                images[offset : offset + 1],
                labels[offset : offset + 1],
                sigma=self.sigma,
                n=self.samples,
                alpha=self.alpha,
                activation=self.activation,
                temperature=self.temperature,
                seed=self.seed,
                first_index=first + offset,
                batch_size=self.batch_size,
            )
            yield LogRow(
                idx=first + offset,
                label=int(labels[offset]),
                predict=int(score.certificate.prediction),
                radius=float(score.certificate.radius),
                time=self.samples,
                extra=(repr(float(score.margin)),),
            )
