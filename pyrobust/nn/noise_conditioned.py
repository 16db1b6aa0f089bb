"""Encoders and classifiers that are told how noisy their input is.

Source: Lei et al., "Robust Representation Consistency Model via Contrastive Denoising", ICLR 2025,
arXiv 2501.13094 (:mod:`pyrobust.train.rrcm`); input scaling: Karras et al., arXiv 2206.00364.
Departures: any transformer with timm's attribute names is wrapped, its attention untouched.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pyrobust._checks import check_integer, check_positive

__all__ = ["NoiseConditionedClassifier", "NoiseConditionedEncoder"]

_PARTS = ("patch_embed", "cls_token", "pos_embed", "blocks", "norm", "embed_dim")


class NoiseConditionedEncoder(nn.Module):
    """A vision transformer with one more token, which says how noisy the image is.

    The image is divided by ``sqrt(sigma^2 + sigma_data^2)``; the token is a sinusoidal embedding
    of ``250 ln(sigma)``. The tokens are class, noise, patches, with a learned position each.

    Args:
        vit: a transformer with ``patch_embed``, ``cls_token``, ``pos_embed``, ``blocks``, ``norm``
            and ``embed_dim``, as timm's ``VisionTransformer`` or :class:`PatchTransformer`; its
            modules are used, not copied. Its head is left out.
        sigma_data: standard deviation of clean inputs, ``> 0``.
        projection: hidden and output width of the projection head: three linear layers without
            bias, batch norm and ReLU after the first two.
        freeze_patches: keep the patch projection as it is initialised (the paper: ImageNet).

    Raises:
        TypeError: ``vit`` lacks one of the attributes or has register tokens.
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        vit: Any,
        *,
        sigma_data: float = 0.5,
        projection: tuple[int, int] = (2048, 256),
        freeze_patches: bool = False,
    ) -> None:
        super().__init__()
        subject = type(self).__name__
        missing = [name for name in _PARTS if getattr(vit, name, None) is None]
        if missing or getattr(vit, "reg_token", None) is not None:
            raise TypeError(
                f"{subject}: vit must have {', '.join(_PARTS)} and no register tokens; "
                f"{type(vit).__name__} lacks {', '.join(missing) or 'nothing but has them'}."
            )
        check_positive(subject, "sigma_data", sigma_data)
        for value in projection:
            check_integer(subject, "projection", value, 1)
        width = int(vit.embed_dim)
        hidden, out = projection
        self.embed_dim, self.sigma_data = width, sigma_data
        self.patch_embed, self.blocks, self.norm = vit.patch_embed, vit.blocks, vit.norm
        self.cls_token = vit.cls_token
        self.pos_embed = nn.Parameter(_with_noise_position(vit.pos_embed.detach()))
        self.projection = nn.Sequential(
            nn.Linear(width, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, out, bias=False),
        )
        if freeze_patches:
            self.patch_embed.requires_grad_(False)

    def forward(self, x: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
        """Projection and feature of noisy images.

        Args:
            x: ``(N, C, H, W)`` images in [-1, 1] plus noise of standard deviation ``sigma``.
            sigma: one level or ``(N,)``, ``> 0``.

        Returns:
            ``(N, out)`` projection, ``(N, embed_dim)`` feature.
        """
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        scale = (level.square() + self.sigma_data**2).rsqrt()
        patches = self.patch_embed(x * scale[:, None, None, None])
        noise = _sinusoids(250 * level.log(), self.embed_dim)[:, None]
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), noise, patches], 1)
        feature: Tensor = self.norm(self.blocks(tokens + self.pos_embed)[:, 0])
        return self.projection(feature), feature


class NoiseConditionedClassifier(nn.Module):
    """Logits of noisy images of one noise level: the base of a smoothed classifier.

    Args:
        encoder: called as ``encoder(x, sigma)``, returns a pair whose second part is the
            ``(N, features)`` feature, as :class:`NoiseConditionedEncoder`.
        features: width of the feature.
        num_classes: ``K >= 2``.
        level: noise level that the encoder is told, ``> 0``, in normalised units: the level of
            pre-training nearest to the smoothing noise divided by ``std``.
        mean: of the normalisation ``(x - mean) / std``.
        std: of the normalisation, ``> 0``.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        num_classes: int,
        level: float,
        *,
        mean: float = 0.5,
        std: float = 0.5,
    ) -> None:
        super().__init__()
        subject = type(self).__name__
        check_positive(subject, "level", level)
        check_positive(subject, "std", std)
        check_integer(subject, "num_classes", num_classes, 2)
        self.encoder = encoder
        self.head = nn.Linear(features, num_classes)
        self.level, self.mean, self.std = level, mean, std
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, K)`` logits of ``(N, C, H, W)`` pixels in [0, 1] plus noise."""
        logits: Tensor = self.head(self.encoder((x - self.mean) / self.std, self.level)[1])
        return logits


def _with_noise_position(positions: Tensor) -> Tensor:
    """``(1, 2 + T, D)``: a position of zeros for the noise token behind the class token's."""
    return torch.cat([positions[:, :1], torch.zeros_like(positions[:, :1]), positions[:, 1:]], 1)


def _sinusoids(time: Tensor, width: int, longest: float = 1e4) -> Tensor:
    """``(N, width)``: cosines and sines of ``time`` at frequencies from 1 to ``1 / longest``."""
    half = width // 2
    steps = torch.arange(half, dtype=time.dtype, device=time.device)
    angle = time[:, None] * torch.exp(-math.log(longest) * steps / max(half, 1))
    table = torch.cat([angle.cos(), angle.sin()], 1)
    return nn.functional.pad(table, (0, width - 2 * half))
