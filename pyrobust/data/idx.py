"""Folders in the idx format of MNIST: four files, plain or gzip-compressed.

Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits" (idx1 and idx3).
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyrobust.data.image_set import ImageSet

__all__ = ["load_idx"]

_SUBJECT = "load_idx"
_UNSIGNED_BYTE = 8


def load_idx(folder: str | Path) -> ImageSet:
    """Read ``train-images-idx3-ubyte`` and its three companions (each with or without ``.gz``).

    Args:
        folder: where the files lie, named as MNIST and its relatives name them.

    Returns:
        Images ``(N, 1, H, W)`` float32 in [0, 1] (bytes divided by 255) and their labels; the
        number of classes is one more than the largest label.

    Raises:
        FileNotFoundError: the folder or one of the files is missing.
        ValueError: a file is truncated or not idx, or the counts or sizes disagree.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{_SUBJECT}: folder must exist; got {str(folder)!r}.")
    train_images, train_labels = _read_part(folder, "train")
    test_images, test_labels = _read_part(folder, "t10k")
    if train_images.shape[1:] != test_images.shape[1:]:
        sizes = f"{tuple(train_images.shape[2:])} and {tuple(test_images.shape[2:])}"
        raise ValueError(f"{_SUBJECT}: train and test images must have one size; got {sizes}.")
    classes = 1 + int(max(train_labels.max(), test_labels.max()))
    name = folder.resolve().name
    return ImageSet(name, train_images, train_labels, test_images, test_labels, classes)


def _read_part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images and labels of ``train`` or ``t10k``."""
    pixels = _read_idx(_find(folder, f"{part}-images-idx3-ubyte"), ndim=3)
    classes = _read_idx(_find(folder, f"{part}-labels-idx1-ubyte"), ndim=1)
    if len(pixels) != len(classes) or len(pixels) == 0:
        raise ValueError(
            f"{_SUBJECT}: {part} must hold one label per image and at least one image; "
            f"got {len(pixels)} images and {len(classes)} labels in {folder}."
        )
    images = torch.from_numpy(pixels.astype(np.float32) / 255.0)[:, None]
    return images, torch.from_numpy(classes.astype(np.int64))


def _find(folder: Path, name: str) -> Path:
    """The file called ``name``, or its compressed form."""
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{_SUBJECT}: {folder} must hold {name} or {name}.gz; neither exists.")


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """The array of one idx file of unsigned bytes."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{_SUBJECT}: {path} is not a complete gzip file ({error}).") from error
    head = 4 + 4 * ndim
    if len(raw) < head or raw[:4] != bytes((0, 0, _UNSIGNED_BYTE, ndim)):
        raise ValueError(f"{_SUBJECT}: {path} is not an idx{ndim} file of unsigned bytes.")
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(ndim)]
    expected = head + int(np.prod(shape, dtype=object))
    if len(raw) != expected:
        raise ValueError(
            f"{_SUBJECT}: {path} must have {expected} bytes for shape {tuple(shape)}; "
            f"got {len(raw)}."
        )
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)
