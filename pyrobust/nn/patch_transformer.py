"""PatchTransformer: a small vision transformer, with the attribute names of timm's.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at
Scale", ICLR 2021, arXiv 2010.11929; pre-norm blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyrobust._checks import check_integer

__all__ = ["PatchTransformer"]


class _PatchEmbed(nn.Module):
    """Patches to tokens, ``(N, C, H, W)`` to ``(N, T, D)``."""

    def __init__(self, channels: int, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, embed_dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x)
        return tokens.flatten(2).transpose(1, 2)


class PatchTransformer(nn.Module):
    """Images to the normalised class token.

    Args:
        image_size: height and width of the images, a multiple of ``patch_size``.
        patch_size: height and width of a patch.
        channels: channels of the images.
        embed_dim: width, a multiple of ``num_heads``.
        depth: blocks.
        num_heads: attention heads.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> PatchTransformer(8, 4, 1, embed_dim=16, depth=1, num_heads=2)(
        ...     torch.zeros(3, 1, 8, 8)
        ... ).shape
        torch.Size([3, 16])
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        channels: int = 3,
        *,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
    ) -> None:
        super().__init__()
        subject = type(self).__name__
        for name, value in (("patch_size", patch_size), ("depth", depth), ("channels", channels)):
            check_integer(subject, name, value, 1)
        if image_size % patch_size or image_size < patch_size:
            raise ValueError(
                f"{subject}: image_size must be a multiple of patch_size = {patch_size}; "
                f"got {image_size}."
            )
        if embed_dim % num_heads:
            raise ValueError(
                f"{subject}: embed_dim must be a multiple of num_heads = {num_heads}; "
                f"got {embed_dim}."
            )
        self.embed_dim = embed_dim
        self.patch_embed = _PatchEmbed(channels, patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        tokens = (image_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + tokens, embed_dim))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    embed_dim,
                    num_heads,
                    4 * embed_dim,
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(embed_dim)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, embed_dim)`` features of ``(N, C, H, W)`` images."""
        tokens = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1) + self.pos_embed
        result: Tensor = self.norm(self.blocks(tokens)[:, 0])
        return result
