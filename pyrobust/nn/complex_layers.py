"""Layers on complex numbers kept as pairs of real tensors: norm, activation, positions.

They are the parts of iFairy's transformer (:class:`~pyrobust.nn.ComplexDecoderLM`): every layer
takes ``(x_real, x_imag)`` of one shape and returns such a pair.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyrobust._checks import check_integer, check_positive

__all__ = ["ComplexRMSNorm", "ComplexReLUSquared", "ComplexRotaryEmbedding"]

Pair = tuple[Tensor, Tensor]


class ComplexRMSNorm(nn.Module):
    """Divide by the root mean square modulus, then scale each part by gains of its own.

    ``(a, b) * rsqrt(mean(a^2 + b^2) + eps)``, computed in float32; then ``weight_real * a`` and
    ``weight_imag * b`` (two real gains an element, not a complex product).

    Args:
        size: of the last axis.
        eps: added to the mean square, ``> 0``.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, size: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        check_integer("ComplexRMSNorm", "size", size, 1)
        check_positive("ComplexRMSNorm", "eps", eps)
        self.size = size
        self.eps = eps
        self.weight_real = nn.Parameter(torch.ones(size))
        self.weight_imag = nn.Parameter(torch.ones(size))

    def forward(self, x_real: Tensor, x_imag: Tensor) -> Pair:
        """``(..., size)`` twice, dtype of ``x_real``."""
        dtype = x_real.dtype
        a, b = x_real.float(), x_imag.float()
        factor = torch.rsqrt((a * a + b * b).mean(-1, keepdim=True) + self.eps)
        real = self.weight_real * (a * factor).to(dtype)
        return real, self.weight_imag * (b * factor).to(dtype)

    def extra_repr(self) -> str:
        """Size and eps."""
        return f"{self.size}, eps={self.eps}"


class ComplexReLUSquared(nn.Module):
    """Zero where both parts are negative; then the square of each part for itself."""

    def forward(self, x_real: Tensor, x_imag: Tensor) -> Pair:
        """Two tensors of one shape -> two non-negative tensors of it."""
        off = (x_real < 0) & (x_imag < 0)
        return x_real.masked_fill(off, 0).square(), x_imag.masked_fill(off, 0).square()


class ComplexRotaryEmbedding(nn.Module):
    """Turn element ``j`` at position ``m`` by the angle ``m * base^(-j / head_dim)``.

    One frequency for each complex element. Re<R_m q, R_n k> depends on ``m - n`` only.

    Args:
        head_dim: size of the last axis.
        base: of the frequencies, ``> 0``.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, head_dim: int, *, base: float = 10000.0) -> None:
        super().__init__()
        check_integer("ComplexRotaryEmbedding", "head_dim", head_dim, 1)
        check_positive("ComplexRotaryEmbedding", "base", base)
        self.head_dim = head_dim
        self.base = base

    def forward(self, x_real: Tensor, x_imag: Tensor, positions: Tensor) -> Pair:
        """Rotate.

        Args:
            x_real: ``(..., T, head_dim)`` float.
            x_imag: the same.
            positions: ``(T,)`` integers.

        Returns:
            The rotated pair, dtype of ``x_real``.
        """
        # not a buffer: a change of the module's dtype would round the frequencies
        share = torch.arange(self.head_dim, device=x_real.device) / self.head_dim
        angle = positions.to(x_real.device, torch.float32)[:, None] * self.base**-share
        cos, sin = angle.cos().to(x_real.dtype), angle.sin().to(x_real.dtype)
        return x_real * cos - x_imag * sin, x_real * sin + x_imag * cos

    def extra_repr(self) -> str:
        """Size and base."""
        return f"{self.head_dim}, base={self.base:g}"
