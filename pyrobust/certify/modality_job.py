"""The certification job of late fusion: joint l2 radii, or those of one attacked modality."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from pyrobust._checks import check_integer
from pyrobust.certify.job_data import ModalityData
from pyrobust.certify.log import LogRow
from pyrobust.certify.multimodal_radius import (
    ModalityLipschitz,
    certify_multimodal,
    modality_lipschitz,
)
from pyrobust.nn.orthogonal_fusion import LateFusion

__all__ = ["MultimodalJob"]


@dataclass(frozen=True)
class PreparedFusion:
    """A late-fusion model with its proven constants."""

    model: LateFusion
    constants: ModalityLipschitz


@dataclass(frozen=True)
class MultimodalJob:
    """Radii of a :class:`pyrobust.nn.LateFusion` from proven Lipschitz constants.

    Attributes:
        attacked: the one modality that may move, ``>= 0``; None lets all move within one radius.
    """

    attacked: int | None = None
    norm: ClassVar[str] = "l2"
    block: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.attacked is not None:
            check_integer("certify", "attacked", self.attacked, 0)

    def prepare(self, model: nn.Module, data: ModalityData) -> PreparedFusion:
        """The model with its constants, computed once.

        Raises:
            ValueError: it is no late-fusion model of as many modalities, or has no such modality.
            NotImplementedError: an encoder has a layer without a rule.
        """
        count = len(data.inputs)
        if not isinstance(model, LateFusion) or len(model.encoders) != count:
            raise ValueError(
                f"certify: architecture must make a LateFusion of {count} modalities for this "
                f"method; got {type(model).__name__}."
            )
        if self.attacked is not None and self.attacked >= count:
            raise ValueError(
                f"certify: attacked must be below {count}, the number of modalities; got "
                f"{self.attacked}."
            )
        return PreparedFusion(model, modality_lipschitz(model, method="spectral"))

    def rows(
        self,
        model: PreparedFusion,
        images: tuple[Tensor, ...],
        labels: Tensor,
        first: int,
        num_classes: int,
    ) -> Iterator[LogRow]:
        """The class of each sample with its radius, or -1 where two classes tie."""
        for offset in range(len(labels)):
            certificate: Any = certify_multimodal(
                model.model,
                [x[offset : offset + 1] for x in images],
                model.constants,
                attacked=self.attacked,
            )
            yield LogRow(
                idx=first + offset,
                label=int(labels[offset]),
                predict=int(certificate.prediction),
                radius=float(certificate.radius),
                time=1,
            )
