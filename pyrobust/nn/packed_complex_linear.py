"""PackedComplexLinear: a complex linear layer with weights in {±1, ±i}, two bits each.

The inference form of :class:`pyrobust.quantize.ComplexLinear`. Weights are phases under two scales
(:class:`pyrobust.quantize.PhaseTensor`), so that the product of 8-bit activations is four signed
integer sums an output and no multiplication by a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pyrobust._checks import check_choice, check_instance
from pyrobust.nn.packed_module import PackedModule
from pyrobust.ops import complex_2bit_matmul
from pyrobust.ops._decompositions import unpacked
from pyrobust.quantize.activations import quantize_activation
from pyrobust.quantize.complex_product import complex_product
from pyrobust.quantize.phase_codes import (
    PhaseCodes,
    PhaseTensor,
    check_parts,
    phase_values,
    unpack_codes_2bit,
)
from pyrobust.quantize.qtensor import QTensor

if TYPE_CHECKING:
    from pyrobust.quantize.ifairy import ComplexLinear

__all__ = ["PackedComplexLinear"]

_FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_ROWS = 256  # of the weight that are floats at a time, as in the gradient of the real product


class PackedComplexLinear(PackedModule):
    """``y = conj(x) W^T`` on pairs of real tensors, with ``W`` in {±1, ±i} times two scales.

    A freshly constructed layer packs a fresh :class:`~pyrobust.quantize.ComplexLinear`. The weight
    does not train; gradients flow to the inputs.

    Args:
        in_features: size of the last axis of the inputs.
        out_features: size of the last axis of the outputs.
        activations: ``"int8"`` rounds each row of each part to 8 bits and sums integers; None
            multiplies in float.
        output: ``"complex"`` gives ``(y_real, y_imag)``, ``"real"`` gives ``y_real`` alone.
        device: where the buffers live; ``"meta"`` makes a layer without data.

    Shape:
        Inputs ``(*, in_features)`` twice, float32, bfloat16 or float16; outputs
        ``(*, out_features)`` of the same dtype.

    Raises:
        ValueError: an argument is outside what is listed above.

    Example:
        >>> layer = PackedComplexLinear(6, 3)
        >>> y_real, y_imag = layer(torch.ones(2, 6), torch.zeros(2, 6))
        >>> y_real.shape, layer.nbytes_packed
        (torch.Size([2, 3]), 14)
    """

    kind = 4

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activations: str | None = "int8",
        output: str = "complex",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            (out_features, in_features),
            bits=2,
            group_size=max(1, in_features),
            group_dim=1,
            symmetric=True,
            activations=activations,
        )
        check_choice("PackedComplexLinear", "output", output, ("complex", "real"))
        self.in_features = in_features
        self.out_features = out_features
        self.output = output
        if device is None or torch.device(device).type != "meta":
            bound = in_features**-0.5
            size = (out_features, in_features)
            parts = (torch.empty(size, device=device).uniform_(-bound, bound) for _ in range(2))
            self.adopt_phases(PhaseTensor.of(*parts))

    def _register_empty(self) -> None:
        super()._register_empty()
        self.scale = torch.empty(2, device="meta")  # of the real and the imaginary axis

    @classmethod
    def like(cls, layer: nn.Module, **weight_format: Any) -> Self:
        """A twin of the ``ComplexLinear`` ``layer`` without data, on the meta device."""
        from pyrobust.quantize.ifairy import ComplexLinear

        check_instance(cls.__name__, "layer", layer, ComplexLinear)
        assert isinstance(layer, ComplexLinear)
        activations = weight_format.get("activations", None if layer.act_bits is None else "int8")
        sizes = (layer.in_features, layer.out_features)
        return cls(*sizes, activations=activations, output=layer.output, device="meta")

    @classmethod
    def from_layer(cls, layer: ComplexLinear) -> Self:
        """Pack the phases of the latents of ``layer``.

        Raises:
            ValueError: the latents hold NaN or infinite values.
        """
        twin = cls.like(layer).train(layer.training)
        return twin.adopt_phases(PhaseTensor.of(layer.weight_real, layer.weight_imag))

    def adopt_phases(self, phases: PhaseTensor) -> Self:
        """Take the codes and scales of ``phases`` (shared, not copied).

        Raises:
            ValueError: its shape is not this layer's.
        """
        if tuple(phases.shape) != self.weight_shape:
            raise ValueError(
                f"PackedComplexLinear: phases must have shape {self.weight_shape}; got "
                f"{tuple(phases.shape)}."
            )
        self.codes, self.scale = phases.codes, phases.scale
        return self

    @property
    def phases(self) -> PhaseTensor:
        """The packed weight, sharing memory with the buffers."""
        return PhaseTensor(self.codes, self.scale, (self.out_features, self.in_features))

    @property
    def qtensor(self) -> QTensor:
        """Not there: the weight is complex, see :attr:`phases`."""
        raise NotImplementedError("PackedComplexLinear.qtensor: the weight is complex; use phases.")

    def dequantize(self) -> Tensor:
        """The weight that this layer computes with, exactly: complex64."""
        return self.phases.dequantize()

    def forward(self, x_real: Tensor, x_imag: Tensor) -> Any:
        """``(*, in_features)`` twice -> ``(y_real, y_imag)`` or ``y_real``, dtype of ``x``."""
        subject = "PackedComplexLinear"
        check_parts(subject, "x_real", "x_imag", x_real, x_imag)
        if x_real.ndim == 0 or x_real.shape[-1] != self.in_features:
            raise ValueError(
                f"{subject}: x_real must have in_features = {self.in_features} values on its last "
                f"axis; got shape {tuple(x_real.shape)}."
            )
        if x_real.dtype not in _FLOAT_TYPES:
            raise TypeError(
                f"{subject}: x_real must be float32, float16 or bfloat16; got {x_real.dtype}."
            )
        weight = (self.codes, self.scale, self.in_features)
        real, imag = _Product.apply(x_real, x_imag, *weight, self.activations == "int8")  # type: ignore[no-untyped-call]
        return (real, imag) if self.output == "complex" else real

    def extra_repr(self) -> str:
        """Sizes and format."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, activations={self.activations!r}, output={self.output!r}"


class _Product(torch.autograd.Function):
    """The product with its gradient; the rounding of activations counts as the identity."""

    @staticmethod
    def forward(
        ctx: Any,
        x_real: Tensor,
        x_imag: Tensor,
        codes: Tensor,
        scale: Tensor,
        in_features: int,
        int8: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(codes, scale)
        ctx.in_features = in_features
        weight = (codes, scale, in_features)
        real, imag = _int8(x_real, x_imag, *weight) if int8 else _exact(x_real, x_imag, *weight)
        return real.to(x_real.dtype), imag.to(x_real.dtype)

    @staticmethod
    def backward(ctx: Any, grad_real: Tensor, grad_imag: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        size = (*grad_real.shape[:-1], ctx.in_features)
        total_real, total_imag = (grad_real.new_zeros(size, dtype=torch.float32) for _ in range(2))
        for rows, u, v in _blocks(codes, scale, ctx.in_features):
            g, h = grad_real[..., rows].float(), grad_imag[..., rows].float()
            total_real += g @ u + h @ v
            total_imag += g @ v - h @ u
        return total_real.to(grad_real.dtype), total_imag.to(grad_real.dtype), *[None] * 4


def _int8(
    x_real: Tensor, x_imag: Tensor, codes: Tensor, scale: Tensor, in_features: int
) -> tuple[Tensor, Tensor]:
    a, step_a = quantize_activation(x_real)
    b, step_b = quantize_activation(x_imag)
    if codes.device.type in ("cpu", "cuda"):
        steps = step_a[..., 0].float(), step_b[..., 0].float()
        return complex_2bit_matmul(a, b, codes, scale, *steps, in_features=in_features)
    return _exact((a * step_a).float(), (b * step_b).float(), codes, scale, in_features)


def _exact(
    x_real: Tensor, x_imag: Tensor, codes: Tensor, scale: Tensor, in_features: int
) -> tuple[Tensor, Tensor]:
    a, b = x_real.float(), x_imag.float()
    parts = [complex_product(a, b, u, v) for _, u, v in _blocks(codes, scale, in_features)]
    if not parts:
        return a[..., :0], b[..., :0]
    real, imag = zip(*parts, strict=True)
    return torch.cat(real, -1), torch.cat(imag, -1)


def _blocks(
    codes: Tensor, scale: Tensor, in_features: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some rows of the weight at a time: which, and their real and imaginary parts."""
    for begin in range(0, codes.shape[0], _ROWS):
        rows = slice(begin, min(codes.shape[0], begin + _ROWS))
        yield rows, *phase_values(PhaseCodes(_phases(codes[rows], in_features), *scale))


def _phases(codes: Tensor, in_features: int) -> Tensor:
    """Codes one to an element."""
    if torch.compiler.is_compiling():  # no operator of its own: torch's can be traced
        return unpacked(codes, in_features, 2).to(torch.uint8)
    return unpack_codes_2bit(codes.cpu(), in_features).to(codes.device)
