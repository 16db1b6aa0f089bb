"""SubImage: a part of the coordinates of an input, filled up so that a network can read it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobust._checks import check_choice, check_integer, check_shape

__all__ = ["SubImage", "checkerboard_masks", "partition_masks"]

Scheme = Callable[[Tensor, Tensor], Tensor]

_FILLS = ("pool", "zero", "bilinear")
_REDUCES = ("keep", "compact")


def checkerboard_masks(shape: tuple[int, ...]) -> Tensor:
    """The two colours of a checkerboard.

    Args:
        shape: of one image, ``(C, H, W)`` or ``(H, W)``.

    Returns:
        ``(2, 1, H, W)`` bool: the pixels with ``i + j`` even, then those with ``i + j`` odd.

    Raises:
        ValueError: ``shape`` is not that of an image with at least two pixels.

    Example:
        >>> checkerboard_masks((1, 2, 2))[0].int()
        tensor([[[1, 0],
                 [0, 1]]], dtype=torch.int32)
    """
    return partition_masks(shape, scheme="checkerboard")


def partition_masks(shape: tuple[int, ...], *, scheme: str | Scheme = "checkerboard") -> Tensor:
    """Split the pixels of an image into two parts, the same for every channel.

    Args:
        shape: of one image, ``(C, H, W)`` or ``(H, W)``.
        scheme: ``"checkerboard"``, ``"columns"`` (even and odd columns), or a function of the row
            and column numbers, ``(H, 1)`` and ``(1, W)`` int64, that is True on the first part.

    Returns:
        ``(2, 1, H, W)`` bool, disjoint and covering.

    Raises:
        ValueError: ``shape`` is not that of an image, ``scheme`` is unknown, or a part is empty.
    """
    subject = "partition_masks"
    if len(shape) not in (2, 3):
        raise ValueError(
            f"{subject}: shape must be (C, H, W) or (H, W); got {tuple(shape)}. "
            "For other data pass masks of your own, one bool tensor (2, ...)."
        )
    height, width = shape[-2:]
    check_integer(subject, "height", height, 1)
    check_integer(subject, "width", width, 1)
    row, column = torch.arange(height)[:, None], torch.arange(width)[None]
    if callable(scheme):
        first = scheme(row, column).expand(height, width).bool()
    else:
        check_choice(subject, "scheme", scheme, ("checkerboard", "columns"))
        first = ((row * (scheme == "checkerboard") + column) % 2 == 0).expand(height, width)
    if bool(first.all()) or not bool(first.any()):
        raise ValueError(f"{subject}: both parts must hold a pixel; one of {shape} is empty.")
    return torch.stack([first, ~first])[:, None]


class SubImage(nn.Module):
    """Keeps the coordinates of a mask and hides all others: they cannot reach the output.

    Args:
        mask: ``(1, H, W)`` bool for images ``(C, H, W)``, or the shape of one input of other data;
            True where a coordinate is kept.
        fill: what stands at the hidden pixels. ``"zero"``: zeros. ``"pool"``: zeros, and the 2x2
            maximum of the kept pixels is added to each kept pixel (the paper's CIFAR-10 input).
            ``"bilinear"``: the weighted mean of the kept pixels among the eight neighbours. Without
            effect when ``reduce="compact"``; other data takes ``"zero"``.
        reduce: ``"keep"`` the shape, or ``"compact"``: only the kept coordinates,
            ``(N, C, H, W')`` where every row keeps ``W'`` pixels, ``(N, m)`` for other data.

    Raises:
        TypeError: ``mask`` is not a bool tensor.
        ValueError: an unknown option, an empty mask, or one that ``reduce`` or ``fill`` cannot
            serve.

    Example:
        >>> sub = SubImage(checkerboard_masks((2, 2))[0], fill="zero")
        >>> sub(torch.ones(1, 1, 2, 2)).flatten()
        tensor([1., 0., 0., 1.])
    """

    mask: Tensor

    def __init__(self, mask: Tensor, *, fill: str = "pool", reduce: str = "keep") -> None:
        super().__init__()
        subject = "SubImage"
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"{subject}: mask must be a bool tensor; got {mask!r:.80}.")
        check_choice(subject, "fill", fill, _FILLS)
        check_choice(subject, "reduce", reduce, _REDUCES)
        if not bool(mask.any()):
            raise ValueError(f"{subject}: mask must keep at least one coordinate; it keeps none.")
        self.image = mask.ndim == 3 and mask.shape[0] == 1
        if not self.image and reduce == "keep" and fill != "zero":
            raise ValueError(
                f"{subject}: fill={fill!r} needs a mask of shape (1, H, W); got "
                f"{tuple(mask.shape)}; use fill='zero'."
            )
        if self.image and reduce == "compact" and len(mask[0].sum(1).unique()) > 1:
            raise ValueError(f"{subject}: reduce='compact' needs rows that keep equally many.")
        self.fill = fill
        self.reduce = reduce
        self.register_buffer("mask", mask)

    def gather(self, x: Tensor) -> Tensor:
        """The kept coordinates of ``(N, ...)`` inputs, ``(N, C, m)`` or ``(N, m)``."""
        lead = (None, None) if self.image else (None,)
        check_shape("SubImage", "x", x, (*lead, *self.mask.shape[1 if self.image else 0 :]))
        mask = self.mask[0] if self.image else self.mask
        return x[..., mask] if self.image else x[:, mask]

    def expand(self, kept: Tensor) -> Tensor:
        """What the network reads, made of the kept coordinates alone; differentiable."""
        if self.reduce == "compact":
            return self._compact(kept)
        mask = self.mask[0] if self.image else self.mask
        where = mask.flatten().nonzero()[:, 0]
        flat = kept.new_zeros(*kept.shape[:-1], mask.numel()).index_copy(-1, where, kept)
        return self.finish(flat.reshape(*kept.shape[:-1], *mask.shape))

    def finish(self, placed: Tensor) -> Tensor:
        """What the network reads, from ``(N, ...)`` inputs that are 0 at the hidden coordinates."""
        if self.reduce == "compact":
            return self._compact(self.gather(placed))
        mask = self.mask[0] if self.image else self.mask
        if self.fill == "pool":
            return placed + _pooled(placed) * mask
        if self.fill == "bilinear":
            return torch.where(mask, placed, _neighbours(placed, mask))
        return placed

    def forward(self, x: Tensor) -> Tensor:
        """``(N, ...)`` inputs with the hidden coordinates replaced."""
        return self.expand(self.gather(x))

    def _compact(self, kept: Tensor) -> Tensor:
        return kept.reshape(*kept.shape[:2], self.mask.shape[1], -1) if self.image else kept

    def extra_repr(self) -> str:
        """Fill, reduction and size."""
        kept = f"{int(self.mask.sum())} of {self.mask.numel()}"
        return f"fill={self.fill!r}, reduce={self.reduce!r}, keeps {kept}"


def _pooled(placed: Tensor) -> Tensor:
    """The maximum of each 2x2 block, written back over the block."""
    height, width = placed.shape[-2:]
    small = F.max_pool2d(placed, 2, ceil_mode=True)
    return small.repeat_interleave(2, -2).repeat_interleave(2, -1)[..., :height, :width]


def _neighbours(placed: Tensor, mask: Tensor) -> Tensor:
    """The mean of the kept pixels around each pixel with weights 1 2 1; 0 where there are none."""
    line = placed.new_tensor([1.0, 2.0, 1.0])
    kernel = (line[:, None] * line)[None, None]
    channels = placed.shape[1]
    total = F.conv2d(placed, kernel.expand(channels, 1, 3, 3), padding=1, groups=channels)
    weight = F.conv2d(mask.to(placed.dtype)[None, None], kernel, padding=1)
    return total / weight.clamp(min=1.0)
