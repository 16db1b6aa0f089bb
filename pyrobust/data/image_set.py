"""ImageSet: images and labels, split into training and test."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["ImageSet"]


@dataclass(frozen=True)
class ImageSet:
    """A labelled image collection.

    Attributes:
        name: short name for reports.
        train_images: ``(N, C, H, W)`` float32 in [0, 1].
        train_labels: ``(N,)`` int64 in ``[0, num_classes)``.
        test_images: ``(M, C, H, W)`` float32 in [0, 1].
        test_labels: ``(M,)`` int64 in ``[0, num_classes)``.
        num_classes: number of classes.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int

    def head(self, train: int, test: int) -> ImageSet:
        """The same collection with the first ``train`` and ``test`` images only."""
        return ImageSet(
            self.name,
            self.train_images[:train],
            self.train_labels[:train],
            self.test_images[:test],
            self.test_labels[:test],
            self.num_classes,
        )
