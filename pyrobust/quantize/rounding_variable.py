"""RoundingVariable: which way each weight is rounded, as a number that an optimizer can move.

The steps of a weight are ``floor + h``. With one degree of freedom ``h`` lies in [0, 1] and ends as
0 or 1; with two, in [-1, 2], ending as -1, 0, 1 or 2. Three ways to hold ``h``:

* ``"sigmoid"``: a stretched and clipped sigmoid (rectified sigmoid);
* ``"ste"``: ``h`` itself, rounded in the forward pass with a straight-through gradient;
* ``"soft"``: the mean of the integers under a softmax.

Source: Nagel et al., "Up or down? Adaptive rounding for post-training quantization", ICML 2020,
arXiv 2004.10568, equations 21 to 24; the other ways as audited by Yvinec, Dapogny, Bailly,
"Gradient-based post-training quantization", arXiv 2308.07662.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrobust.quantize.straight_through import straight_through

__all__ = ["VARIABLES", "RoundingVariable"]

VARIABLES = ("sigmoid", "ste", "soft")
_STRETCH = {1: (1.2, -0.1), 2: (4.0, -1.5)}  # h = clip(a * sigmoid + b)
_RANGE = {1: (0, 1), 2: (-1, 2)}
_EDGE = 1e-6  # keeps logarithms finite
_OUTER = 0.1  # weight of the outer integers where a softmax starts


class RoundingVariable:
    """The offsets ``h`` of one weight.

    Args:
        steps: ``(rows, cols)`` real steps of the float weight.
        kind: ``"sigmoid"``, ``"ste"`` or ``"soft"``.
        freedom: 1 or 2.
        chosen: boolean, where to learn; elsewhere the nearest step is kept. None means everywhere.

    Attributes:
        parameter: what an optimizer moves.
        floor: ``(rows, cols)``, the integers below the steps.
    """

    def __init__(
        self, steps: Tensor, kind: str = "sigmoid", freedom: int = 1, chosen: Tensor | None = None
    ) -> None:
        self.kind, self.freedom, self.chosen = kind, freedom, chosen
        self.floor = torch.floor(steps)
        fraction = steps - self.floor
        self._kept = torch.round(fraction)
        self._integers = torch.arange(
            _RANGE[freedom][0], _RANGE[freedom][1] + 1, dtype=steps.dtype, device=steps.device
        )
        self.parameter = self._start(fraction).requires_grad_()

    def _start(self, fraction: Tensor) -> Tensor:
        """The value at which ``h`` is the fraction."""
        if self.kind == "ste":
            return fraction.clone()
        if self.kind == "sigmoid":
            factor, shift = _STRETCH[self.freedom]
            return torch.logit((fraction - shift) / factor)
        inner = fraction.clamp(_EDGE, 1 - _EDGE)
        if self.freedom == 1:
            return torch.stack([(1 - inner).log(), inner.log()])
        outer = _OUTER * inner * (1 - inner)  # 2 of it at -1 and 1 at 2 leave the mean alone
        low = (1 - inner) * (1 - 3 * _OUTER * inner)
        return torch.stack([(2 * outer).log(), low.log(), inner.log(), outer.log()])

    def offsets(self) -> Tensor:
        """``h``, differentiable; a step of 0 or 1 where nothing is learned."""
        low, high = _RANGE[self.freedom]
        if self.kind == "ste":
            inside = self.parameter.clamp(low, high)
            h = straight_through(torch.round(inside), inside)
        elif self.kind == "sigmoid":
            factor, shift = _STRETCH[self.freedom]
            h = (factor * torch.sigmoid(self.parameter) + shift).clamp(low, high)
        else:
            h = torch.einsum("i,i...->...", self._integers, self.parameter.softmax(0))
        return h if self.chosen is None else torch.where(self.chosen, h, self._kept)

    def hard(self) -> Tensor:
        """The integers that the offsets end as."""
        with torch.no_grad():
            h = self.offsets()
            if self.kind == "soft":
                likeliest = self._integers[self.parameter.argmax(0)]
                h = likeliest if self.chosen is None else torch.where(self.chosen, likeliest, h)
            return torch.floor(h + 0.5)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest integer steps that it may end at."""
        low, high = _RANGE[self.freedom]
        lowest, highest = self.floor + low, self.floor + high
        if self.chosen is None:
            return lowest, highest
        kept = self.floor + self._kept
        return torch.where(self.chosen, lowest, kept), torch.where(self.chosen, highest, kept)

    def penalty(self, beta: float) -> Tensor:
        """``sum (1 - |2 f - 1|^beta)`` over the fractions ``f`` of ``h``: zero at integers.

        For a softmax, ``f`` is its largest probability (at least 1/2), which with one degree of
        freedom is the same.
        """
        if self.kind == "ste":
            return self.parameter.new_zeros(())
        if self.kind == "soft":
            largest = self.parameter.softmax(0).amax(0).clamp(min=0.5)
            return (1 - (2 * largest - 1).pow(beta)).sum()
        h = self.offsets()
        with torch.no_grad():  # the integer below; h itself at the upper end
            below = torch.floor(h).clamp(max=_RANGE[self.freedom][1] - 1)
        return (1 - (2 * (h - below) - 1).abs().pow(beta)).sum()
