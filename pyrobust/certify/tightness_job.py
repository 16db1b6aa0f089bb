"""The job that measures how tight interval bounds are, image by image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pyrobust._checks import check_at_least, check_choice
from pyrobust.certify.log import LogRow
from pyrobust.certify.propagation_tightness import certified_margin, propagation_tightness

__all__ = ["TightnessJob"]


@dataclass(frozen=True)
class TightnessJob:
    """Propagation tightness of the margins (:func:`~pyrobust.certify.propagation_tightness`).

    Attributes:
        eps: l-infinity radius, ``>= 0``; pixels in [0, 1], and perturbed images are valid ones.
        relu: ``"local"``, ``"center"`` or ``"identity"``, where ReLUs are linearised.
    """

    eps: float = 0.1
    relu: str = "local"
    norm: ClassVar[str] = "linf"
    block: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]] = ("certified", "tightness")

    def __post_init__(self) -> None:
        check_at_least("certify", "eps", self.eps, 0.0)
        check_choice("certify", "relu", self.relu, ("local", "center", "identity"))

    def rows(
        self, model: nn.Module, images: Tensor, labels: Tensor, first: int, num_classes: int
    ) -> Iterator[LogRow]:
        """The class of each image and the mean tightness of its margins over the other classes.

        Interval bounds with the last layer folded also tell whether the class is proven.
        """
        for offset in range(len(images)):
            x = images[offset : offset + 1]
            with torch.no_grad():
                top = model(x).argmax(1)
                proven = bool((certified_margin(model, x, top, self.eps) > 0).all())
            tightness = propagation_tightness(model, x, self.eps, top, self.relu).detach()
            yield LogRow(
                idx=first + offset,
                label=int(labels[offset]),
                predict=int(top),
                radius=self.eps if proven else 0.0,
                time=3 + tightness.shape[1],
                extra=(str(int(proven)), repr(float(tightness.double().mean()))),
            )
