"""What learned rounding keeps: the outputs of single layers, or those of whole blocks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyrobust.quantize.calibration_block import CalibrationBlock
from pyrobust.quantize.code_descent import descend_codes, fit_scales
from pyrobust.quantize.gptq import gptq_weight
from pyrobust.quantize.learned_activation import LearnedActivation
from pyrobust.quantize.qtensor import QTensor
from pyrobust.quantize.quadratic_loss import QuadraticLoss
from pyrobust.quantize.reconstruction import (
    LearnedWeight,
    Rounded,
    output_loss,
    reconstruct,
)
from pyrobust.quantize.rounding_data import BlockData, LayerData, RoundingOptions, as_rows
from pyrobust.quantize.rounding_grid import RoundingGrid, search_grid
from pyrobust.quantize.rounding_variable import RoundingVariable

__all__ = ["round_block", "round_layers"]

_NEAR = 0.49  # how far from its code a real step may start, so that it still rounds there


def round_layers(block: CalibrationBlock, options: RoundingOptions) -> None:
    """Layer by layer: each learns on inputs that come through the layers before it as they are."""
    for position, name in enumerate(block.layers):
        data = LayerData(block, name, options)
        quadratic = _quadratic(block, name, data)
        hessian = block.hessians((name,))[name]
        if options.start == "gptq":
            seen = hessian if data.activation is None else data.moments()
            learned = _start_from_gptq(block, name, options, seen, quadratic)
        else:
            learned = _learned_weight(block, name, options, hessian)
        generator = options.generator(block.index, position)

        def loss(
            weights: dict[str, Tensor],
            *,
            each: str = name,
            data: LayerData = data,
            generator: torch.Generator = generator,
        ) -> Tensor:
            x, y = data.minibatch(generator)
            return output_loss(data.rows(data.forward(x, weights[each])), y, options.loss)

        candidates = [learned.nearest(), learned.hard()]
        activations = [] if data.activation is None else [data.activation]
        reconstruct({name: learned}, loss, options.schedule, activations)
        candidates.append(learned.hard())
        if data.activation is not None:
            _choose_rounding(data, data.activation, candidates)
            quadratic = _quadratic(block, name, data)
        qtensor, bias = _best(data, learned, candidates, options, quadratic)
        block.install(name, qtensor, bias, data.rounding)


def _quadratic(block: CalibrationBlock, name: str, data: LayerData) -> QuadraticLoss | None:
    """The loss as a function of the weight, where something goes down it."""
    options = data.options
    if options.loss != "mse" or not (options.descent or options.start == "gptq"):
        return None
    if data.activation is None:
        stream = "float" if options.input == "float" else "calls"
        moments = block.hessians((name,), stream=stream)[name]
    else:
        moments = data.moments()
    return data.quadratic(block.weight(name), moments, options.damp)


def _choose_rounding(
    data: LayerData, activation: LearnedActivation, candidates: list[Rounded]
) -> None:
    """Round inputs as they have come to be, unless they did better as they started."""
    start, weights = data.rounding, [each.qtensor().dequantize() for each in candidates]
    assert start is not None
    before = min(data.total(weight.to(data.y.device)) for weight in weights)
    data.round_inputs(activation.module())
    if min(data.total(weight.to(data.y.device)) for weight in weights) > before:
        data.round_inputs(start)


def round_block(block: CalibrationBlock, options: RoundingOptions) -> None:
    """All layers of a block together, on the outputs of the block."""
    names = _parameter_names(block)
    learned = {}
    for name in block.layers:
        needs = options.scheme is not None or options.start == "gptq"
        hessian = block.hessians((name,))[name] if needs else None
        if options.start == "gptq":
            assert hessian is not None
            learned[name] = _start_from_gptq(block, name, options, hessian, None)
        else:
            learned[name] = _learned_weight(block, name, options, hessian)
    data = BlockData(block, options)
    activations = _activations(block, options)
    generator = options.generator(block.index)
    dropping = {n: partial(a.dropped, generator=generator) for n, a in activations.items()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        call, y = data.minibatch(generator)
        return output_loss(data.run(call, weights, names, dropping), y, options.loss)

    starts = {name: activation.module(trained=False) for name, activation in activations.items()}
    candidates = [
        ({name: each.nearest().qtensor() for name, each in learned.items()}, starts),
        ({name: each.hard().qtensor() for name, each in learned.items()}, starts),
    ]
    reconstruct(learned, loss, options.schedule, list(activations.values()))
    trained = {name: activation.module() for name, activation in activations.items()}
    candidates.append(({name: each.hard().qtensor() for name, each in learned.items()}, trained))
    totals = [data.total(qtensors, names, roundings) for qtensors, roundings in candidates]
    qtensors, roundings = candidates[min(range(3), key=lambda i: (totals[i], -i))]
    for name, qtensor in qtensors.items():
        block.hessians((name,))
        block.install(name, qtensor, activation=roundings.get(name))
    if options.learn_bias:
        _correct_biases(block, data, names)


def _activations(block: CalibrationBlock, options: RoundingOptions) -> dict[str, LearnedActivation]:
    """The rounding of each layer's input, fitted to what it is given now."""
    found: dict[str, LearnedActivation] = {}
    for name in block.layers:
        bits = options.input_bits(block.formats[name]["bits"])
        if bits is None:
            continue
        inputs: list[Tensor] = []

        def see(_: str, x: Tensor, __: Tensor, kept: list[Tensor] = inputs) -> None:
            kept.append(x.detach().flatten())

        block.observe([name], see)
        found[name] = LearnedActivation(torch.cat(inputs), bits, options.drop)
    return found


def _correct_biases(block: CalibrationBlock, data: BlockData, names: dict[str, str]) -> None:
    """Add to each bias what its layer's mean output lacks, layer by layer; undone if in vain."""
    codes = {name: result.qtensor for name, result in block.results.items()}
    before, results = data.total(codes, names), dict(block.results)
    layers: dict[str, Any] = dict(block.layers)
    biases = {n: each.bias.data for n, each in layers.items() if each.bias is not None}
    for name, bias in biases.items():
        lacking = _mean_output(block, name, "float") - _mean_output(block, name, "calls")
        block.take({name: replace(results[name], bias=bias.float() + lacking)})
    if biases and data.total(codes, names) > before:
        block.take({name: replace(results[name], bias=bias) for name, bias in biases.items()})


def _mean_output(block: CalibrationBlock, name: str, stream: str) -> Tensor:
    """The mean of a layer's output per channel."""
    sums: list[Tensor] = []
    rows = 0

    def see(_: str, __: Tensor, y: Tensor) -> None:
        nonlocal rows
        flat = as_rows(y, block.layers[name])
        sums.append(flat.sum(0))
        rows += len(flat)

    block.observe([name], see, stream=stream)
    return torch.stack(sums).sum(0) / max(1, rows)


# -- one layer -----------------------------------------------------------------------------------


def _best(
    data: LayerData,
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


def _parameter_names(block: CalibrationBlock) -> dict[str, str]:
    """The weight of each layer as a parameter of the block."""
    inside = {module: name for name, module in block.module.named_modules()}
    return {name: f"{inside[layer]}.weight".lstrip(".") for name, layer in block.layers.items()}
