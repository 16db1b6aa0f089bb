"""One way to name any image collection: a word, a folder, or a Python function."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from pyrobust.data.cifar import load_cifar
from pyrobust.data.digits import load_digits
from pyrobust.data.idx import load_idx
from pyrobust.data.image_folder import load_image_folder
from pyrobust.data.image_set import ImageSet

__all__ = ["load_images"]

_SUBJECT = "load_images"


def load_images(source: str) -> ImageSet:
    """The image collection that ``source`` names.

    Args:
        source: ``"digits"``; or a folder of MNIST idx files, of CIFAR pickles, or of image files in
            class folders (told apart by what is in it); or ``"module:function"``, a function
            without arguments that returns an :class:`ImageSet` or a pair of test images
            ``(N, C, H, W)`` in [0, 1] and labels ``(N,)``.

    Returns:
        The collection.

    Raises:
        FileNotFoundError: the folder does not exist or holds none of these.
        ValueError: the function cannot be found or returns something else, or a file is damaged.

    Example:
        >>> load_images("digits").num_classes
        10
    """
    folder = Path(source)
    if source == "digits":
        return load_digits()
    if folder.is_dir():
        if any(folder.glob("t10k-images-idx3-ubyte*")):
            return load_idx(folder)
        if (folder / "test_batch").is_file() or (folder / "test").is_file():
            return load_cifar(folder)
        return load_image_folder(folder)
    if ":" in source and not folder.exists():
        return _from_function(source)
    raise FileNotFoundError(
        f"{_SUBJECT}: data must be digits, an existing folder or module:function; got {source!r}."
    )


def _from_function(source: str) -> ImageSet:
    """What the function returns, as an image set."""
    module_name, _, function_name = source.partition(":")
    try:
        made: Any = getattr(importlib.import_module(module_name), function_name)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{_SUBJECT}: data must be module:function; got {source!r} ({error})."
        ) from error
    if isinstance(made, ImageSet):
        return made
    fits = (
        isinstance(made, tuple)
        and len(made) == 2
        and all(isinstance(part, torch.Tensor) for part in made)
        and made[0].ndim == 4
        and made[0].is_floating_point()
        and made[1].shape == made[0].shape[:1]
        and len(made[1]) > 0
        and not made[1].is_floating_point()
    )
    if not fits:
        raise ValueError(
            f"{_SUBJECT}: {source} must return an ImageSet or float images (N, C, H, W) and "
            f"integer labels (N,); got {type(made).__name__}."
        )
    images, labels = made[0].float(), made[1].long()
    return ImageSet(source, images[:0], labels[:0], images, labels, int(labels.max()) + 1)
