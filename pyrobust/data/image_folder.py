"""Folders of image files, one sub-folder per class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrobust._checks import require_extra
from pyrobust.data.image_set import ImageSet

__all__ = ["load_image_folder"]

_SUBJECT = "load_image_folder"
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


def load_image_folder(folder: str | Path) -> ImageSet:
    """Read ``folder/CLASS/FILE`` or ``folder/{train,test}/CLASS/FILE``; needs Pillow.

    Classes are the sub-folders in order of their names, images the files in order of theirs. A
    folder without ``test`` is a test set. All images must have one size; grey images keep one
    channel where all are grey, else every image has three.

    Args:
        folder: the folder.

    Returns:
        Images ``(N, C, H, W)`` float32 in [0, 1] and their labels.

    Raises:
        FileNotFoundError: the folder is missing or holds no image in a class folder.
        ValueError: images of different sizes, a file that cannot be read, or parts whose classes
            differ.
        ImportError: Pillow is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{_SUBJECT}: folder must exist; got {str(folder)!r}.")
    parted = (folder / "test").is_dir()
    test_files, classes = _files(folder / "test" if parted else folder)
    train_files, train_classes = (
        _files(folder / "train") if (folder / "train").is_dir() and parted else ([], classes)
    )
    if train_classes != classes:
        raise ValueError(
            f"{_SUBJECT}: train and test must have the same classes; "
            f"got {train_classes} and {classes}."
        )
    images = _read([path for path, _ in train_files + test_files])
    labels = torch.tensor([label for _, label in train_files + test_files], dtype=torch.int64)
    cut = len(train_files)
    return ImageSet(
        folder.resolve().name, images[:cut], labels[:cut], images[cut:], labels[cut:], len(classes)
    )


def _files(folder: Path) -> tuple[list[tuple[Path, int]], list[str]]:
    """Image files with their class numbers, and the names of the classes."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in _SUFFIXES
    ]
    if not found:
        raise FileNotFoundError(f"{_SUBJECT}: {folder} must hold CLASS/IMAGE files; it has none.")
    return found, classes


def _read(paths: list[Path]) -> Tensor:
    """``(N, C, H, W)`` of the files."""
    try:
        from PIL import Image
    except ImportError as error:
        raise require_extra(_SUBJECT, "Pillow", "images") from error
    arrays: list[Any] = []
    for path in paths:
        try:
            with Image.open(path) as image:
                grey = image.mode in ("1", "L")
                pixels = np.asarray(image.convert("L" if grey else "RGB"))
        except OSError as error:
            raise ValueError(f"{_SUBJECT}: {path} is not a readable image ({error}).") from error
        if arrays and pixels.shape[:2] != arrays[0].shape[:2]:
            raise ValueError(
                f"{_SUBJECT}: images must have one size; got {arrays[0].shape[:2]} in {paths[0]} "
                f"and {pixels.shape[:2]} in {path}."
            )
        arrays.append(pixels)
    if any(pixels.ndim == 3 for pixels in arrays):
        arrays = [p if p.ndim == 3 else np.repeat(p[..., None], 3, -1) for p in arrays]
        stacked = np.stack(arrays).transpose(0, 3, 1, 2)
    else:
        stacked = np.stack(arrays)[:, None]
    return torch.from_numpy(np.ascontiguousarray(stacked).astype(np.float32) / 255.0)
