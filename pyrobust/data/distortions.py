"""Differentiable image distortions: what a picture goes through on its way.

All take ``(B, C, H, W)`` float images in [0, 1] and return the same shape; gradients pass through
(rounding in :func:`jpeg_like` is straight-through).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pyrobust._checks import check_at_least, check_float_tensor, check_integer, check_shape

__all__ = ["crop_and_zoom", "gaussian_blur", "jpeg_like", "resize_and_back"]

# Luminance quantisation table of ITU-T T.81, annex K.1.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


def _check_images(subject: str, images: Tensor) -> None:
    check_float_tensor(subject, "images", images)
    check_shape(subject, "images", images, (None, None, None, None))


@functools.lru_cache(maxsize=1)
def _dct_matrix() -> Tensor:
    k = torch.arange(8, dtype=torch.float64)
    rows = torch.cos(math.pi / 8 * (k[None, :] + 0.5) * k[:, None]) * math.sqrt(2 / 8)
    rows[0] /= math.sqrt(2)
    return rows.float()


def jpeg_like(images: Tensor, *, quality: int) -> Tensor:
    """Quantise 8 x 8 cosine coefficients with the standard luminance table, every channel alike.

    Args:
        images: ``(B, C, H, W)`` in [0, 1]; sizes that 8 does not divide are reflected outward.
        quality: 1 (worst) to 100, as in the reference encoder.

    Raises:
        ValueError: shape or quality is not accepted.
    """
    _check_images("jpeg_like", images)
    check_integer("jpeg_like", "quality", quality, 1)
    if quality > 100:
        raise ValueError(f"jpeg_like: quality must be at most 100; got {quality}.")
    percent = 5000 / quality if quality < 50 else 200 - 2 * quality
    table = (torch.tensor(_LUMINANCE, device=images.device) * percent + 50).div(100).floor()
    table = table.clamp(1, 255).to(images.dtype)
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % 8, 0, -height % 8), mode="replicate") * 255 - 128
    blocks = padded.unfold(2, 8, 8).unfold(3, 8, 8)
    dct = _dct_matrix().to(images)
    scaled = dct @ blocks @ dct.T / table
    rounded = scaled + (scaled.round() - scaled).detach()
    restored = dct.T @ (rounded * table) @ dct
    joined = restored.permute(0, 1, 2, 4, 3, 5).reshape(padded.shape)
    return ((joined + 128) / 255).clamp(0, 1)[..., :height, :width]


def gaussian_blur(images: Tensor, *, sigma: float) -> Tensor:
    """Separable Gaussian blur with reflected borders; ``sigma`` in pixels, ``> 0``."""
    _check_images("gaussian_blur", images)
    check_at_least("gaussian_blur", "sigma", sigma, 1e-3)
    radius = min(math.ceil(3 * sigma), min(images.shape[-2:]) - 1)
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, -1)
    padded = F.pad(images, (radius,) * 4, mode="reflect")
    rows = F.conv2d(padded, kernel[:, :, None, :], groups=images.shape[1])
    return F.conv2d(rows, kernel[:, :, :, None], groups=images.shape[1])


def resize_and_back(images: Tensor, *, factor: float) -> Tensor:
    """Shrink (or enlarge) by ``factor`` with antialiasing and return to the original size."""
    _check_images("resize_and_back", images)
    check_at_least("resize_and_back", "factor", factor, 1e-3)
    size = [max(1, round(n * factor)) for n in images.shape[-2:]]
    small = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    return F.interpolate(small, size=images.shape[-2:], mode="bilinear", antialias=True)


def crop_and_zoom(images: Tensor, *, factor: float, generator: torch.Generator) -> Tensor:
    """Keep a random window of ``factor`` times the sides and enlarge it to the original size.

    Args:
        images: ``(B, C, H, W)``.
        factor: in ``(0, 1]``.
        generator: chooses the window (one for the batch).
    """
    _check_images("crop_and_zoom", images)
    if not 0 < factor <= 1:
        raise ValueError(f"crop_and_zoom: factor must lie in (0, 1]; got {factor}.")
    height, width = images.shape[-2:]
    h, w = max(1, round(height * factor)), max(1, round(width * factor))
    top = int(torch.randint(height - h + 1, (), generator=generator))
    left = int(torch.randint(width - w + 1, (), generator=generator))
    window = images[..., top : top + h, left : left + w]
    return F.interpolate(window, size=(height, width), mode="bilinear", antialias=True)
