"""The product of the packed complex layer while its weights train: the same bits, with a gradient.

Codes of activations and signs of weights are small integers, so a float32 matrix product of them
is exact (up to 132,104 columns) in whatever order it sums. Scales and steps then enter in float64,
in the order of the kernel (``csrc/matmul/complex_block.h``). So a simulated layer returns what the
packed one does on the CPU to the last bit, and no activation further on can fall on the other side
of a rounding border.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyrobust.quantize.activations import quantize_activation
from pyrobust.quantize.phase_codes import PhaseCodes, nearest_phases, phase_values

__all__ = ["phase_product"]

_EXACT = (2**24 - 1) // 127  # columns whose sums of codes are exact in float32


def phase_product(
    x_real: Tensor, x_imag: Tensor, w_real: Tensor, w_imag: Tensor
) -> tuple[Tensor, Tensor]:
    """``conj(x) W^T`` with ``x`` rounded to 8 bits a row and ``W`` to phases.

    Straight-through: the gradients of inputs and latents are those of the rounded ones.

    Args:
        x_real: ``(..., in_features)`` float32.
        x_imag: the same.
        w_real: ``(out_features, in_features)`` latents, floating point.
        w_imag: the same.

    Returns:
        ``(y_real, y_imag)``, each ``(..., out_features)`` float32.
    """
    real, imag = _PhaseProduct.apply(x_real, x_imag, w_real, w_imag)  # type: ignore[no-untyped-call]
    return real, imag


class _PhaseProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_real: Tensor, x_imag: Tensor, w_real: Tensor, w_imag: Tensor
    ) -> tuple[Tensor, Tensor]:
        phases = nearest_phases(w_real, w_imag)
        a, step_a = quantize_activation(x_real)
        b, step_b = quantize_activation(x_imag)
        ctx.save_for_backward(a, step_a, b, step_b, *phases)
        ctx.dtype = w_real.dtype
        sums = _sums(a, b, phases.codes)
        t, r = step_a.float().double(), step_b.float().double()  # the kernel is given float32 steps
        real, imag = phases.scale_real.double(), phases.scale_imag.double()
        y_real = (real * t) * sums[0] + (imag * r) * sums[1]
        y_imag = (imag * t) * sums[2] + (real * r) * sums[3]
        return y_real.float(), y_imag.float()

    @staticmethod
    def backward(ctx: Any, grad_real: Tensor, grad_imag: Tensor) -> tuple[Tensor, ...]:
        a, step_a, b, step_b, *phases = ctx.saved_tensors
        u, v = phase_values(PhaseCodes(*phases))
        x_real = _rows((a * step_a).to(grad_real.dtype))
        x_imag = _rows((b * step_b).to(grad_real.dtype))
        g, h = _rows(grad_real), _rows(grad_imag)
        grad_x = ((g @ u + h @ v).reshape(a.shape), (g @ v - h @ u).reshape(a.shape))
        grad_w = (g.t() @ x_real - h.t() @ x_imag, g.t() @ x_imag + h.t() @ x_real)
        return (*grad_x, *(grad.to(ctx.dtype) for grad in grad_w))


def _sums(a: Tensor, b: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``A_re, B_re, A_im, B_im`` of ``csrc/matmul/complex.h`` in float64, exactly."""
    wide = torch.float32 if codes.shape[1] <= _EXACT else torch.float64
    one = torch.ones((), device=codes.device)
    u, v = (part.to(wide) for part in phase_values(PhaseCodes(codes, one, one)))
    sums = F.linear(torch.stack([a, b]).to(wide), torch.cat([u, v])).double()
    (a_re, a_im), (b_im, b_re) = (each.chunk(2, -1) for each in sums)
    return a_re, b_re, a_im, -b_im


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
