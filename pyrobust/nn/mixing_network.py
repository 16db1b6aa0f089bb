"""MixingNetwork: from features of two classifiers to one number that says which to trust.

Source: Bai et al., arXiv 2301.12554, section 5 (architecture); pre-activation blocks: He, Zhang,
Ren, Sun, "Identity Mappings in Deep Residual Networks", ECCV 2016, arXiv 1603.05027.
Departures: features of different resolution are resized; vectors count as images of one pixel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust._checks import check_choice, check_integer

__all__ = ["MixingNetwork"]


class _PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU, around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        kept: Tensor = x if self.shortcut is None else self.shortcut(active)
        mixed: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return mixed + kept


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_PreActBlock(inputs, outputs, 2), _PreActBlock(outputs, outputs, 1))


class MixingNetwork(nn.Module):
    """Features of two classifiers, two taps each, to one unbounded number per input.

    The early features of both go through a stage; the later features, one stage further on, are
    added; two more stages, a global mean and a linear layer without bias follow.

    Args:
        early_channels: channels of the early features of the standard and the robust classifier.
        later_channels: channels of their later features.
        widths: channels after each of the three stages; None takes 1, 1.5 and 2 times the sum of
            ``later_channels``.
        shortcut: how the later features join: ``"conv"``, a 1x1 convolution, or ``"identity"``,
            which needs their channels to sum to ``widths[0]``.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        early_channels: tuple[int, int],
        later_channels: tuple[int, int],
        *,
        widths: tuple[int, int, int] | None = None,
        shortcut: str = "conv",
    ) -> None:
        super().__init__()
        subject = type(self).__name__
        for name, pair in (("early_channels", early_channels), ("later_channels", later_channels)):
            for value in pair:
                check_integer(subject, name, value, 1)
        check_choice(subject, "shortcut", shortcut, ("conv", "identity"))
        later = sum(later_channels)
        widths = widths or (later, later * 3 // 2, later * 2)
        if shortcut == "identity" and widths[0] != later:
            raise ValueError(
                f"{subject}: shortcut='identity' needs widths[0] = {later}, the sum of "
                f"later_channels; got {widths[0]}."
            )
        self.first = _stage(sum(early_channels), widths[0])
        self.join = nn.Conv2d(later, widths[0], 1, bias=False) if shortcut == "conv" else None
        self.rest = nn.Sequential(_stage(widths[0], widths[1]), _stage(widths[1], widths[2]))
        self.linear = nn.Linear(widths[2], 1, bias=False)

    def forward(self, early: Sequence[Tensor], later: Sequence[Tensor]) -> Tensor:
        """``(N,)`` numbers from early and later features of the standard and robust classifier.

        Args:
            early: two ``(N, C, H, W)`` or ``(N, C)`` tensors; the first takes the resolution of the
                second.
            later: the same, one stage further on; takes the resolution after the first stage.
        """
        mixed: Tensor = self.first(_concatenated(early))
        joined = _concatenated(later)
        if joined.shape[-2:] != mixed.shape[-2:]:
            joined = F.interpolate(joined, mixed.shape[-2:], mode="bilinear", align_corners=False)
        mixed = mixed + (joined if self.join is None else self.join(joined))
        pooled = self.rest(mixed).mean((2, 3))
        result: Tensor = self.linear(pooled)[:, 0]
        return result


def _concatenated(features: Sequence[Tensor]) -> Tensor:
    """Both maps along the channels, the first resized to the second."""
    standard, robust = (f[:, :, None, None] if f.ndim == 2 else f for f in features)
    if standard.shape[-2:] != robust.shape[-2:]:
        size = robust.shape[-2:]
        standard = F.interpolate(standard, size, mode="bilinear", align_corners=False)
    return torch.cat([standard, robust], 1)
