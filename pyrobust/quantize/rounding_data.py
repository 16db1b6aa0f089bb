"""The data that learned rounding works on: inputs and float outputs of a layer, or of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from pyrobust.quantize.block_layout import first_output
from pyrobust.quantize.calibration import Call
from pyrobust.quantize.calibration_block import CalibrationBlock
from pyrobust.quantize.call_rows import batch_size, mixed_call, rows_of
from pyrobust.quantize.hessian import CONVOLUTIONS, HessianAccumulator
from pyrobust.quantize.learned_activation import LearnedActivation, rounding_inputs
from pyrobust.quantize.power_quantizer import PowerQuantizer
from pyrobust.quantize.qtensor import QTensor
from pyrobust.quantize.quadratic_loss import QuadraticLoss
from pyrobust.quantize.reconstruction import Schedule, output_loss

if TYPE_CHECKING:
    from pyrobust.nn.affine_rounding import AffineRounding

__all__ = ["BlockData", "LayerData", "RoundingOptions", "as_rows"]

_ROWS = 1 << 14  # rows of outputs compared at a time


@dataclass(frozen=True)
class RoundingOptions:
    """The options of :class:`~pyrobust.quantize.LearnedRounding` that both scopes need."""

    schedule: Schedule
    loss: str
    variable: str
    freedom: int
    learn_scale: bool
    learn_bias: bool
    scheme: PowerQuantizer | None
    weight_fraction: float
    input: str
    batch_size: int
    seed: int
    start: str
    descent: int
    damp: float
    activation_bits: int | None = None
    drop: float = 0.5

    def input_bits(self, weight_bits: float) -> int | None:
        """Of the input of a layer whose weights have ``weight_bits``; None leaves it in float."""
        return 8 if self.activation_bits and weight_bits == 8 else self.activation_bits

    def generator(self, index: int, position: int = 0) -> torch.Generator:
        """Randomness of one block and layer alone, so that a resumed conversion repeats it."""
        mixed = (self.seed * 1_000_003 + index) * 1_009 + position
        return torch.Generator().manual_seed(mixed % 2**63)


class LayerData:
    """Inputs and float outputs of a layer: rows of a linear layer, images of a convolution."""

    def __init__(self, block: CalibrationBlock, name: str, options: RoundingOptions) -> None:
        self.layer: Any = block.layers[name]
        self.options = options
        self.is_conv = isinstance(self.layer, CONVOLUTIONS)
        quantized: list[Tensor] = []
        floats: list[Tensor] = []
        outputs: list[Tensor] = []

        def see_float(_: str, x: Tensor, y: Tensor) -> None:
            floats.append(self._flat(x))
            outputs.append(self._flat(y))

        block.observe([name], lambda _, x, __: quantized.append(self._flat(x)))
        block.observe([name], see_float, stream="float")
        self.samples = len(floats)
        self.x, self.x_float = self._joined(quantized, name), self._joined(floats, name)
        self.y = self._joined(outputs, name)
        if not bool(torch.isfinite(self.y).all()):
            raise ValueError(
                f"LearnedRounding: the float output of '{name}' must be finite; it holds NaN or "
                "infinite values."
            )
        inputs = sum(batch_size(call) for call in block.calls)
        self.per_input = max(1, round(len(self.x) / max(1, inputs)))
        self.raw, self.raw_float = self.x, self.x_float
        self.rounding: AffineRounding | None = None
        bits = options.input_bits(block.formats[name]["bits"])
        self.activation = None if bits is None else LearnedActivation(self.x, bits, options.drop)
        if self.activation is not None:
            self.round_inputs(self.activation.module(trained=False))

    @torch.no_grad()
    def round_inputs(self, rounding: AffineRounding) -> None:
        """Compare and descend on inputs through ``rounding`` from now on."""
        self.rounding = rounding
        self.x, self.x_float = rounding(self.raw), rounding(self.raw_float)

    def moments(self) -> Tensor:
        """The Hessian of the inputs that :meth:`quadratic` takes, as they are rounded now."""
        accumulator = HessianAccumulator.of(self.layer)
        for x, _ in self.parts(self.x_float if self.options.input == "float" else self.x):
            accumulator.add_inputs(self.layer, x)
        return accumulator.hessian()

    def _flat(self, x: Tensor) -> Tensor:
        x = x.detach().float()
        if self.is_conv:
            return x if x.ndim == self.layer.weight.ndim else x[None]
        return x.reshape(-1, x.shape[-1])

    def _joined(self, parts: list[Tensor], name: str) -> Tensor:
        if len({part.shape[1:] for part in parts}) > 1:
            raise ValueError(
                f"LearnedRounding: the inputs of '{name}' must have one size; got "
                f"{sorted({tuple(part.shape[1:]) for part in parts})}."
            )
        return torch.cat(parts)

    def minibatch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Some inputs, and the float outputs of the same as rows."""
        count = min(len(self.x), self.options.batch_size * self.per_input)
        chosen = torch.randint(len(self.x), (count,), generator=generator).to(self.x.device)
        x = (self.raw_float if self.options.input == "float" else self.raw)[chosen]
        if self.options.input == "mix":
            coin = torch.rand(x.shape, generator=generator).to(x.device) < 0.5
            x = torch.where(coin, x, self.raw_float[chosen])
        if self.activation is not None:
            x = self.activation.dropped(x, generator)
        return x, self.rows(self.y[chosen])

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer with another weight ``(rows, cols)``."""
        bias = None if self.layer.bias is None else self.layer.bias.detach().float()
        if self.is_conv:
            shaped = weight.reshape(self.layer.weight.shape)
            result: Tensor = self.layer._conv_forward(x, shaped, bias)
            return result
        return F.linear(x, weight, bias)

    def rows(self, y: Tensor) -> Tensor:
        """Outputs as ``(rows, channels)``."""
        return y.movedim(1, -1).flatten(0, -2) if self.is_conv else y

    def parts(self, inputs: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All inputs as the quantized model gives them, and float outputs as rows, in pieces."""
        inputs = self.x if inputs is None else inputs
        places = self.y[0].numel() // self.y.shape[1] if self.is_conv and len(self.y) else 1
        step = max(1, _ROWS // max(1, places))
        for begin in range(0, len(self.x), step):
            piece = slice(begin, begin + step)
            yield inputs[piece], self.rows(self.y[piece])

    def quadratic(self, weight: Tensor, hessian: Tensor, damp: float) -> QuadraticLoss:
        """The mean squared error as a function of the weight, on inputs as the options say."""
        base = weight.detach().float().clone().requires_grad_()
        count = len(self.y) * (self.y[0].numel() // self.y.shape[1] if self.is_conv else 1)
        with torch.enable_grad():
            for x, y in self.parts(self.x_float if self.options.input == "float" else self.x):
                loss = output_loss(self.rows(self.forward(x, base)), y, "mse")
                (loss * (len(y) / count)).backward()
        gradient = torch.zeros_like(base) if base.grad is None else base.grad
        return QuadraticLoss(base.detach(), gradient, hessian, damp)

    @torch.no_grad()
    def total(self, weight: Tensor, shift: Tensor | None = None) -> float:
        """The loss over all data, with ``shift`` added to the outputs."""
        total, count = 0.0, 0
        for x, y in self.parts():
            out = self.rows(self.forward(x, weight))
            out = out if shift is None else out + shift
            total += float(output_loss(out, y, self.options.loss)) * len(y)
            count += len(y)
        return total / max(1, count)

    @torch.no_grad()
    def mean_error(self, weight: Tensor) -> Tensor:
        """``E[Y - Y_q]`` per channel."""
        total, count = torch.zeros(self.layer.weight.shape[0], device=self.y.device), 0
        for x, y in self.parts():
            total += (y - self.rows(self.forward(x, weight))).sum(0)
            count += len(y)
        return total / max(1, count)


class BlockData:
    """Calls of a block and what the float block returns for the float model's calls."""

    def __init__(self, block: CalibrationBlock, options: RoundingOptions) -> None:
        assert block.float_calls is not None
        self.module, self.layers, self.options = block.module, block.layers, options
        self.calls, self.float_calls = block.calls, block.float_calls
        self.y = [first_output(output).detach() for output in block.outputs(stream="float")]
        if not all(bool(torch.isfinite(y).all()) for y in self.y):
            raise ValueError(
                f"LearnedRounding: the float output of '{block.name}' must be finite; it holds NaN "
                "or infinite values."
            )

    def minibatch(self, generator: torch.Generator) -> tuple[Call, Tensor]:
        """Some rows of one call, and the float outputs for them as rows."""
        which = int(torch.randint(len(self.calls), (), generator=generator))
        size = len(self.y[which])
        count = min(size, self.options.batch_size)
        rows = torch.randperm(size, generator=generator)[:count].to(self.y[which].device)
        source = self.float_calls if self.options.input == "float" else self.calls
        call = rows_of(source[which], rows)
        if self.options.input == "mix":
            call = mixed_call(call, rows_of(self.float_calls[which], rows), generator)
        return call, as_rows(self.y[which][rows])

    def run(
        self,
        call: Call,
        weights: dict[str, Tensor],
        names: dict[str, str],
        roundings: Mapping[str, Callable[[Tensor], Tensor]],
    ) -> Tensor:
        """The block's output as rows, with other weights and rounded inputs of layers."""
        parameters = dict(self.module.named_parameters())
        swapped = {
            names[name]: weight.reshape(parameters[names[name]].shape).to(parameters[names[name]])
            for name, weight in weights.items()
        }
        with rounding_inputs(self.layers, roundings):
            output = functional_call(self.module, swapped, call.args, call.kwargs)
        return as_rows(first_output(output))

    @torch.no_grad()
    def total(
        self,
        qtensors: dict[str, QTensor],
        names: dict[str, str],
        roundings: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
    ) -> float:
        """The loss over all calls."""
        weights = {name: qtensor.dequantize() for name, qtensor in qtensors.items()}
        losses = [
            output_loss(self.run(call, weights, names, roundings), as_rows(y), self.options.loss)
            for call, y in zip(self.calls, self.y, strict=True)
        ]
        return float(torch.stack(losses).mean())


def as_rows(y: Tensor, layer: nn.Module | None = None) -> Tensor:
    """Outputs, of ``layer`` if known, as ``(rows, channels)``."""
    y, axis = y.float(), 1 if y.ndim == 4 else -1
    if isinstance(layer, CONVOLUTIONS):
        axis = 1 - layer.weight.ndim
    return y.movedim(axis, -1).reshape(-1, y.shape[axis])
