"""Small models that the tests of calibrated quantizers share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyrobust.data import load_digits
from pyrobust.train import GaussianCrossEntropy, fit


class Residual(nn.Module):
    """A block with two parallel layers on one input, and a third on their product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, 2 * width)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor, shift: Tensor) -> tuple[Tensor, None]:
        x = self.norm(hidden)
        inner = torch.relu(self.gate(x)) * self.up(x)
        return hidden + self.down(inner) + shift, None


class BlockNet(nn.Module):
    """Stem, a chain of residual blocks with a side input, and a head."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x)
        shift = 0.1 * x.mean(-1, keepdim=True)
        for block in self.blocks:
            hidden, _ = block(hidden, shift=shift)
        return self.head(hidden)


class ConvNet(nn.Module):
    """A CNN without a chain of blocks: a skip connection runs around its second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=4, padding_mode="circular")
        self.third = nn.Conv2d(8, 6, 2, stride=2, dilation=2)
        self.head = nn.Linear(6 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = x + torch.relu(self.second(x))
        return self.head(torch.relu(self.third(x)).flatten(1))


def trained_digits_cnn():
    """A convolutional network trained on digits for 12 epochs, and the digits."""
    data = load_digits()
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    options = {"objective": GaussianCrossEntropy(), "epochs": 12}
    generator = torch.Generator().manual_seed(0)
    return fit(net, data.train_images, data.train_labels, generator=generator, **options), data
