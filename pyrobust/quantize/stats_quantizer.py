"""StatsQ: weights on symmetric half-integer levels, with a scale from statistics, not learned.

The scale of an output channel is twice the mean magnitude of its weights. A learned scale moves the
levels while weights settle on them, and both chase each other; this one follows the weights alone.
There is no level at zero: at ``b`` bits the levels are the ``2^b`` odd multiples of a half step.

Source: Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023,
arXiv 2302.02210; section 4.1 and the authors' code (MIT).
Departures: codes are clamped to their range, which the published rounding leaves at 1 bit (a level
of -1.5); a row of zeros gives zeros, with a warning, instead of NaN. With ``storable`` the scale is
rounded to 15 significant bits, as packed weights store it.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from pyrobust._checks import check_finite, check_float_tensor, check_integer, check_shape
from pyrobust.quantize.half_integer import HalfStepTensor, half_integer_qtensor
from pyrobust.quantize.qtensor import QTensor, round_scale
from pyrobust.quantize.straight_through import straight_through

__all__ = ["StatsQuantizer", "check_weight_bits"]

_TOP = 1.0 - 1e-6  # the upper end of the clip: keeps the largest weight inside the last bin


def check_weight_bits(subject: str, name: str, bits: int) -> None:
    """Raise unless ``bits`` is an integer from 1 to 8."""
    check_integer(subject, name, bits, 1)
    if bits > 8:
        raise ValueError(f"{subject}: {name} must be at most 8; got {bits}.")


class StatsQuantizer(nn.Module):
    """Simulated StatsQ rounding: ``Q = s * (k + 1/2) / n`` with ``n = 2^(bits - 1)``.

    ``s = 2 * mean |W|`` over everything but axis ``dim``, ``k = round(clip(W / s, -1, 1) * n -
    1/2)`` in ``{-n, ..., n - 1}``. The gradient of ``Q`` is that of ``W`` everywhere, beyond the
    clip too; none goes through ``s``. It holds no parameters.

    Args:
        bits: 1 to 8.
        dim: the axis whose entries have a scale of their own: 0 for ``(out, in)`` and convolution
            weights, 1 for ``(heads, out, in)`` weights, which then share it over the heads.

    Raises:
        TypeError: ``bits`` or ``dim`` is not an integer, or a weight is not floating point.
        ValueError: ``bits`` lies outside 1 to 8, or ``dim`` outside the axes of a weight.

    Example:
        >>> StatsQuantizer(2)(torch.tensor([[-1.0, 0.1, 0.4, 0.5]]))
        tensor([[-0.7500,  0.2500,  0.2500,  0.2500]])
    """

    def __init__(self, bits: int, dim: int = 0) -> None:
        super().__init__()
        check_weight_bits("StatsQuantizer", "bits", bits)
        check_integer("StatsQuantizer", "dim", dim, 0)
        self.bits = bits
        self.dim = dim

    @property
    def half_levels(self) -> int:
        """``n``: half the number of levels."""
        return int(2 ** (self.bits - 1))

    def forward(
        self, weight: Tensor, *, storable: bool = False, boundary: float | None = None
    ) -> Tensor:
        """The rounded weight, same shape; float32 where ``weight`` has a lower precision.

        Args:
            weight: floating point, of any shape.
            storable: round the scales as packed weights store them, so that packing is exact.
            boundary: let the gradient pass only where :meth:`near_boundary` holds.
        """
        scale = self.scale(weight, storable=storable)
        steps = torch.round(self.position(weight, scale))
        n = self.half_levels
        value = scale * ((steps.clamp(-n, n - 1) + 0.5) / n)
        mask = None if boundary is None else self.near_boundary(weight, boundary, scale=scale)
        return straight_through(value, weight, mask=mask)

    def scale(self, weight: Tensor, *, storable: bool = False) -> Tensor:
        """``2 * mean |W|`` per entry of ``dim``, kept as an axis of size 1 elsewhere; detached."""
        check_float_tensor("StatsQuantizer", "weight", weight)
        if self.dim >= weight.ndim:
            raise ValueError(
                f"StatsQuantizer: dim must be below the {weight.ndim} axes of the weight; got "
                f"{self.dim}."
            )
        others = [axis for axis in range(weight.ndim) if axis != self.dim]
        magnitude = _wide(weight).abs()
        scale = 2 * (magnitude.mean(others, keepdim=True) if others else magnitude)
        if not torch.compiler.is_compiling() and bool((scale == 0).any()):
            warnings.warn(
                f"StatsQuantizer: {int((scale == 0).sum())} of {scale.numel()} scales are zero "
                "(all their weights are); the levels there are zero.",
                stacklevel=2,
            )
        if not storable:
            return scale
        return round_scale(scale.float()).to(scale.dtype)

    def position(self, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        """``u``, the weight in steps: the code is ``round(u)``, boundaries are half-integers."""
        scale = self.scale(weight) if scale is None else scale
        relative = _wide(weight) / torch.where(scale > 0, scale, 1)
        return relative.clamp(-1.0, _TOP) * self.half_levels - 0.5

    def codes(self, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        """``k + n`` in ``[0, 2^bits)`` as uint8, one to an element."""
        n = self.half_levels
        steps = torch.round(self.position(weight, scale)).clamp(-n, n - 1)
        return (steps + n).to(torch.uint8)

    def near_boundary(
        self, weight: Tensor, boundary: float, *, scale: Tensor | None = None
    ) -> Tensor:
        """True where ``u`` lies within ``boundary`` steps of a border between two levels."""
        u = self.position(weight, scale)
        n = self.half_levels
        lower = torch.round(u - 0.5).clamp(-n, n - 2)
        return (u - lower - 0.5).abs() <= boundary

    def qtensor(self, weight: Tensor) -> QTensor:
        """What ``forward(weight, storable=True)`` returns, as packed codes, exactly.

        Args:
            weight: ``(rows, cols)``, finite, for ``dim = 0``; or the torch weight of a
                convolution, whose later axes are the columns.

        Raises:
            ValueError: ``dim`` is not 0, the weight is not finite, or ``bits`` is 8, for which
                there is :meth:`stored`.
        """
        matrix, scale = self._packable(weight)
        return half_integer_qtensor(self.codes(matrix, scale), scale.float(), bits=self.bits)

    def stored(self, weight: Tensor) -> QTensor | HalfStepTensor:
        """As :meth:`qtensor`, at 8 bits too."""
        if self.bits < 8:
            return self.qtensor(weight)
        matrix, scale = self._packable(weight)
        extra = weight[0, 0].numel()  # of a convolution, the size of its kernel
        return HalfStepTensor.from_codes(self.codes(matrix, scale), scale.float(), extra=extra)

    def _packable(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight as rows and columns, and its scales."""
        if self.dim != 0:
            raise ValueError(f"StatsQuantizer: dim must be 0 to pack a weight; got {self.dim}.")
        check_finite("StatsQuantizer", "weight", weight)
        matrix = weight.detach().flatten(1)
        check_shape("StatsQuantizer", "weight", matrix, (None, None))
        return matrix, self.scale(matrix, storable=True)

    def extra_repr(self) -> str:
        """Bits and axis."""
        return f"bits={self.bits}, dim={self.dim}"


def _wide(weight: Tensor) -> Tensor:
    """Detached, in float32 or float64."""
    weight = weight.detach()
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
