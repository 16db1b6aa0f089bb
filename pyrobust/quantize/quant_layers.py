"""Linear layers and convolutions that train with simulated low-bit weights and inputs.

They are ordinary modules with float weights. ``pyrobust.pack`` replaces each by the packed layer
that it simulated: the same rounding of its input in front of codes that stand for the very weights
it multiplied with.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from pyrobust._checks import check_choice, check_instance
from pyrobust.quantize.half_integer import HalfStepTensor
from pyrobust.quantize.lsq import ActivationQuantizer, LSQQuantizer
from pyrobust.quantize.qtensor import QTensor
from pyrobust.quantize.simulated_weight import SimulatedWeight
from pyrobust.quantize.stats_quantizer import StatsQuantizer

__all__ = ["QuantConv2d", "QuantLinear", "WeightQuantizer"]

WeightQuantizer = StatsQuantizer | LSQQuantizer
_WEIGHTS = ("statsq", "lsq")


class _RoundedWeight(nn.Module):
    """What the two layers share: a float weight, and what it stands for once rounded."""

    weight: Tensor
    weight_quantizer: WeightQuantizer
    activation: nn.Module | None
    w_bits: int
    a_bits: int | None

    def simulated_weight(self) -> Tensor:
        """The rounded weight that the layer computes with, in float32 or wider."""
        rounded: Tensor = self.weight_quantizer(self.weight, storable=True)
        return rounded

    def to_qtensor(self) -> QTensor:
        """:meth:`simulated_weight` as packed codes, exactly; rows are output channels.

        Raises:
            ValueError: it is an 8-bit weight of StatsQ, which packs but is no ``QTensor``.
        """
        return self.weight_quantizer.qtensor(self.weight)

    def stored_weight(self) -> QTensor | HalfStepTensor:
        """What packing stores."""
        quantizer = self.weight_quantizer
        if isinstance(quantizer, StatsQuantizer):
            return quantizer.stored(self.weight)
        return quantizer.qtensor(self.weight)

    def simulated_weights(self) -> dict[str, SimulatedWeight]:
        """The one weight of this layer, for the report of packing."""
        size = self.weight.numel() * self.weight.element_size()
        return {"": SimulatedWeight(self.weight, self.stored_weight(), size)}

    def _rounded_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return (x if self.activation is None else self.activation(x)).to(dtype)

    def _behind_activation(self, layer: nn.Module) -> nn.Module:
        """``layer`` behind a frozen copy of the rounding of the input."""
        from pyrobust.nn.rounded_input import RoundedInput

        if self.activation is None:
            return layer.train(self.training)
        frozen = copy.deepcopy(self.activation).requires_grad_(False)
        return RoundedInput(frozen, layer).train(self.training)

    def extra_repr(self) -> str:
        """Sizes and bits."""
        return f"{super().extra_repr()}, w_bits={self.w_bits}, a_bits={self.a_bits}"


class QuantLinear(_RoundedWeight, nn.Linear):
    """``torch.nn.Linear`` with a rounded weight and a rounded input.

    The product is taken in float32 (or wider) and rounded once to the dtype of the input, as the
    packed product does.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        w_bits: 1 to 8, of the weight.
        a_bits: 1 to 8, of the input; None leaves it in float.
        weight_quantizer: ``"statsq"``, ``"lsq"`` (a scale per output channel), or a quantizer of
            those classes, which then belongs to this layer.
        act_quantizer: None for an :class:`ActivationQuantizer` made of ``a_bits``, ``signed``,
            ``per_channel`` and ``channels``; or any module that maps the input to its rounded form.
        bias: whether to add a bias.
        signed: of the input: codes of both signs.
        per_channel: axis of the input with a scale per entry (-2: tokens); None, one scale.
        device: of the weight.
        dtype: of the weight.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: bits lie outside 1 to 8, or a name is unknown.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        w_bits: int = 4,
        a_bits: int | None = None,
        weight_quantizer: str | WeightQuantizer = "statsq",
        act_quantizer: nn.Module | None = None,
        *,
        bias: bool = True,
        signed: bool = True,
        per_channel: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        weights = _weight_quantizer(type(self).__name__, weight_quantizer, w_bits, out_features)
        if act_quantizer is None and a_bits is not None:
            act_quantizer = ActivationQuantizer(
                a_bits, in_features, signed=signed, per_channel=per_channel
            )
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.w_bits, self.a_bits = weights.bits, a_bits
        self.weight_quantizer = weights.to(device=device)
        self.activation = None if act_quantizer is None else act_quantizer.to(device=device)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        w_bits: int = 4,
        a_bits: int | None = None,
        weight_quantizer: str | WeightQuantizer = "statsq",
        act_quantizer: nn.Module | None = None,
        *,
        signed: bool = True,
        per_channel: int | None = None,
    ) -> Self:
        """A layer that starts from a copy of weight and bias of ``linear``."""
        check_instance(cls.__name__, "linear", linear, nn.Linear)
        layer = cls(
            linear.in_features,
            linear.out_features,
            w_bits,
            a_bits,
            weight_quantizer,
            act_quantizer,
            bias=linear.bias is not None,
            signed=signed,
            per_channel=per_channel,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        _copy_weights(layer, linear)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """``(*, in_features)`` -> ``(*, out_features)``, dtype of ``x``."""
        weight = self.simulated_weight()
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        return F.linear(self._rounded_input(x, weight.dtype), weight, bias).to(x.dtype)

    def to_packed(self) -> nn.Module:
        """The packed layer: a ``PackedLinear``, behind the rounding of its input if there is one.

        The rounding of the input is copied.
        """
        from pyrobust.nn.half_sums import packed_linear_of

        return self._behind_activation(packed_linear_of(self.stored_weight(), self.bias))


class QuantConv2d(_RoundedWeight, nn.Conv2d):
    """``torch.nn.Conv2d`` with a rounded weight and a rounded input; see :class:`QuantLinear`.

    Made from a float layer by :meth:`from_float`. Scales of the input are per channel.
    """

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        w_bits: int = 8,
        a_bits: int | None = None,
        weight_quantizer: str | WeightQuantizer = "lsq",
        act_quantizer: nn.Module | None = None,
        *,
        signed: bool = True,
    ) -> Self:
        """A layer that starts from a copy of weight and bias of ``conv``."""
        check_instance(cls.__name__, "conv", conv, nn.Conv2d)
        weights = _weight_quantizer(cls.__name__, weight_quantizer, w_bits, conv.out_channels)
        if act_quantizer is None and a_bits is not None:
            channels = conv.in_channels
            act_quantizer = ActivationQuantizer(
                a_bits, channels, signed=signed, per_channel=-3, axis=-3, size=channels
            )
        weight = conv.weight
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device=weight.device,
            dtype=weight.dtype,
        )
        layer.w_bits, layer.a_bits = weights.bits, a_bits
        layer.weight_quantizer = weights.to(weight.device)
        layer.activation = None if act_quantizer is None else act_quantizer.to(weight.device)
        _copy_weights(layer, conv)
        return layer.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B, out_channels, H', W')``, dtype of ``x``."""
        weight = self.simulated_weight()
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        result: Tensor = self._conv_forward(self._rounded_input(x, weight.dtype), weight, bias)
        return result.to(x.dtype)

    def to_packed(self) -> nn.Module:
        """As :meth:`QuantLinear.to_packed`, with a ``PackedConv2d``."""
        from pyrobust.nn.half_sums import packed_conv_of

        return self._behind_activation(packed_conv_of(self.stored_weight(), self))


def _weight_quantizer(
    subject: str, given: str | WeightQuantizer, bits: int, rows: int
) -> WeightQuantizer:
    if isinstance(given, (StatsQuantizer, LSQQuantizer)):
        return given
    check_choice(subject, "weight_quantizer", given, _WEIGHTS)
    if given == "statsq":
        return StatsQuantizer(bits)
    return LSQQuantizer(bits, per_channel=0, size=rows)


def _copy_weights(layer: Any, source: Any) -> None:
    with torch.no_grad():
        layer.weight.copy_(source.weight)
        if source.bias is not None:
            layer.bias.copy_(source.bias)
        if isinstance(layer.weight_quantizer, LSQQuantizer):
            layer.simulated_weight()  # sets its scales
