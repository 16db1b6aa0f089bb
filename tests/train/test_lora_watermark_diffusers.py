"""Bits on the decoder of a small diffusers autoencoder: reading, false claims, what survives."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyrobust.data import load_digits
from pyrobust.data.distortions import gaussian_blur, jpeg_like, resize_and_back
from pyrobust.evaluate import bit_accuracy, verify_ownership
from pyrobust.train import DynamicLossWeights, LoRAWatermark, merge_adapters

BITS = 8


class TileExtractor(nn.Module):
    """Projections on eight orthonormal 4x4 tiles repeated over a 32x32 image, standardised."""

    def __init__(self):
        super().__init__()
        tiles = torch.randn(16, BITS)
        tiles = torch.linalg.qr(tiles - tiles.mean(0))[0].T.reshape(BITS, 4, 4)
        self.register_buffer("tiles", tiles.repeat(1, 8, 8))
        self.register_buffer("mean", torch.zeros(BITS))
        self.register_buffer("std", torch.ones(BITS))

    def forward(self, images):
        return ((images * self.tiles[None]).sum((-2, -1)) - self.mean) / self.std


def decode(model, latents):
    return model.decode(latents).sample


def fine_tuned(model, latents, images, steps):
    """All of the decoder trained on reconstruction, the mark's layers included."""
    model = copy.deepcopy(model)
    parameters = list(model.decoder.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, 1e-4)
    for _ in range(steps):
        chosen = torch.randint(len(images), (16,))
        optimizer.zero_grad()
        F.mse_loss(decode(model, latents[chosen]), images[chosen]).backward()
        optimizer.step()
    return model


@pytest.mark.slow
def test_a_diffusers_decoder_carries_bits():
    diffusers = pytest.importorskip("diffusers")
    digits = load_digits()
    images = torch.cat([digits.train_images, digits.test_images])
    images = F.interpolate(images, size=32, mode="bilinear")
    train, held = images[:1400], images[1400:]
    vae = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=4, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    optimizer = torch.optim.Adam(vae.parameters(), 2e-3)
    for _ in range(150):
        batch = train[torch.randint(len(train), (16,))]
        optimizer.zero_grad()
        F.mse_loss(decode(vae, vae.encode(batch).latent_dist.sample()), batch).backward()
        optimizer.step()
    vae.eval()
    with torch.no_grad():
        latents, unseen = (vae.encode(x).latent_dist.mode() for x in (train, held))
        extractor = TileExtractor().eval()
        values = extractor(decode(vae, latents))
        extractor.mean, extractor.std = values.mean(0), values.std(0)
    message = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0])
    layers = [f"up_blocks.2.resnets.{i}.conv{j}" for i in range(2) for j in (1, 2)]
    mark = LoRAWatermark(
        vae, layers, message, extractor, decode=decode, scheduler=DynamicLossWeights(psnr=25.0)
    )
    mark.fit(latents[torch.randint(len(latents), (8,))] for _ in range(400))

    with torch.no_grad():
        marked, clean = mark.marked(unseen), mark.clean(unseen)
        psnr = -10 * float(torch.log10(F.mse_loss(marked, clean)))
        read = [bit_accuracy(extractor(x), message) for x in (marked, clean)]
    print(f"\naccuracy {read[0]:.3f} at {psnr:.1f} dB, {read[1]:.3f} without the mark")
    assert read[0] >= 0.98
    assert psnr >= 16
    assert 0.3 < read[1] < 0.7

    # single images of its own are claimed, groups without exception; foreign ones, whatever the
    # message, no more often than the rate
    own = [verify_ownership(x[None], extractor, message, fpr=5e-3).claimed for x in marked]
    groups = [verify_ownership(x, extractor, message, fpr=1e-6).claimed for x in marked.split(8)]
    print(f"claimed: {sum(own)} of {len(own)} images, {sum(groups)} of {len(groups)} groups of 8")
    assert sum(own) >= 0.95 * len(own)
    assert all(groups[:-1])  # the last one is smaller
    rate, claims = 0.05, []
    for _ in range(20):
        other = torch.randint(2, (BITS,))
        claims += [verify_ownership(x[None], extractor, other, fpr=rate).claimed for x in clean]
    false = sum(claims) / len(claims)
    print(f"false claims at {rate}: {false:.4f} of {len(claims)}")
    assert false <= rate

    table = mark.robustness(
        unseen[:200],
        {
            "JPEG 80": lambda x: jpeg_like(x, quality=80),
            "blur 0.5": lambda x: gaussian_blur(x, sigma=0.5),
            "resize 0.7": lambda x: resize_and_back(x, factor=0.7),
            "noise 0.05": lambda x: x + 0.05 * torch.randn_like(x),
        },
    )
    print({name: round(value, 3) for name, value in table.items()})
    assert min(table[name] for name in ("JPEG 80", "blur 0.5", "noise 0.05")) > 0.85

    merge_adapters(vae)
    left = []
    for steps in (0, 10, 50, 200):
        tuned = fine_tuned(vae, latents, train, steps)
        with torch.no_grad():
            seen = decode(tuned, unseen)
        found = verify_ownership(seen[:50], extractor, message, fpr=1e-6)
        left.append(bit_accuracy(extractor(seen).detach(), message))
        print(f"after {steps} steps of fine-tuning: {left[-1]:.3f}; 50 images: {found.summary()}")
        assert found.claimed or steps > 10
    assert left[0] == pytest.approx(read[0])
    assert left[-1] < left[0]  # fine-tuning wears the mark off, as published
