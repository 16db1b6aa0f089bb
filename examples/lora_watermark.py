"""Write an 8-bit message into the output of a small decoder and prove ownership of its images."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from pyrobust.data.distortions import gaussian_blur, jpeg_like
from pyrobust.evaluate import Ownership, verify_ownership
from pyrobust.train import DynamicLossWeights, LoRAWatermark


class TileExtractor(nn.Module):
    """Reads eight bits as projections on eight orthonormal 4x4 tiles repeated over the image."""

    def __init__(self) -> None:
        super().__init__()
        tiles = torch.randn(16, 8)
        tiles = torch.linalg.qr(tiles - tiles.mean(0))[0].T.reshape(8, 4, 4)
        self.register_buffer("tiles", tiles.repeat(1, 4, 4))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("std", torch.ones(8))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Eight standardised projections per image."""
        return ((images * self.tiles[None]).sum((-2, -1)) - self.mean) / self.std


def main() -> None:
    torch.manual_seed(0)
    x = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    x = F.interpolate(x, size=16, mode="bilinear")
    encoder = nn.Sequential(nn.Conv2d(1, 24, 4, 4), nn.ReLU(), nn.Conv2d(24, 8, 3, padding=1))
    decoder = nn.Sequential(
        nn.Conv2d(8, 24, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=4),
        nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 1, 3, padding=1), nn.Sigmoid(),
    )  # fmt: skip
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 3e-3)
    for _ in range(6):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.mse_loss(decoder(encoder(x[batch])), x[batch]).backward()
            optimizer.step()
    decoder.eval()
    extractor = TileExtractor().eval()
    with torch.no_grad():
        latents = encoder(x)
        values = extractor(decoder(latents))
        extractor.mean, extractor.std = values.mean(0), values.std(0)
        foreign = decoder(latents[:10])
    message = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0])
    mark = LoRAWatermark(
        decoder, ["3"], message, extractor, scheduler=DynamicLossWeights(psnr=25.0)
    )
    steps = mark.fit(latents[torch.randint(len(latents), (16,))] for _ in range(200))
    print(f"last step: bit accuracy {steps[-1].bitacc:.3f}, PSNR {steps[-1].psnr:.1f} dB")
    images = mark.marked(latents[:10]).detach()

    def prove(seen: torch.Tensor) -> Ownership:
        # Images of one decoder depend on each other; the default null hypothesis allows for that.
        # Eight bits cannot claim anything at a rate below 2^-8.
        return verify_ownership(seen, extractor, message, fpr=0.005)

    print("marked images:  ", prove(images).summary())
    print("unmarked images:", prove(foreign).summary())
    for name, seen in (
        ("JPEG 80", jpeg_like(images, quality=80)),
        ("blur 0.5", gaussian_blur(images, sigma=0.5)),
    ):
        print(f"after {name}:", prove(seen).summary())


if __name__ == "__main__":
    main()
