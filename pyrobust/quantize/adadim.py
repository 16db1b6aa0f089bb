"""AdaDim: groups along inputs or along outputs, chosen layer by layer by the error they cause.

Weights that share a scale usually lie along the inputs of one output channel ("per-OC"), where one
troublesome input channel spoils a group of every row. Groups along the outputs of one input channel
("per-IC") keep the damage to that channel. Neither is better everywhere; AdaDim rounds each layer
both ways and keeps the direction that changes the output of its surroundings less, at the same
bits. Use it below 4 bits; at 8 bits there is nothing to choose.

Source: J. H. Heo, J. Kim, B. Kwon, B. Kim, S. J. Kwon, D. Lee, "Rethinking Channel Dimensions to
Isolate Outliers for Low-bit Weight Quantization of Large Language Models", ICLR 2024, arXiv
2309.15531, sections 3 and 4; the order of steps is that of the authors' code.
Departures: every grid contains 0 (theirs clips the zero-point of a group far from 0); scales have
at most 15 significant bits; the last group may be shorter. The unit whose output is compared is
found from the structure of the block, which gives theirs for Llama: the module around a layer where
other layers of it run beside or after, else the layer itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyrobust._checks import check_choice, check_integer
from pyrobust.quantize.block_layout import find_blocks, first_output
from pyrobust.quantize.calibration import Call, read_calibration
from pyrobust.quantize.calibration_block import CalibrationBlock
from pyrobust.quantize.gptq import gptq_weight
from pyrobust.quantize.hessian import CONVOLUTIONS
from pyrobust.quantize.qtensor import QTensor
from pyrobust.quantize.round_to_nearest import round_to_nearest

__all__ = ["AdaDim", "AdaDimChoice", "AdaDimReport"]

_GROUP_DIM = {"oc": 1, "ic": 0}


@dataclass(frozen=True)
class AdaDimChoice:
    """What was measured for one layer.

    Attributes:
        dim: ``"oc"`` or ``"ic"``, the direction chosen.
        loss_oc: mean squared change of the unit's output with groups along the inputs, as judged;
            None if it was no candidate.
        loss_ic: the same along the outputs.
        unit: name of the module whose output was compared.
    """

    dim: str
    loss_oc: float | None
    loss_ic: float | None
    unit: str


class AdaDimReport(Mapping[str, AdaDimChoice]):
    """The choice for each layer, by name, in the order the layers were taken."""

    def __init__(self, choices: Mapping[str, AdaDimChoice]) -> None:
        self._choices = dict(choices)

    def __getitem__(self, name: str) -> AdaDimChoice:
        return self._choices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return {name: asdict(choice) for name, choice in self._choices.items()}

    def summary(self) -> str:
        """One line per layer."""
        width = max((len(name) for name in self), default=0)
        lines = [
            f"{name:<{width}}  {choice.dim}  oc {_figure(choice.loss_oc)}  "
            f"ic {_figure(choice.loss_ic)}"
            for name, choice in self.items()
        ]
        return "\n".join(lines)

    __str__ = summary


class AdaDim:
    """Chooses the group direction of every layer; a quantizer of :func:`pyrobust.pack`.

    Within a block, layers are judged in the order they run; those chosen before stay quantized
    while later ones are judged.

    Args:
        method: ``"rtn"`` keeps the weights rounded to nearest; ``"gptq"`` chooses by them too, then
            runs :func:`~pyrobust.quantize.gptq` in that direction.
        bits: 2, 3, 4 or 8; for :meth:`quantize_` (:func:`pyrobust.pack` has its own).
        group_size: weights that share a scale; for :meth:`quantize_`.
        candidates: directions to choose from; of equal losses the first wins.
        propagate: ``"float"``, inputs from the float model throughout, as published; or
            ``"quantized"``, from the blocks and layers as already quantized.
        judge: ``"rtn"``, compare weights rounded to nearest, as published; or ``"method"``, compare
            what ``method`` makes of them, which runs GPTQ in each direction.
        damp: for GPTQ.
        act_order: for GPTQ.

    Attributes:
        choices: of the last conversion, by name of the layer. A conversion that was resumed tells
            only those it made itself.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        method: str = "rtn",
        bits: float = 3,
        group_size: int = 128,
        candidates: Sequence[str] = ("oc", "ic"),
        *,
        propagate: str = "float",
        judge: str = "rtn",
        damp: float = 0.01,
        act_order: bool = True,
    ) -> None:
        check_choice("AdaDim", "method", method, ("rtn", "gptq"))
        check_choice("AdaDim", "bits", bits, (2, 3, 4, 8))
        check_integer("AdaDim", "group_size", group_size, 1)
        if not candidates:
            raise ValueError("AdaDim: candidates must name at least one direction; got none.")
        for candidate in candidates:
            check_choice("AdaDim", "candidates", candidate, _GROUP_DIM)
        check_choice("AdaDim", "propagate", propagate, ("quantized", "float"))
        check_choice("AdaDim", "judge", judge, ("rtn", "method"))
        self.method = method
        self.bits = bits
        self.group_size = group_size
        self.candidates = tuple(candidates)
        self.propagate = propagate
        self.judge = judge
        self.damp = damp
        self.act_order = act_order
        self._choices: dict[str, AdaDimChoice] = {}
        self._last = -1

    @property
    def float_stream(self) -> bool:
        """Whether layers are judged on the float model's inputs."""
        return self.propagate == "float"

    @property
    def choices(self) -> AdaDimReport:
        """The choice for each layer."""
        return AdaDimReport(self._choices)

    def quantize_(
        self,
        model: nn.Module,
        calibration: Any,
        blocks: str | Sequence[str] | None = None,
        *,
        progress: bool = False,
    ) -> AdaDimReport:
        """Pack the layers inside the blocks of ``model``, in place; heads and embeddings stay.

        Args:
            model: in evaluation mode.
            calibration: batches of inputs, see :func:`pyrobust.pack`.
            blocks: see :func:`pyrobust.pack`.
            progress: show a progress bar.

        Returns:
            The choice and both losses for each layer.

        Raises:
            ValueError: as :func:`pyrobust.pack`; ``model`` is then as it was.
        """
        from pyrobust.nn.transposed_linear import as_linear
        from pyrobust.pack import pack  # both import this package

        calls = read_calibration("AdaDim", calibration, model)
        with torch.no_grad(), as_linear(model):
            layers = {
                name: module
                for name, module in model.named_modules()
                if type(module) in (nn.Linear, *CONVOLUTIONS)
            }
            layout = find_blocks("AdaDim", model, layers, calls[0], blocks)
        inside = {name for names in layout.inside.values() for name in names}
        pack(
            model,
            bits=self.bits,
            group_size=self.group_size,
            bits_for=lambda name, _: self.bits if name in inside else None,
            quantizer=self,
            calibration=[_as_batch(call) for call in calls],
            blocks=blocks,
            inplace=True,
            progress=progress,
        )
        return self.choices

    def quantize_block(self, block: CalibrationBlock) -> None:
        """Choose and install the layers of one block."""
        if block.index <= self._last:  # another conversion began
            self._choices = {}
        self._last = block.index
        stream = "float" if self.float_stream else "calls"
        units = _Units(block, stream)
        for group in block.groups():
            units.enter(group)
            hessians = block.hessians(group, stream=stream)
            for name in group:
                made = self._candidates(block, name, hessians[name])
                losses = self._losses(block, name, units, made)
                dim = min(self.candidates, key=lambda each: losses[each])
                self._choices[name] = AdaDimChoice(
                    dim, losses.get("oc"), losses.get("ic"), units.name
                )
                block.install(name, self._final(block, name, dim, made, hessians[name]))

    def _candidates(
        self, block: CalibrationBlock, name: str, hessian: Tensor
    ) -> dict[str, QTensor]:
        """What is judged: the weight in each direction."""
        method = self.method if self.judge == "method" else "rtn"
        return {dim: self._quantize(block, name, dim, method, hessian) for dim in self.candidates}

    def _final(
        self,
        block: CalibrationBlock,
        name: str,
        dim: str,
        made: dict[str, QTensor],
        hessian: Tensor,
    ) -> QTensor:
        if self.method == "rtn" or self.judge == "method":
            return made[dim]
        return self._quantize(block, name, dim, self.method, hessian)

    def _quantize(
        self, block: CalibrationBlock, name: str, dim: str, method: str, hessian: Tensor
    ) -> QTensor:
        weight, options = block.weight(name), {**block.formats[name]}
        options["group_dim"] = _GROUP_DIM[dim]
        if method == "rtn":
            return round_to_nearest(weight, **options)
        return gptq_weight(weight, hessian, **options, damp=self.damp, act_order=self.act_order)

    def _losses(
        self, block: CalibrationBlock, name: str, units: _Units, made: dict[str, QTensor]
    ) -> dict[str, float]:
        """Mean squared change of the unit's output for each candidate."""
        trials = {dim: each.dequantize() for dim, each in made.items()}
        sums, count = dict.fromkeys(trials, 0.0), 0
        for reference, run in units.calls():
            count += reference.numel()
            for dim, weight in trials.items():
                with block.trial(name, weight):
                    change = run().float() - reference
                sums[dim] += float(change.square().sum(dtype=torch.float64))
        return {dim: total / count for dim, total in sums.items()}


class _Units:
    """The module whose output is compared, and its calls, for the layers of one block in turn."""

    def __init__(self, block: CalibrationBlock, stream: str) -> None:
        self.block = block
        self.stream = stream
        self.module: nn.Module | None = None
        self.name = ""
        self._names = {module: name for name, module in block.module.named_modules()}
        self._calls: list[Call] = []

    def enter(self, group: tuple[str, ...]) -> None:
        """Take the unit of a group of layers that share their input."""
        module = self._unit_of(group)
        if module is not self.module:
            self._calls = self.block.calls_of(module, stream=self.stream)
            if not self._calls:  # a module that only holds others
                module = self.block.layers[group[0]]
                self._calls = self.block.calls_of(module, stream=self.stream)
        self.module = module
        self.name = ".".join(part for part in (self.block.name, self._names[module]) if part)

    def _unit_of(self, group: tuple[str, ...]) -> nn.Module:
        layer = self.block.layers[group[0]]
        parent = self._names[layer].rpartition(".")[0]
        around = self.block.module.get_submodule(parent) if self._names[layer] else layer
        if around is layer or self.block.name == "" == parent:
            return layer  # the block is the layer, or the whole model would be the unit
        order = list(self.block.layers)
        later = order[order.index(group[0]) + 1 :]
        inside = set(around.modules())
        return around if any(self.block.layers[name] in inside for name in later) else layer

    def calls(self) -> Iterator[tuple[Tensor, Any]]:
        """For each call: the output as it is now, in float32, and how to compute it again."""
        module = self.module
        assert module is not None
        with torch.no_grad():
            for call in self._calls:

                def run(call: Call = call) -> Tensor:
                    output = call.on(module)
                    if isinstance(output, Mapping):  # as Hugging Face models return
                        output = tuple(output.values())
                    compared: Tensor = first_output(output)
                    return compared

                yield run().float(), run


def _as_batch(call: Call) -> Any:
    return call.kwargs if call.kwargs else call.args[0]


def _figure(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3e}"
