"""NormBall: the perturbations an attack may use, one size for each input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrobust._checks import check_choice

__all__ = ["NormBall"]

_TINY = 1e-30


@dataclass(frozen=True)
class NormBall:
    """Perturbations of at most ``eps`` in a norm, cut to valid inputs.

    Args:
        eps: radius ``>= 0`` in the units of the input, one number or ``(N,)``, one per input.
        norm: ``"linf"`` or ``"l2"``.
        clamp: range of valid inputs; None for any.

    Raises:
        ValueError: an unknown norm, a radius below 0 or not finite, or an empty range.
    """

    eps: float | Tensor
    norm: str = "linf"
    clamp: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_choice("NormBall", "norm", self.norm, ("linf", "l2"))
        eps = torch.as_tensor(self.eps)
        if eps.ndim > 1 or not bool((torch.isfinite(eps) & (eps >= 0)).all()):
            raise ValueError(
                f"NormBall: eps must be a finite number >= 0 or one per input; got {self.eps}."
            )
        if self.clamp is not None and not self.clamp[0] < self.clamp[1]:
            raise ValueError(f"NormBall: clamp must be (low, high), low < high; got {self.clamp}.")

    def column(self, x: Tensor, value: float | Tensor | None = None) -> Tensor:
        """``value`` (default: the radius) per input, shaped to multiply ``(N, ...)`` tensors."""
        value = self.eps if value is None else value
        each = torch.as_tensor(value, dtype=x.dtype, device=x.device)
        if each.ndim == 1 and len(each) != len(x):
            raise ValueError(
                f"NormBall: a radius or step per input must have shape ({len(x)},); "
                f"got {tuple(each.shape)}."
            )
        return each.expand(len(x)).reshape(-1, *[1] * (x.ndim - 1))

    def random(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Uniform points of the balls around ``(N, ...)`` inputs, cut to valid ones.

        The draw is made on the CPU, so that every device starts from the same points.
        """
        if self.norm == "linf":
            delta = 2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1
        else:
            flat = torch.randn(len(x), x[:1].numel(), generator=generator, dtype=x.dtype)
            share = torch.rand(len(x), 1, generator=generator, dtype=x.dtype)
            length = share ** (1 / max(flat.shape[1], 1))
            delta = (length * flat / flat.norm(dim=1, keepdim=True).clamp_min(_TINY)).view_as(x)
        return self.project(x + self.column(x) * delta.to(x.device), x)

    def ascend(self, gradient: Tensor) -> Tensor:
        """The direction of length 1 that a linear function of this gradient rises fastest in."""
        if self.norm == "linf":
            return gradient.sign()
        flat = gradient.flatten(1)
        # Scaled by the largest entry first: squares of gradients near 1e-30 vanish in float32.
        largest = flat.abs().amax(1, keepdim=True).clamp_min(_TINY)
        flat = flat / largest
        unit: Tensor = flat / flat.norm(dim=1, keepdim=True).clamp_min(_TINY)
        return unit.view_as(gradient)

    def project(self, points: Tensor, x: Tensor) -> Tensor:
        """The nearest valid points within ``eps`` of ``x`` (which is valid itself)."""
        delta, eps = points - x, self.column(x)
        if self.norm == "linf":
            delta = torch.maximum(torch.minimum(delta, eps), -eps)
        else:
            length = delta.flatten(1).norm(dim=1).reshape(eps.shape)
            delta = delta * (eps / length.clamp_min(_TINY)).clamp(max=1.0)
        moved: Tensor = x + delta
        return moved if self.clamp is None else moved.clamp(*self.clamp)
