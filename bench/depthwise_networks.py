"""Small networks of depthwise convolutions for 3x96x96 images, with batch norm at its start."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Residual(nn.Module):
    """A branch added to its input."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def _expanded(inputs: int, outputs: int, stride: int, times: int) -> nn.Module:
    """1x1 to more channels, 3x3 of each, 1x1 to few (Sandler et al. 2018)."""
    width = inputs * times
    wider: list[nn.Module] = []
    if times > 1:
        wider = [nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()]
    block = nn.Sequential(
        *wider,
        nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False),
        nn.BatchNorm2d(width), nn.ReLU6(),
        nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
    )  # fmt: skip
    return Residual(block) if stride == 1 and inputs == outputs else block


def mobilenet() -> nn.Module:
    """MobileNetV2 with ten classes: 2.2 million weights."""
    stages = [
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
        (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ]  # fmt: skip
    layers: list[nn.Module] = []
    width = 32
    for times, outputs, count, stride in stages:
        for i in range(count):
            layers.append(_expanded(width, outputs, stride if i == 0 else 1, times))
            width = outputs
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(), *layers,
        nn.Conv2d(width, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 10),
    ).eval()  # fmt: skip


def _mixed(width: int) -> nn.Module:
    """7x7 of each channel, then two layers of pixels (Liu et al. 2022; batch norm for theirs)."""
    return Residual(
        nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width), nn.BatchNorm2d(width),
            nn.Conv2d(width, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1),
        )
    )  # fmt: skip


def convnext() -> nn.Module:
    """Ten blocks of 48 to 384 channels, shaped as a ConvNeXt."""
    layers: list[nn.Module] = [nn.Conv2d(3, 48, 4, 4), nn.BatchNorm2d(48)]
    width = 48
    for count, outputs in ((2, 48), (2, 96), (4, 192), (2, 384)):
        if outputs != width:
            layers += [nn.BatchNorm2d(width), nn.Conv2d(width, outputs, 2, 2)]
            width = outputs
        layers += [_mixed(width) for _ in range(count)]
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)
    return nn.Sequential(*layers, *pooled).eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {"MobileNetV2": mobilenet, "ConvNeXt": convnext}
