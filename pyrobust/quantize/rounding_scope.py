"""What learned rounding keeps: the outputs of single layers, or those of whole blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from pyrobust.quantize.block_layout import first_output
from pyrobust.quantize.calibration import Call
from pyrobust.quantize.calibration_block import CalibrationBlock
from pyrobust.quantize.call_rows import batch_size, mixed_call, rows_of
from pyrobust.quantize.code_descent import descend_codes, fit_scales
from pyrobust.quantize.gptq import gptq_weight
from pyrobust.quantize.power_quantizer import PowerQuantizer
from pyrobust.quantize.qtensor import QTensor
from pyrobust.quantize.quadratic_loss import QuadraticLoss
from pyrobust.quantize.reconstruction import (
    LearnedWeight,
    Rounded,
    Schedule,
    output_loss,
    reconstruct,
)
from pyrobust.quantize.rounding_grid import RoundingGrid, search_grid
from pyrobust.quantize.rounding_variable import RoundingVariable

__all__ = ["RoundingOptions", "round_block", "round_layers"]

_ROWS = 1 << 14  # rows of outputs compared at a time
_NEAR = 0.49  # how far from its code a real step may start, so that it still rounds there


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

    def generator(self, index: int, position: int = 0) -> torch.Generator:
        """Randomness of one block and layer alone, so that a resumed conversion repeats it."""
        mixed = (self.seed * 1_000_003 + index) * 1_009 + position
        return torch.Generator().manual_seed(mixed % 2**63)


def round_layers(block: CalibrationBlock, options: RoundingOptions) -> None:
    """Layer by layer: each learns on inputs that come through the layers before it as they are."""
    for position, name in enumerate(block.layers):
        quadratic = None
        data = _LayerData(block, name, options)
        if options.loss == "mse" and (options.descent or options.start == "gptq"):
            stream = "float" if options.input == "float" else "calls"
            moments = block.hessians((name,), stream=stream)[name]
            quadratic = data.quadratic(block.weight(name), moments, options.damp)
        hessian = block.hessians((name,))[name]
        if options.start == "gptq":
            learned = _start_from_gptq(block, name, options, hessian, quadratic)
        else:
            learned = _learned_weight(block, name, options, hessian)
        generator = options.generator(block.index, position)

        def loss(
            weights: dict[str, Tensor],
            *,
            each: str = name,
            data: _LayerData = data,
            generator: torch.Generator = generator,
        ) -> Tensor:
            x, y = data.minibatch(generator)
            return output_loss(data.rows(data.forward(x, weights[each])), y, options.loss)

        candidates = [learned.nearest(), learned.hard()]
        reconstruct({name: learned}, loss, options.schedule)
        qtensor, bias = _best(data, learned, [*candidates, learned.hard()], options, quadratic)
        block.install(name, qtensor, bias)


def round_block(block: CalibrationBlock, options: RoundingOptions) -> None:
    """All layers of a block together, on the outputs of the block."""
    names = _parameter_names(block)
    learned = {}
    for name in block.layers:
        hessian = block.hessians((name,))[name] if options.scheme is not None else None
        learned[name] = _learned_weight(block, name, options, hessian)
    data = _BlockData(block, options)
    generator = options.generator(block.index)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        call, y = data.minibatch(generator)
        return output_loss(data.run(call, weights, names), y, options.loss)

    reconstruct(learned, loss, options.schedule)
    nearest = {name: each.nearest().qtensor() for name, each in learned.items()}
    trained = {name: each.hard().qtensor() for name, each in learned.items()}
    better = data.total(trained, names) <= data.total(nearest, names)
    for name, qtensor in (trained if better else nearest).items():
        block.hessians((name,))
        block.install(name, qtensor)


# -- one layer -----------------------------------------------------------------------------------


class _LayerData:
    """Inputs and float outputs of a layer: rows of a linear layer, images of a convolution."""

    def __init__(self, block: CalibrationBlock, name: str, options: RoundingOptions) -> None:
        self.layer: Any = block.layers[name]
        self.options = options
        self.is_conv = isinstance(self.layer, nn.Conv2d)
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

    def _flat(self, x: Tensor) -> Tensor:
        x = x.detach().float()
        if self.is_conv:
            return x if x.ndim == 4 else x[None]
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
        x = (self.x_float if self.options.input == "float" else self.x)[chosen]
        if self.options.input == "mix":
            coin = torch.rand(x.shape, generator=generator).to(x.device) < 0.5
            x = torch.where(coin, x, self.x_float[chosen])
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
        return y.movedim(1, -1).flatten(0, 2) if self.is_conv else y

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


def _best(
    data: _LayerData,
    learned: LearnedWeight,
    candidates: list[Rounded],
    options: RoundingOptions,
    quadratic: QuadraticLoss | None,
) -> tuple[QTensor, Tensor | None]:
    """The best of the candidates, gone further down, with a corrected bias where that helps."""
    best, least = candidates[0], float("inf")
    for candidate in candidates:
        loss = data.total(candidate.qtensor().dequantize().to(data.y.device))
        if loss < least:
            best, least = candidate, loss
    finals = [best.qtensor()]
    if quadratic is not None and options.descent:
        finals.append(_descended(learned, best, options, quadratic).qtensor())
    result: tuple[QTensor, Tensor | None] = (finals[0], None)
    least = float("inf")
    for qtensor in finals:
        value = qtensor.dequantize().to(data.y.device)
        shifts: list[Tensor | None] = [None]
        if options.learn_bias and data.layer.bias is not None:
            shifts.append(data.mean_error(value))
        for shift in shifts:
            loss = data.total(value, shift)
            if loss < least:
                bias = None if shift is None else data.layer.bias.detach().float() + shift
                result, least = (qtensor, bias), loss
    return result


def _descended(
    learned: LearnedWeight, start: Rounded, options: RoundingOptions, loss: QuadraticLoss
) -> Rounded:
    """Codes, then scales, then codes again for the scales as they are stored."""
    low = high = None
    if options.start != "gptq":
        least, most = learned.variable.bounds()
        low = torch.minimum(torch.maximum(least, start.grid.low), start.steps)
        high = torch.maximum(torch.minimum(most, start.grid.high), start.steps)
    grid, steps = start.grid.as_stored(), start.steps
    steps = descend_codes(loss, grid, steps, low=low, high=high, sweeps=options.descent)
    if options.learn_scale:
        grid = replace(grid, scale=fit_scales(loss, grid, steps)).as_stored()
        steps = descend_codes(loss, grid, steps, low=low, high=high, sweeps=options.descent)
    return Rounded(grid, steps)


def _start_from_gptq(
    block: CalibrationBlock,
    name: str,
    options: RoundingOptions,
    hessian: Tensor,
    quadratic: QuadraticLoss | None,
) -> LearnedWeight:
    """Codes of GPTQ for the real weight that serves these inputs best."""
    weight = block.weight(name).detach().float()
    target = weight if quadratic is None else quadratic.minimizer()
    form = dict(block.formats[name])
    length = weight.shape[1] if form["group_dim"] == 1 else weight.shape[0]
    form["group_size"] = min(form["group_size"], max(1, length))
    packed = gptq_weight(target, hessian, **form, damp=options.damp)
    grid = RoundingGrid(
        torch.where(packed.scale > 0, packed.scale, 1.0).float().to(weight.device),
        None if packed.zero is None else packed.zero.float().to(weight.device),
        int(packed.bits),
        packed.shape,
        packed.group_size,
        packed.group_dim,
    )
    codes = packed.unpack_codes().to(weight) + grid.low
    latent = torch.minimum(torch.maximum(grid.steps(target), codes - _NEAR), codes + _NEAR)
    variable = RoundingVariable(latent, options.variable, options.freedom)
    return LearnedWeight(weight, grid, variable, options.learn_scale)


def _learned_weight(
    block: CalibrationBlock, name: str, options: RoundingOptions, hessian: Tensor | None
) -> LearnedWeight:
    weight = block.weight(name).detach().float()
    each = block.formats[name]
    layout: dict[str, Any] = {
        "bits": int(each["bits"]),
        "group_size": each["group_size"],
        "group_dim": each["group_dim"],
        "symmetric": each["symmetric"],
    }
    grid: RoundingGrid
    if options.scheme is None:
        grid = search_grid(weight, **layout)
    else:
        grid = options.scheme.grid(weight, **layout, hessian=hessian)
    steps = grid.steps(weight)
    chosen = None
    if options.weight_fraction < 1:
        chosen = _most_ambiguous(steps, options.weight_fraction)
    variable = RoundingVariable(steps, options.variable, options.freedom, chosen)
    return LearnedWeight(weight, grid, variable, options.learn_scale)


def _most_ambiguous(steps: Tensor, fraction: float) -> Tensor:
    """True for the share of weights that lie nearest to the middle between two levels."""
    distance = (steps - torch.floor(steps) - 0.5).abs().flatten()
    count = max(1, round(fraction * distance.numel()))
    chosen = torch.zeros_like(distance, dtype=torch.bool)
    chosen[distance.argsort(stable=True)[:count]] = True
    return chosen.reshape(steps.shape)


# -- one block -----------------------------------------------------------------------------------


class _BlockData:
    """Calls of a block and what the float block returns for the float model's calls."""

    def __init__(self, block: CalibrationBlock, options: RoundingOptions) -> None:
        assert block.float_calls is not None
        self.module, self.options = block.module, options
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
        return call, _as_rows(self.y[which][rows])

    def run(self, call: Call, weights: dict[str, Tensor], names: dict[str, str]) -> Tensor:
        """The block's output as rows, with other weights."""
        parameters = dict(self.module.named_parameters())
        swapped = {
            names[name]: weight.reshape(parameters[names[name]].shape).to(parameters[names[name]])
            for name, weight in weights.items()
        }
        output = functional_call(self.module, swapped, call.args, call.kwargs)
        return _as_rows(first_output(output))

    @torch.no_grad()
    def total(self, qtensors: dict[str, QTensor], names: dict[str, str]) -> float:
        """The loss over all calls."""
        weights = {name: qtensor.dequantize() for name, qtensor in qtensors.items()}
        losses = [
            output_loss(self.run(call, weights, names), _as_rows(y), self.options.loss)
            for call, y in zip(self.calls, self.y, strict=True)
        ]
        return float(torch.stack(losses).mean())


def _parameter_names(block: CalibrationBlock) -> dict[str, str]:
    """The weight of each layer as a parameter of the block."""
    inside = {module: name for name, module in block.module.named_modules()}
    return {name: f"{inside[layer]}.weight".lstrip(".") for name, layer in block.layers.items()}


def _as_rows(y: Tensor) -> Tensor:
    y = y.float()
    return y.movedim(1, -1).reshape(-1, y.shape[1]) if y.ndim == 4 else y.reshape(-1, y.shape[-1])
