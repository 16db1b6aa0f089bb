"""Corruptions that the ``kornia`` package computes: blurs, elastic shifts, JPEG, tone.

Needs ``pip install 'pyrobust[corruptions]'``. The severities are chosen for small images and are
not those of ImageNet-C.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["KORNIA_CORRUPTIONS", "corrupt_with_kornia"]

KORNIA_CORRUPTIONS = (
    "gaussian_blur",
    "motion_blur",
    "elastic_transform",
    "jpeg_compression",
    "posterize",
    "gamma",
)

_STRENGTH: dict[str, tuple[float, ...]] = {
    "gaussian_blur": (0.4, 0.6, 0.8, 1.0, 1.3),  # standard deviation, pixels
    "motion_blur": (3, 3, 5, 7, 9),  # length, pixels; the first is mixed with the image
    "elastic_transform": (0.3, 0.6, 0.9, 1.2, 1.5),  # scale of the displacement, pixels
    "jpeg_compression": (60, 40, 25, 15, 8),  # quality
    "posterize": (5, 4, 3, 2, 1),  # bits
    "gamma": (1.5, 2.0, 3.0, 4.0, 6.0),  # exponent
}
_JPEG_BLOCK = 16


def _kornia(name: str) -> Any:
    try:
        return importlib.import_module(f"kornia.{name}")
    except ImportError as error:
        raise ImportError(
            "corrupt: this kind needs the kornia package; pip install 'pyrobust[corruptions]'."
        ) from error


def corrupt_with_kornia(
    images: Tensor, kind: str, severity: int, generator: torch.Generator | None
) -> Tensor:
    """What :func:`pyrobust.data.corrupt` does for the kinds of :data:`KORNIA_CORRUPTIONS`.

    Raises:
        ImportError: kornia is not installed.
    """
    amount = _STRENGTH[kind][severity - 1]
    changed: Tensor
    if kind == "gaussian_blur":
        size = 2 * round(3 * amount) + 1
        changed = _kornia("filters").gaussian_blur2d(
            images, (size, size), (amount, amount), border_type="replicate"
        )
    elif kind == "motion_blur":
        angle = 360 * torch.rand(len(images), generator=generator).to(images)
        level = torch.zeros(len(images)).to(images)
        changed = _kornia("filters").motion_blur(
            images, int(amount), angle, level, border_type="replicate"
        )
        changed = torch.lerp(images, changed, 0.5) if severity == 1 else changed
    elif kind == "elastic_transform":
        shape = (len(images), 2, *images.shape[2:])
        noise = 2 * torch.rand(shape, generator=generator).to(images) - 1
        side = min(images.shape[2:])
        # kornia counts displacements in halves of the image, smoothed over 3 pixels
        changed = _kornia("geometry.transform").elastic_transform2d(
            images, noise, (5, 5), (1.5, 1.5), (8 * amount / side, 8 * amount / side)
        )
    elif kind == "jpeg_compression":
        changed = _jpeg(images, amount)
    elif kind == "posterize":
        changed = _kornia("enhance").posterize(images, int(amount))
    else:
        changed = _kornia("enhance").adjust_gamma(images, amount)
    return changed.clamp(0, 1)


def _jpeg(images: Tensor, quality: float) -> Tensor:
    """Padded to whole blocks; but for three, channels are coded as gray images."""
    count, channels, height, width = images.shape
    pad = (0, -width % _JPEG_BLOCK, 0, -height % _JPEG_BLOCK)
    padded = F.pad(images, pad, mode="replicate")
    flat = padded
    if channels != 3:
        flat = padded.reshape(-1, 1, *padded.shape[2:]).expand(-1, 3, -1, -1)
    level = torch.full((len(flat),), quality).to(images)
    coded: Tensor = _kornia("enhance").jpeg_codec_differentiable(flat.contiguous(), level)
    if channels != 3:
        coded = coded.mean(1).reshape(count, channels, *padded.shape[2:])
    return coded[:, :, :height, :width]
