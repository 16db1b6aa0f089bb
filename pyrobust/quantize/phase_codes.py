"""Weights in the four roots of unity: 2-bit phase codes and what they stand for.

A complex weight becomes the nearest of 1, i, -1, -i times a scale. Every such weight has a zero
real or imaginary part, so a complex product needs additions, swaps and negations only.

Source: Wang et al., "iFairy: the First 2-bit Complex LLM with All Parameters in {±1, ±i}", 2025,
arXiv 2508.05571 (weight quantizer). Departure: a phase is found by comparing the two parts with
their signs, which is exact where an arctangent rounds; a tensor without any weight on one of the
axes gets the smallest scale there instead of NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pyrobust._checks import check_finite, check_float_tensor, check_shape
from pyrobust.ops.formats import row_bytes
from pyrobust.ops.matmul import pack_codes, unpack_codes

__all__ = [
    "PhaseCodes",
    "PhaseTensor",
    "check_parts",
    "dequantize",
    "nearest_phases",
    "pack_codes_2bit",
    "phase_quantize",
    "phase_values",
    "unpack_codes_2bit",
]

_SMALLEST_SCALE = 1e-5


class PhaseCodes(NamedTuple):
    """A complex weight as phases and two scales.

    Attributes:
        codes: uint8 of the weight's shape: 0, 1, 2, 3 for +1, +i, -1, -i.
        scale_real: float32 scalar, the magnitude of weights on the real axis.
        scale_imag: float32 scalar, the magnitude of weights on the imaginary axis.
    """

    codes: Tensor
    scale_real: Tensor
    scale_imag: Tensor


@dataclass(frozen=True)
class PhaseTensor:
    """A complex ``(rows, cols)`` weight in two bits an element: what a packed layer stores.

    Attributes:
        codes: ``(rows, ceil(cols / 4))`` uint8, packed phases.
        scale: ``(2,)`` float32: magnitudes on the real and on the imaginary axis.
        shape: ``(rows, cols)``.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes disagree, or a scale is not finite and positive.
    """

    codes: Tensor
    scale: Tensor
    shape: tuple[int, int]
    bits: ClassVar[int] = 2

    def __post_init__(self) -> None:
        rows, cols = self.shape
        for name, wanted in (("codes", torch.uint8), ("scale", torch.float32)):
            seen = getattr(self, name).dtype
            if seen != wanted:
                raise TypeError(f"PhaseTensor: {name} must have dtype {wanted}; got {seen}.")
        check_shape("PhaseTensor", "codes", self.codes, (rows, row_bytes(cols, 2)))
        check_shape("PhaseTensor", "scale", self.scale, (2,))
        if not self.scale.is_meta and not bool((self.scale.isfinite() & (self.scale > 0)).all()):
            raise ValueError(
                f"PhaseTensor: scale must be finite and positive; got {self.scale.tolist()}."
            )

    @classmethod
    def of(cls, w_real: Tensor, w_imag: Tensor) -> PhaseTensor:
        """:func:`phase_quantize` of a ``(rows, cols)`` weight, packed; on the device of it."""
        check_shape("PhaseTensor.of", "w_real", w_real, (None, None))
        phases = phase_quantize(w_real, w_imag)
        packed = pack_codes_2bit(phases.codes.cpu()).to(w_real.device)
        scale = torch.stack([phases.scale_real, phases.scale_imag])
        return cls(packed, scale, (w_real.shape[0], w_real.shape[1]))

    def unpack(self) -> PhaseCodes:
        """The codes one to an element, and the scales."""
        codes = unpack_codes_2bit(self.codes.cpu(), self.shape[1]).to(self.codes.device)
        return PhaseCodes(codes, self.scale[0], self.scale[1])

    def dequantize(self) -> Tensor:
        """The weight, ``(rows, cols)`` complex64, exactly."""
        return torch.complex(*phase_values(self.unpack()))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.numel() + self.scale.numel() * self.scale.element_size()


def phase_quantize(w_real: Tensor, w_imag: Tensor) -> PhaseCodes:
    """Round a complex weight to the four roots of unity.

    Code ``k`` is the phase interval ``[k pi/2 - pi/4, k pi/2 + pi/4)``; 0 + 0i has code 0. A scale
    is the mean magnitude of the parts that it stands for, at least 1e-5.

    Args:
        w_real: floating point, any shape, finite.
        w_imag: the same shape and dtype.

    Returns:
        The codes and scales, on the device of the weight.

    Raises:
        TypeError: a part is complex or not floating point, or the dtypes differ.
        ValueError: the shapes differ, or a part holds NaN or infinite values.

    Example:
        >>> parts = torch.tensor([2.0, 0.1, -1.0, 0.0]), torch.tensor([0.5, 1.0, 0.2, -3.0])
        >>> phase_quantize(*parts)[0]
        tensor([0, 1, 2, 3], dtype=torch.uint8)
    """
    check_parts("phase_quantize", "w_real", "w_imag", w_real, w_imag)
    check_finite("phase_quantize", "w_real", w_real)
    check_finite("phase_quantize", "w_imag", w_imag)
    return nearest_phases(w_real.detach(), w_imag.detach())


def nearest_phases(w_real: Tensor, w_imag: Tensor) -> PhaseCodes:
    """:func:`phase_quantize` without its checks, for training."""
    re, im = w_real.float(), w_imag.float()
    up = (-im < re) & (re <= im)
    left = (re < im) & (im <= -re)
    down = (im <= re) & (re < -im)
    codes = (up * 1 + left * 2 + down * 3).to(torch.uint8)
    on_imag = up | down
    return PhaseCodes(codes, _mean(re.abs(), ~on_imag), _mean(im.abs(), on_imag))


def dequantize(phases: PhaseCodes) -> tuple[Tensor, Tensor]:
    """The real and imaginary parts that phase codes stand for, float32 of the codes' shape.

    Raises:
        ValueError: a code is above 3.
    """
    if phases.codes.numel() and int(phases.codes.max()) > 3:
        raise ValueError(f"dequantize: codes must be 0 to 3; got {int(phases.codes.max())}.")
    return phase_values(phases)


def phase_values(phases: PhaseCodes) -> tuple[Tensor, Tensor]:
    """:func:`dequantize` without its check."""
    codes = phases.codes
    sign = 1.0 - (codes & 2).float()
    imaginary = (codes & 1).bool()
    real = torch.where(imaginary, 0.0, sign * phases.scale_real)
    return real, torch.where(imaginary, sign * phases.scale_imag, 0.0)


def pack_codes_2bit(codes: Tensor) -> Tensor:
    """Pack four codes a byte, the first in the lowest bits; every row from a byte border.

    Args:
        codes: ``(rows, columns)`` uint8, 0 to 3.

    Returns:
        ``(rows, ceil(columns / 4))`` uint8.

    Raises:
        TypeError: ``codes`` is not uint8.
        ValueError: it is not two-dimensional, or a code is above 3.

    Example:
        >>> pack_codes_2bit(torch.tensor([[3, 0, 1, 2, 1]], dtype=torch.uint8))
        tensor([[147,   1]], dtype=torch.uint8)
    """
    return pack_codes(codes, bits=2)


def unpack_codes_2bit(packed: Tensor, columns: int) -> Tensor:
    """Undo :func:`pack_codes_2bit`: ``(rows, columns)`` uint8.

    Raises:
        TypeError: ``packed`` is not uint8.
        ValueError: the number of bytes in a row disagrees with ``columns``.
    """
    return unpack_codes(packed, in_features=columns, bits=2)


def check_parts(subject: str, first: str, second: str, real: Tensor, imag: Tensor) -> None:
    """Raise unless ``real`` and ``imag`` are the two float tensors of one complex quantity."""
    for name, part in ((first, real), (second, imag)):
        if isinstance(part, Tensor) and part.is_complex():
            raise TypeError(
                f"{subject}: {name} must be one real part of a complex tensor; got {part.dtype} "
                "(pass x.real and x.imag)."
            )
        check_float_tensor(subject, name, part)
    if real.dtype != imag.dtype:
        raise TypeError(
            f"{subject}: {first} and {second} must have one dtype; got {real.dtype} and "
            f"{imag.dtype}."
        )
    if real.shape != imag.shape:
        raise ValueError(
            f"{subject}: {first} and {second} must have one shape; got {tuple(real.shape)} and "
            f"{tuple(imag.shape)}."
        )


def _mean(magnitude: Tensor, chosen: Tensor) -> Tensor:
    total = torch.where(chosen, magnitude, 0.0).sum()
    return (total / chosen.sum().clamp(min=1)).clamp(min=_SMALLEST_SCALE)
