"""iFairy (Fairy±i): complex linear layers with every weight in {±1, ±i}, trained that way.

Two real bits a weight without a wasted code: a complex weight is one of the four roots of unity
times one of two scales, activations are rounded to 8 bits a token. Products need only additions,
swaps and negations. :class:`ComplexLinear` simulates this while it trains float latents;
``pack()`` then gives the layer that stores two bits and multiplies integers. The complex
transformer around it is :class:`pyrobust.nn.ComplexDecoderLM`. Do not use it to shrink a network
that was not trained so: rounding to phases afterwards destroys it.

Source: Wang et al., "iFairy: the First 2-bit Complex LLM with All Parameters in {±1, ±i}", 2025,
arXiv 2508.05571, and the published training code; the product is ``conj(x) w``, as there.
Departures: activation steps follow the kernels of this library (largest magnitude / 127 in
float64, no lower clamp at 1e-5: rows of zeros are exact); phases are compared, not computed
(:mod:`pyrobust.quantize.phase_codes`).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyrobust._checks import check_choice, check_integer, check_positive, check_unit
from pyrobust.quantize.activations import fake_quantize_activation
from pyrobust.quantize.complex_product import complex_product
from pyrobust.quantize.phase_codes import (
    PhaseTensor,
    check_parts,
    nearest_phases,
    phase_values,
)
from pyrobust.quantize.phase_product import phase_product
from pyrobust.quantize.simulated_weight import SimulatedWeight

if TYPE_CHECKING:
    from pyrobust.nn.packed_complex_linear import PackedComplexLinear

__all__ = ["ComplexLinear", "PhaseQuantizeSTE", "TwoStageSchedule"]


class PhaseQuantizeSTE(torch.autograd.Function):
    """The quantized weight with straight-through gradients.

    ``PhaseQuantizeSTE.apply(w_real, w_imag)`` gives the two parts of
    ``dequantize(phase_quantize(w_real, w_imag))``, float32; the gradient of each part passes to its
    latent unchanged.
    """

    @staticmethod
    def forward(ctx: Any, w_real: Tensor, w_imag: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize; both parts float32."""
        ctx.dtype = w_real.dtype
        return phase_values(nearest_phases(w_real, w_imag))

    @staticmethod
    def backward(ctx: Any, grad_real: Tensor, grad_imag: Tensor) -> tuple[Tensor, Tensor]:
        """The identity on both parts."""
        return grad_real.to(ctx.dtype), grad_imag.to(ctx.dtype)


class ComplexLinear(nn.Module):
    """``y = conj(x) W^T`` on pairs of real tensors, with weights and activations rounded or not.

    Holds float latents ``weight_real`` and ``weight_imag``; there is no bias. With
    ``weight_bits=2`` the product sees their phases (:func:`~pyrobust.quantize.phase_quantize`),
    with ``act_bits=8`` inputs rounded a token, each part for itself. Gradients are straight
    through both.

    Args:
        in_features: size of the last axis of the inputs.
        out_features: size of the last axis of the outputs.
        weight_bits: 2, or None for float weights.
        act_bits: 8, or None for float activations.
        output: ``"complex"`` gives ``(y_real, y_imag)``, ``"real"`` gives ``y_real`` alone.
        device: of the latents.
        dtype: of the latents.

    Raises:
        ValueError: an argument is outside what is listed above.

    Example:
        >>> layer = ComplexLinear(6, 3)
        >>> y_real, y_imag = layer(torch.ones(2, 6), torch.zeros(2, 6))
        >>> y_real.shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight_bits: int | None = 2,
        act_bits: int | None = 8,
        output: str = "complex",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("ComplexLinear", "in_features", in_features, 1)
        check_integer("ComplexLinear", "out_features", out_features, 1)
        check_choice("ComplexLinear", "weight_bits", weight_bits, (2, None))
        check_choice("ComplexLinear", "act_bits", act_bits, (8, None))
        check_choice("ComplexLinear", "output", output, ("complex", "real"))
        self.in_features = in_features
        self.out_features = out_features
        self.weight_bits = weight_bits
        self.act_bits = act_bits
        self.output = output
        size = (out_features, in_features)
        self.weight_real = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.weight_imag = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform parts, each of half the variance of a real layer's weight."""
        bound = 1 / math.sqrt(2 * self.in_features)
        nn.init.uniform_(self.weight_real, -bound, bound)
        nn.init.uniform_(self.weight_imag, -bound, bound)

    def quantized_weight(self) -> tuple[Tensor, Tensor]:
        """The two parts of the weight that the product sees."""
        if self.weight_bits is None:
            return self.weight_real, self.weight_imag
        parts = PhaseQuantizeSTE.apply(self.weight_real, self.weight_imag)  # type: ignore[no-untyped-call]
        real, imag = parts
        return real, imag

    def forward(self, x_real: Tensor, x_imag: Tensor) -> Any:
        """``(..., in_features)`` twice -> ``(y_real, y_imag)`` or ``y_real``, dtype of ``x``."""
        check_parts("ComplexLinear", "x_real", "x_imag", x_real, x_imag)
        if x_real.ndim == 0 or x_real.shape[-1] != self.in_features:
            raise ValueError(
                f"ComplexLinear: x_real must have in_features = {self.in_features} values on its "
                f"last axis; got shape {tuple(x_real.shape)}."
            )
        dtype = x_real.dtype
        wide = torch.promote_types(dtype, torch.float32)  # rounded once, as the packed layer does
        x_real, x_imag = x_real.to(wide), x_imag.to(wide)
        if self.weight_bits and self.act_bits and wide == torch.float32:  # as the kernel, exactly
            real, imag = phase_product(x_real, x_imag, self.weight_real, self.weight_imag)
            return real.to(dtype) if self.output == "real" else (real.to(dtype), imag.to(dtype))
        if self.act_bits is not None:
            x_real = fake_quantize_activation(x_real, bits=self.act_bits)
            x_imag = fake_quantize_activation(x_imag, bits=self.act_bits)
        w_real, w_imag = (part.to(wide) for part in self.quantized_weight())
        if self.output == "real":
            both, weight = torch.cat([x_real, x_imag], -1), torch.cat([w_real, w_imag], 1)
            return nn.functional.linear(both, weight).to(dtype)
        real, imag = complex_product(x_real, x_imag, w_real, w_imag)
        return real.to(dtype), imag.to(dtype)

    def pack(self, *, post_training: bool = False) -> PackedComplexLinear:
        """The layer for inference: two bits a weight, the same function up to float rounding.

        Args:
            post_training: allow a layer with ``weight_bits=None``, whose weights were never rounded
                while it trained; warns, because that destroys most networks.

        Raises:
            ValueError: the layer has ``weight_bits=None`` and ``post_training`` is False, or the
                latents hold NaN or infinite values.
        """
        from pyrobust.nn.packed_complex_linear import PackedComplexLinear

        if self.weight_bits is None:
            if not post_training:
                raise ValueError(
                    "ComplexLinear.pack: weight_bits must be 2, so that training saw the phases; "
                    "got None (post_training=True rounds float weights, which is destructive)."
                )
            warnings.warn(
                "ComplexLinear.pack: rounding float weights to phases after training is "
                "destructive; train with weight_bits=2.",
                stacklevel=2,
            )
        return PackedComplexLinear.from_layer(self)

    def to_packed(self) -> PackedComplexLinear:
        """:meth:`pack`, as ``pyrobust.pack`` calls it."""
        return self.pack()

    def simulated_weights(self) -> dict[str, SimulatedWeight]:
        """The weight before and after packing, for ``pyrobust.pack``."""
        weight = torch.complex(self.weight_real.detach().float(), self.weight_imag.detach().float())
        size = self.weight_real.numel() * self.weight_real.element_size()
        phases = PhaseTensor.of(self.weight_real, self.weight_imag)
        return {"": SimulatedWeight(weight, phases, 2 * size)}

    def extra_repr(self) -> str:
        """Sizes and format."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"weight_bits={self.weight_bits}, act_bits={self.act_bits}, output={self.output!r}"
        )


@dataclass(frozen=True)
class TwoStageSchedule:
    """Learning rate and weight decay over the steps of training, as factors of their peaks.

    Warm-up rises linearly to 1, then the rate falls as ``1 - (t - warmup) / total_steps``; at half
    of the steps it jumps to ``second_scale * (1 - t / total_steps)``, which ends at 0. Weight decay
    stops in the second stage, where latents should no longer shrink across phase borders.

    Args:
        total_steps: steps of the whole training, ``>= 2``.
        warmup: steps of the linear rise, ``>= 0`` and at most half of ``total_steps``.
        second_scale: factor of the second stage, ``> 0``.
        decay_weights_until: share of training with weight decay, in [0, 1].

    Raises:
        TypeError: a number of steps is not an integer.
        ValueError: an argument is out of range.

    Example:
        >>> schedule = TwoStageSchedule(100, warmup=10)
        >>> schedule.lr_factor(10), round(schedule.lr_factor(50), 4), schedule.lr_factor(100)
        (1.0, 0.3333, 0.0)
    """

    total_steps: int
    warmup: int = 0
    second_scale: float = 2 / 3
    decay_weights_until: float = 0.5

    def __post_init__(self) -> None:
        check_integer("TwoStageSchedule", "total_steps", self.total_steps, 2)
        check_integer("TwoStageSchedule", "warmup", self.warmup, 0)
        check_positive("TwoStageSchedule", "second_scale", self.second_scale)
        check_unit("TwoStageSchedule", "decay_weights_until", self.decay_weights_until)
        if 2 * self.warmup > self.total_steps:
            raise ValueError(
                "TwoStageSchedule: warmup must be at most half of total_steps = "
                f"{self.total_steps}; got {self.warmup}."
            )

    def lr_factor(self, step: int) -> float:
        """What to multiply the peak learning rate by before step ``step`` (from 0).

        Fits ``torch.optim.lr_scheduler.LambdaLR``.
        """
        if step < self.warmup:
            return step / self.warmup
        if 2 * step < self.total_steps:
            return 1 - (step - self.warmup) / self.total_steps
        return self.second_scale * (1 - step / self.total_steps)

    def decay_factor(self, step: int) -> float:
        """1 while weights decay, 0 after."""
        return float(step < self.decay_weights_until * self.total_steps)

    def apply_(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set rate and decay of every parameter group for step ``step``.

        The peaks are the values that the groups had at the first call; they are kept in the groups
        (``peak_lr``, ``peak_decay``), so a saved optimizer resumes.
        """
        for group in optimizer.param_groups:
            peak_lr = group.setdefault("peak_lr", group["lr"])
            peak_decay = group.setdefault("peak_decay", group["weight_decay"])
            group["lr"] = peak_lr * self.lr_factor(step)
            group["weight_decay"] = peak_decay * self.decay_factor(step)
