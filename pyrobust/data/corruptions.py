"""Common corruptions of images, for training and testing robustness.

A small set in the manner of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations", ICLR 2019, arXiv 1903.12261; the severities are chosen for
small images and are not those of ImageNet-C.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pyrobust._checks import check_choice, check_float_tensor, check_integer, check_shape
from pyrobust.data.kornia_corruptions import KORNIA_CORRUPTIONS, corrupt_with_kornia

__all__ = ["CORRUPTIONS", "KORNIA_CORRUPTIONS", "corrupt"]

CORRUPTIONS = ("gaussian_noise", "impulse_noise", "box_blur", "contrast", "brightness", "fog")

_STRENGTH = {
    "gaussian_noise": (0.1, 0.2, 0.3, 0.45, 0.6),
    "impulse_noise": (0.03, 0.07, 0.12, 0.2, 0.3),
    "box_blur": (0.3, 0.5, 0.7, 0.85, 1.0),
    "contrast": (0.75, 0.55, 0.4, 0.25, 0.15),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "fog": (0.2, 0.35, 0.5, 0.65, 0.8),
}


def corrupt(
    images: Tensor, kind: str, severity: int = 5, *, generator: torch.Generator | None = None
) -> Tensor:
    """Corrupted copies of images.

    Args:
        images: ``(N, C, H, W)`` float in [0, 1].
        kind: one of :data:`CORRUPTIONS`, or of :data:`KORNIA_CORRUPTIONS` where the ``kornia``
            package is installed.
        severity: 1 to 5.
        generator: randomness of noise, fog and directions; None uses torch's default generator.

    Returns:
        The same shape, in [0, 1].

    Raises:
        ImportError: the kind needs kornia, which is not installed.
        TypeError: ``images`` is not floating point.
        ValueError: the shape, kind or severity is not accepted.
    """
    check_float_tensor("corrupt", "images", images)
    check_shape("corrupt", "images", images, (None, None, None, None))
    check_choice("corrupt", "kind", kind, CORRUPTIONS + KORNIA_CORRUPTIONS)
    check_integer("corrupt", "severity", severity, 1)
    check_choice("corrupt", "severity", severity, range(1, 6))
    if kind in KORNIA_CORRUPTIONS:
        return corrupt_with_kornia(images, kind, severity, generator)
    amount = _STRENGTH[kind][severity - 1]
    if kind == "gaussian_noise":
        changed = images + amount * torch.randn(images.shape, generator=generator).to(images)
    elif kind == "impulse_noise":
        dice = torch.rand(images.shape, generator=generator).to(images)
        changed = torch.where(dice < amount, (dice < amount / 2).to(images), images)
    elif kind == "box_blur":
        padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
        changed = torch.lerp(images, F.avg_pool2d(padded, 3, stride=1), amount)
    elif kind == "contrast":
        mean = images.mean((2, 3), keepdim=True)
        changed = mean + amount * (images - mean)
    elif kind == "brightness":
        changed = images + amount
    else:
        coarse = torch.rand(len(images), 1, 3, 3, generator=generator).to(images)
        cloud = F.interpolate(coarse, images.shape[2:], mode="bilinear", align_corners=True)
        changed = torch.lerp(images, (0.5 + 0.5 * cloud).expand_as(images), amount)
    return changed.clamp(0, 1)
