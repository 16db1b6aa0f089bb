"""LSQ: rounding with a learned step size, for activations and as a baseline for weights.

Source: Esser et al., "Learned step size quantization", ICLR 2020, arXiv 1902.08153, with the
initialisation, gradient scale and floor of the code of Liu, Liu, Cheng, "Oscillation-free
Quantization for Low-bit Vision Transformers", ICML 2023, arXiv 2302.02210 (MIT); from the same
code the learnable shifts around an activation quantizer.
Departures: at 1 bit signed the levels are ``-s`` and ``s`` with the clipped straight-through
gradient (the code rounds by ``sign``, which stops the gradient). Scales of images are per channel
and so are the shifts of images, which the code has per pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from typing_extensions import Self

from pyrobust._checks import check_float_tensor, check_integer, check_positive
from pyrobust.quantize.qtensor import QTensor, round_scale
from pyrobust.quantize.stats_quantizer import check_weight_bits
from pyrobust.quantize.straight_through import straight_through

__all__ = ["ActivationQuantizer", "LSQQuantizer"]

_FLOOR = 1e-5


class LSQQuantizer(nn.Module):
    """``s * round(clip(x / s, qmin, qmax))`` with a learned scale ``s``.

    Codes are ``[-2^(bits-1), 2^(bits-1) - 1]`` signed, ``[0, 2^bits - 1]`` unsigned. The first
    batch sets ``s`` (never held below float32, since another rounding of it would be another
    network); until then, with scales of an axis of unknown length, ``scale`` is an
    uninitialized parameter, so run one batch before making an optimizer. The gradient of ``s``
    (``q - x / s`` inside the range, the end of the range outside) is multiplied by ``1 /
    sqrt(qmax * elements per scale)``. Arithmetic is in float32 or wider; the result has the dtype
    of ``x``.

    Args:
        bits: 1 to 8.
        signed: codes of both signs.
        per_channel: the axis with a scale for each entry, as in indexing (-2 are the tokens of
            ``(B, N, C)`` and the rows of a weight); True means -2; None or False, one scale.
        init: ``"stats"``, ``2 * mean |x| / sqrt(qmax)`` of the first batch (4 in place of 2 where
            unsigned), or a positive number.
        size: number of scales, where it is known before the first batch.

    Raises:
        TypeError: ``bits`` is not an integer, or ``x`` is not floating point.
        ValueError: an argument is out of range, or an input has another number of channels.
    """

    scale: nn.Parameter
    initialized: Tensor

    def __init__(
        self,
        bits: int,
        signed: bool = True,
        per_channel: int | bool | None = None,
        init: str | float = "stats",
        *,
        size: int | None = None,
    ) -> None:
        super().__init__()
        subject = type(self).__name__
        check_weight_bits(subject, "bits", bits)
        if init != "stats":
            if isinstance(init, str):
                raise ValueError(f"{subject}: init must be 'stats' or a number; got {init!r}.")
            check_positive(subject, "init", init)
        if size is not None:
            check_integer(subject, "size", size, 1)
        self.bits, self.signed, self.init = bits, bool(signed), init
        self.axis = -2 if per_channel is True else None if per_channel is False else per_channel
        known = 1 if self.axis is None else size
        start: Any = UninitializedParameter() if known is None else nn.Parameter(torch.ones(known))
        self.register_parameter("scale", start)
        self.register_buffer("initialized", torch.tensor(False))
        self._ready = False

    @property
    def is_set(self) -> bool:
        """Whether the scale was set, by a first batch or a file."""
        return self._ready

    @property
    def code_range(self) -> tuple[int, int]:
        """``(qmin, qmax)``."""
        if not self.signed:
            return 0, 2**self.bits - 1
        return (-1, 1) if self.bits == 1 else (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

    def forward(self, x: Tensor, *, storable: bool = False) -> Tensor:
        """The rounded ``x``, of its shape and dtype (float32 for a weight of lower precision).

        Args:
            x: floating point.
            storable: treat ``x`` as a weight that will be packed: round the scales as packed
                weights store them, and keep the result at least in float32.
        """
        wide = self._wide(x)
        if not self._ready:
            self._start(wide)
        scale = self._used_scale(wide, storable)
        codes = self._rounded(wide / scale)
        result = codes * scale
        return result if storable else result.to(x.dtype)

    def codes(self, x: Tensor, *, storable: bool = False) -> Tensor:
        """The integers ``q`` in :attr:`code_range`, in floating point, detached."""
        with torch.no_grad():
            wide = self._wide(x)
            if not self._ready:
                self._start(wide)
            return self._rounded(wide / self._used_scale(wide, storable))

    def _wide(self, x: Tensor) -> Tensor:
        check_float_tensor(type(self).__name__, "x", x)
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

    def _used_scale(self, x: Tensor, storable: bool) -> Tensor:
        """The scale as it multiplies: floored, its gradient scaled, in the shape of ``x``."""
        scale = self.scale.to(x.dtype)
        self._check_channels(x, scale.numel())
        floored = straight_through(scale.clamp(min=_FLOOR), scale)
        per_scale = x.numel() / max(1, scale.numel())
        factor = 1 / math.sqrt(self.code_range[1] * per_scale) if per_scale else 0.0
        scaled = floored * factor
        used = straight_through(floored, scaled)
        if storable:
            used = straight_through(round_scale(used.detach().float()).to(x.dtype), used)
        if self.axis is None:
            return used
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return used.reshape(shape)

    def _rounded(self, steps: Tensor) -> Tensor:
        low, high = self.code_range
        inside = steps.clamp(low, high)
        if self.signed and self.bits == 1:
            return straight_through(torch.where(inside < 0, -1.0, 1.0).to(inside.dtype), inside)
        return straight_through(torch.round(inside), inside)

    def _check_channels(self, x: Tensor, count: int) -> None:
        if self.axis is None:
            return
        if not -x.ndim <= self.axis < x.ndim or x.shape[self.axis] != count:
            raise ValueError(
                f"LSQQuantizer: x must have {count} entries along axis {self.axis}, one for each "
                f"scale; got shape {tuple(x.shape)}."
            )

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        """Set the scale from the first batch."""
        if x.numel() == 0:
            raise ValueError("LSQQuantizer: the first batch must not be empty.")
        x = x.detach()
        if self.axis is None:
            mean = x.abs().mean().reshape(1)
        else:
            if not -x.ndim <= self.axis < x.ndim:
                raise ValueError(
                    f"LSQQuantizer: x must have an axis {self.axis}; got shape {tuple(x.shape)}."
                )
            mean = x.abs().movedim(self.axis, 0).flatten(1).mean(1)
        high = self.code_range[1]
        start = mean * ((2 if self.signed else 4) / math.sqrt(high))
        if not isinstance(self.init, str):
            start = torch.full_like(mean, self.init)
        if isinstance(self.scale, UninitializedParameter):
            self.scale.materialize(start.shape, device=x.device, dtype=x.dtype)
        self._check_channels(x, self.scale.numel())
        self.scale.copy_(start.clamp(min=_FLOOR))
        self.initialized.fill_(True)
        self._ready = True

    def qtensor(self, weight: Tensor) -> QTensor:
        """What ``forward(weight, storable=True)`` returns, as packed codes, exactly.

        Args:
            weight: ``(rows, cols)``, or the torch weight of a convolution, whose later axes are
                the columns. One scale, or one per row.

        Raises:
            ValueError: the codes are unsigned, the scales are not those of the rows, or the
                quantizer has not seen the weight.
        """
        if not self.signed:
            raise ValueError("LSQQuantizer: signed must be True to pack a weight; got False.")
        rows = self.axis is None or self.axis % weight.ndim == 0
        if not rows or not self._ready:
            reason = f"axis {self.axis}" if not rows else "no scale yet"
            raise ValueError(f"LSQQuantizer: scales must be those of the rows; got {reason}.")
        steps = self.codes(weight, storable=True).flatten(1)
        scale = self._used_scale(self._wide(weight), True).detach().float().reshape(-1, 1)
        scale = scale.expand(steps.shape[0], 1).contiguous()
        if self.bits == 1:
            codes, bits = (steps + 1) / 2, 1
        else:  # 5, 6 and 7 bits are stored in 8
            bits = self.bits if self.bits <= 4 else 8
            codes = steps + 2 ** (bits - 1)
        columns = max(1, steps.shape[1])
        return QTensor.from_codes(codes.to(torch.uint8), scale, bits=bits, group_size=columns)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        found = state_dict.get(f"{prefix}scale")
        if isinstance(self.scale, UninitializedParameter) and isinstance(found, Tensor):
            self.scale.materialize(found.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._ready = bool(self.initialized)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(_keeping_precision(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Bits, signs and axis."""
        return f"bits={self.bits}, signed={self.signed}, per_channel={self.axis}"


class ActivationQuantizer(nn.Module):
    """LSQ between two learned shifts: ``LSQ(x + before) + after``, both starting at 0.

    Args:
        bits: 1 to 8.
        channels: entries of the axis that the shifts belong to.
        signed: as for :class:`LSQQuantizer`.
        per_channel: as for :class:`LSQQuantizer`.
        axis: of the channels: -1 for ``(..., C)``, -3 for images ``(B, C, H, W)``.
        size: as for :class:`LSQQuantizer`.
        heads: parts of the last axis that count as tokens of their own while rounding, so that
            scales per token are scales per token and head.
    """

    def __init__(
        self,
        bits: int,
        channels: int,
        *,
        signed: bool = True,
        per_channel: int | bool | None = None,
        axis: int = -1,
        size: int | None = None,
        heads: int = 1,
    ) -> None:
        super().__init__()
        check_integer("ActivationQuantizer", "channels", channels, 1)
        check_integer("ActivationQuantizer", "heads", heads, 1)
        self.axis, self.heads = axis, heads
        self.before = nn.Parameter(torch.zeros(channels))
        self.after = nn.Parameter(torch.zeros(channels))
        self.quantizer = LSQQuantizer(bits, signed, per_channel, size=size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(_keeping_precision(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The rounded ``x``, of its shape and dtype."""
        shape = [1] * x.ndim
        shape[self.axis] = -1
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        before, after = (shift.to(wide.dtype).reshape(shape) for shift in (self.before, self.after))
        shifted = wide + before
        if self.heads > 1:  # (..., N, heads * C) as (..., N * heads, C)
            apart = shifted.unflatten(-1, (self.heads, -1)).flatten(-3, -2)
            rounded = self.quantizer(apart).reshape(shifted.shape)
        else:
            rounded = self.quantizer(shifted)
        result: Tensor = rounded + after
        return result.to(x.dtype)


def _keeping_precision(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` of a change of device or dtype, without going below float32."""

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        low = result.dtype in (torch.float16, torch.bfloat16)
        return tensor.to(result.device) if low else result

    return moved
