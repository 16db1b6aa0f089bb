"""HiDDeN-type watermark pair: an embedder and the extractor that reads n bits from an image.

Only the extractor is kept afterwards; :class:`pyrobust.train.LoRAWatermark` trains a generator
against it.

Source: Zhu et al., "HiDDeN: Hiding Data With Deep Networks", ECCV 2018, arXiv 1807.09937; the
extractor of seven conv-BN-ReLU blocks and the whitening of its outputs follow the use in Lin et
al., arXiv 2410.20202.
Departures: JPEG is a differentiable quantisation of block cosine coefficients, luminance table on
every channel.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from pyrobust._checks import check_integer, check_positive
from pyrobust.data.distortions import crop_and_zoom, jpeg_like, resize_and_back

__all__ = ["HiddenExtractor", "HiddenWatermark", "random_distortion", "whiten_extractor_"]


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class HiddenExtractor(nn.Module):
    """Images to message logits: seven 3x3 blocks, global average, linear.

    Args:
        n_bits: message length, ``>= 1``.
        channels: image channels.
        width: channels of the hidden blocks.
    Shape:
        ``(B, channels, H, W)`` in [0, 1] to ``(B, n_bits)``.
    """

    def __init__(self, n_bits: int, *, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        check_integer("HiddenExtractor", "n_bits", n_bits, 1)
        widths = [channels] + [width] * 6 + [n_bits]
        self.blocks = nn.Sequential(*map(_block, widths[:-1], widths[1:]))
        self.linear = nn.Linear(n_bits, n_bits)

    def forward(self, images: Tensor) -> Tensor:
        """Message logits."""
        logits: Tensor = self.linear(self.blocks(2 * images - 1).mean((-2, -1)))
        return logits


class _Embedder(nn.Module):
    """Image and message to a residual in [-1, 1]."""

    def __init__(self, n_bits: int, channels: int, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _block(channels, width), _block(width, width), _block(width, width)
        )
        self.join = nn.Sequential(
            _block(width + n_bits + channels, width), nn.Conv2d(width, channels, 1), nn.Tanh()
        )

    def forward(self, images: Tensor, messages: Tensor) -> Tensor:
        planes = (2 * messages - 1)[:, :, None, None].expand(-1, -1, *images.shape[-2:])
        joined = torch.cat([self.features(2 * images - 1), planes, images], 1)
        residual: Tensor = self.join(joined)
        return residual


def random_distortion(images: Tensor, generator: torch.Generator) -> Tensor:
    """One of: nothing, crop or resize by 0.3 or 0.7; then JPEG at 50 or 80 with probability 1/2."""
    kind = int(torch.randint(5, (), generator=generator))
    factor = (0.3, 0.7)[kind % 2]
    if kind in (1, 2):
        images = crop_and_zoom(images, factor=factor, generator=generator)
    elif kind in (3, 4):
        images = resize_and_back(images, factor=factor)
    quality = int(torch.randint(4, (), generator=generator))
    return jpeg_like(images, quality=(50, 80)[quality]) if quality < 2 else images


class HiddenWatermark(nn.Module):
    """Embedder and extractor, trained together through random distortions.

    Args:
        n_bits: message length.
        channels: image channels.
        width: channels of the hidden blocks.
        strength: largest change of a pixel, in units of [0, 1].
    """

    def __init__(
        self, n_bits: int, *, channels: int = 3, width: int = 64, strength: float = 0.1
    ) -> None:
        super().__init__()
        check_positive("HiddenWatermark", "strength", strength)
        self.n_bits, self.strength = n_bits, strength
        self.embedder = _Embedder(n_bits, channels, width)
        self.extractor = HiddenExtractor(n_bits, channels=channels, width=width)

    def forward(self, images: Tensor, messages: Tensor) -> Tensor:
        """Images that carry the messages ``(B, n_bits)``."""
        marked: Tensor = images + self.strength * self.embedder(images, messages)
        # straight-through, so that black and white pixels still pass gradients to the embedder
        return marked + (marked.clamp(0, 1) - marked).detach()

    def fit(
        self,
        batches: Iterable[Tensor],
        *,
        lr: float = 1e-3,
        image_weight: float = 0.1,
        seed: int = 0,
        distort: bool = True,
        progress: bool = False,
    ) -> list[float]:
        """Train on batches of images; one optimizer step a batch.

        Args:
            batches: ``(B, C, H, W)`` images in [0, 1].
            lr: AdamW learning rate, ``> 0``.
            image_weight: weight of the mean squared change (in units of the strength squared).
            seed: messages and distortions.
            distort: pass the marked images through :func:`random_distortion`.
            progress: show a bar.

        Returns:
            Bit accuracy of every batch; the pair is left in evaluation mode.
        """
        check_positive("HiddenWatermark.fit", "lr", lr)
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(self.parameters(), lr=lr)
        history = []
        self.train()
        for images in tqdm(batches, disable=not progress, desc="HiddenWatermark"):
            messages = torch.randint(2, (len(images), self.n_bits), generator=generator)
            messages = messages.to(images)
            marked = self(images, messages)
            seen = random_distortion(marked, generator) if distort else marked
            logits = self.extractor(seen)
            change = ((marked - images) / self.strength).square().mean()
            loss = F.binary_cross_entropy_with_logits(logits, messages) + image_weight * change
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(float(((logits > 0) == (messages > 0)).double().mean()))
        self.eval()
        return history


@torch.no_grad()
def whiten_extractor_(extractor: HiddenExtractor, images: Tensor) -> HiddenExtractor:
    """Make the logits zero-mean and uncorrelated on clean images, folded into the last layer.

    Args:
        extractor: in evaluation mode.
        images: ``(N, C, H, W)`` clean images, ``N`` above the number of bits.

    Returns:
        ``extractor`` itself.

    Raises:
        ValueError: too few images for the covariance.
    """
    n_bits = extractor.linear.out_features
    if len(images) <= n_bits:
        raise ValueError(
            f"whiten_extractor_: images must number more than {n_bits}; got {len(images)}."
        )
    logits = extractor(images).double()
    centred = logits - logits.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(images) - 1))
    inverse_root = (vectors * values.clamp_min(1e-6 * values.max()).rsqrt()) @ vectors.T
    layer = extractor.linear
    layer.weight.copy_(inverse_root @ layer.weight.double())
    layer.bias.copy_(inverse_root @ (layer.bias.double() - logits.mean(0)))
    return extractor
