"""Folders in CIFAR's "python version": pickled batches of 32 x 32 colour images.

Source: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009 (CIFAR-10 and
CIFAR-100).
Departures: the pickles are read by an unpickler that makes arrays and plain values only, so a
foreign file cannot run code.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrobust.data.image_set import ImageSet

__all__ = ["load_cifar"]

_SUBJECT = "load_cifar"
_TEN = ([f"data_batch_{i}" for i in range(1, 6)], "test_batch", b"labels")
_HUNDRED = (["train"], "test", b"fine_labels")
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Refuses everything but arrays and plain values."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not an array")
        return super().find_class(module, name)


def load_cifar(folder: str | Path) -> ImageSet:
    """Read the batches of CIFAR-10 (``data_batch_1`` to ``5``, ``test_batch``) or CIFAR-100.

    Args:
        folder: where the batches lie. Training batches may be absent; the test batch may not.

    Returns:
        Images ``(N, 3, 32, 32)`` float32 in [0, 1] (bytes divided by 255) and their labels.

    Raises:
        FileNotFoundError: the folder or the test batch is missing.
        ValueError: a batch is not a pickle of images and labels.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{_SUBJECT}: folder must exist; got {str(folder)!r}.")
    train_names, test_name, key = _TEN if (folder / "test_batch").is_file() else _HUNDRED
    if not (folder / test_name).is_file():
        raise FileNotFoundError(f"{_SUBJECT}: {folder} must hold test_batch or test.")
    train = [_read_batch(folder / name, key) for name in train_names if (folder / name).is_file()]
    test_images, test_labels = _read_batch(folder / test_name, key)
    train_images = torch.cat([test_images[:0], *(images for images, _ in train)])
    train_labels = torch.cat([test_labels[:0], *(labels for _, labels in train)])
    classes = 10 if key == b"labels" else 100
    largest = int(torch.cat([train_labels, test_labels]).max())
    if largest >= classes:
        raise ValueError(f"{_SUBJECT}: labels must be below {classes}; got {largest}.")
    name = folder.resolve().name
    return ImageSet(name, train_images, train_labels, test_images, test_labels, classes)


def _read_batch(path: Path, key: bytes) -> tuple[Tensor, Tensor]:
    """Images and labels of one file."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[key], dtype=np.int64)
        images = pixels.reshape(len(labels), 3, 32, 32)
        if pixels.dtype != np.uint8 or len(labels) == 0:
            raise ValueError(f"{len(labels)} images of {pixels.dtype}")
    except Exception as error:  # a pickle can fail in any way
        raise ValueError(f"{_SUBJECT}: {path} is not a CIFAR batch ({error}).") from error
    return torch.from_numpy(images.astype(np.float32) / 255.0), torch.from_numpy(labels)
