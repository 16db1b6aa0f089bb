"""The product of complex numbers kept as pairs of real tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["complex_product"]


def complex_product(
    x_real: Tensor, x_imag: Tensor, w_real: Tensor, w_imag: Tensor
) -> tuple[Tensor, Tensor]:
    """``conj(x) W^T`` in real arithmetic, as one matrix product.

    Args:
        x_real: ``(..., in_features)`` float.
        x_imag: ``(..., in_features)`` float.
        w_real: ``(out_features, in_features)`` float.
        w_imag: ``(out_features, in_features)`` float.

    Returns:
        ``(y_real, y_imag)``, each ``(..., out_features)``.
    """
    both = torch.cat([x_real, x_imag], -1)
    upper = torch.cat([w_real, w_imag], 1)
    product = F.linear(both, torch.cat([upper, torch.cat([w_imag, -w_real], 1)]))
    real, imag = product.chunk(2, -1)
    return real, imag
