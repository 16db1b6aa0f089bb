"""The demo's network: two convolutions and two linear layers."""

from __future__ import annotations

from torch import nn

__all__ = ["convolutional_network"]


def convolutional_network(image_shape: tuple[int, int, int], num_classes: int) -> nn.Sequential:
    """Convolutions of 8 and 16 channels (the second halves the image), then 64 hidden units.

    Small on purpose: eight variants of it are certified on every test image while one waits.

    Args:
        image_shape: ``(C, H, W)``.
        num_classes: number of logits.

    Example:
        >>> sum(p.numel() for p in convolutional_network((1, 8, 8), 10).parameters())
        18346
    """
    channels, height, width = image_shape
    reduced = ((height + 1) // 2) * ((width + 1) // 2)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * reduced, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )
