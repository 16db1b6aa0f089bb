"""What a certification job goes through: images, several modalities per sample, or queries."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pyrobust.data.image_set import ImageSet
from pyrobust.data.sources import load_images
from pyrobust.data.text_collection import TextCollection, load_texts

__all__ = ["ImageData", "JobData", "ModalityData", "QueryData", "load_job_data"]


class JobData(Protocol):
    """A sequence of labelled inputs."""

    @property
    def name(self) -> str:
        """Short name for the description of the job."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    @property
    def labels(self) -> Tensor:
        """``(N,)`` int64."""

    def made_from(self) -> tuple[Any, ...]:
        """What the function that makes the network is given."""

    def digest(self) -> str:
        """SHA-256 of inputs and labels."""

    def block(self, part: slice, device: str) -> Any:
        """Some of the inputs, on the device."""


@dataclass(frozen=True)
class ImageData:
    """The test images of a collection."""

    images: ImageSet

    @property
    def name(self) -> str:
        """That of the collection."""
        return self.images.name

    @property
    def num_classes(self) -> int:
        """That of the collection."""
        return self.images.num_classes

    @property
    def labels(self) -> Tensor:
        """Of the test images."""
        return self.images.test_labels

    def made_from(self) -> tuple[Any, ...]:
        """Image shape and number of classes."""
        return tuple(self.images.test_images.shape[1:]), self.num_classes

    def digest(self) -> str:
        """SHA-256 of the test images and labels."""
        return _digest(self.images.test_images, self.labels)

    def block(self, part: slice, device: str) -> Tensor:
        """Images ``(n, C, H, W)``."""
        return self.images.test_images[part].to(device)


@dataclass(frozen=True)
class ModalityData:
    """Samples of several modalities.

    Attributes:
        name: short name.
        inputs: ``(N, ...)`` float for each modality.
        labels: ``(N,)`` int64 in ``[0, num_classes)``.
        num_classes: number of classes.
    """

    name: str
    inputs: tuple[Tensor, ...]
    labels: Tensor
    num_classes: int

    @classmethod
    def of_halves(cls, images: ImageSet) -> ModalityData:
        """The left and the right halves of the test images as two modalities."""
        x = images.test_images
        middle = x.shape[-1] // 2
        halves = (x[..., :middle].contiguous(), x[..., middle:].contiguous())
        return cls(images.name, halves, images.test_labels, images.num_classes)

    def made_from(self) -> tuple[Any, ...]:
        """The shape of each modality and the number of classes."""
        return tuple(tuple(x.shape[1:]) for x in self.inputs), self.num_classes

    def digest(self) -> str:
        """SHA-256 of inputs and labels."""
        return _digest(*self.inputs, self.labels)

    def block(self, part: slice, device: str) -> tuple[Tensor, ...]:
        """Inputs ``(n, ...)`` of each modality."""
        return tuple(x[part].to(device) for x in self.inputs)


@dataclass(frozen=True)
class QueryData:
    """The queries of a text collection; the label of one is its first relevant document, or -1."""

    texts: TextCollection

    @property
    def name(self) -> str:
        """That of the collection."""
        return self.texts.name

    @property
    def num_classes(self) -> int:
        """The number of documents."""
        return len(self.texts.documents)

    @property
    def labels(self) -> Tensor:
        """First relevant document of each query, or -1."""
        return torch.tensor([min(row, default=-1) for row in self.texts.relevant])

    def made_from(self) -> tuple[Any, ...]:
        """The collection."""
        return (self.texts,)

    def digest(self) -> str:
        """SHA-256 of queries, documents and judgements."""
        rows = [sorted(row) for row in self.texts.relevant]
        content = repr((self.texts.queries, self.texts.documents, rows))
        return hashlib.sha256(content.encode()).hexdigest()

    def block(self, part: slice, device: str) -> range:
        """Positions of queries."""
        return range(len(self.texts.queries))[part]


def load_job_data(method: str, source: str) -> JobData:
    """The data that ``source`` names for the method of this name.

    Raises:
        FileNotFoundError: there is nothing there.
        ValueError: it is not what the method takes.
    """
    return _LOADERS.get(method, _images)(source)


def _images(source: str) -> JobData:
    return ImageData(load_images(source))


def _queries(source: str) -> JobData:
    return QueryData(load_texts(source))


def _modalities(source: str) -> JobData:
    """Image halves, or what a function returns as ``((input, ...), labels)``."""
    module_name, _, function_name = source.partition(":")
    if not function_name or Path(source).exists():
        return ModalityData.of_halves(load_images(source))
    try:
        made: Any = getattr(importlib.import_module(module_name), function_name)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"certify: data must be module:function; got {source!r} ({error})."
        ) from error
    if isinstance(made, ImageSet):
        return ModalityData.of_halves(made)
    fits = (
        isinstance(made, tuple)
        and len(made) == 2
        and isinstance(made[0], (tuple, list))
        and len(made[0]) > 0
        and all(isinstance(x, Tensor) for x in (*made[0], made[1]))
        and len(made[1]) > 0
        and all(x.is_floating_point() and x.shape[:1] == made[1].shape for x in made[0])
        and not made[1].is_floating_point()
    )
    if not fits:
        raise ValueError(
            f"certify: {source} must return an ImageSet or ((input, ...), labels), float (N, ...) "
            f"per modality and integer (N,); got {type(made).__name__}."
        )
    labels = made[1].long()
    return ModalityData(source, tuple(made[0]), labels, int(labels.max()) + 1)


_LOADERS: dict[str, Callable[[str], JobData]] = {"ranking": _queries, "multimodal": _modalities}


def _digest(*tensors: Tensor) -> str:
    """SHA-256 of the bytes of the tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
