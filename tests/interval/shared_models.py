"""The trained networks beside the checkout, and the boxes that bounds are compared on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pyrobust.data import load_idx

NAMES = ["mnist_fc_3layer", "mnist_cnn_small", "cifar_2c2f"]


def load_model(folder: Path, name: str) -> nn.Sequential:
    """One of NAMES, in evaluation mode, float32."""
    layers: dict[str, list[nn.Module]] = {
        "mnist_fc_3layer": [
            nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(),
            nn.Linear(64, 10),
        ],
        "mnist_cnn_small": [
            nn.Conv2d(1, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 4, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10),
        ],
        "cifar_2c2f": [
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(3136, 32), nn.ReLU(), nn.Linear(32, 10),
        ],
    }  # fmt: skip
    model = nn.Sequential(*layers[name])
    stored = np.load(folder / "models" / f"{name}.npz")
    tensors = (torch.tensor(stored[key]) for key in stored.files)
    model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
    return model.eval()


def load_images(folder: Path, name: str, count: int) -> Tensor:
    """The first test images of the network's data, float32 in [0, 1]."""
    if name.startswith("mnist"):
        return load_idx(folder / "mnist").test_images[:count]
    images = np.load(folder / "cifar10" / "labels_and_test100.npz")["test100_images"][:count]
    return torch.tensor(images).permute(0, 3, 1, 2).float() / 255


def box(x: Tensor, eps: str) -> tuple[Tensor, Tensor]:
    """Ends within ``eps``, a number or a fraction, cut to [0, 1]."""
    top, _, bottom = eps.partition("/")
    radius = float(top) / float(bottom or 1)
    return (x - radius).clamp(0, 1), (x + radius).clamp(0, 1)
