"""The block-wise walk: quantize a model one block at a time, on inputs from the blocks before it.

The inputs of the first block are captured once; then each block is quantized on what the blocks
before it, as already quantized, make of the calibration data. In memory there are the model, the
float weights of one block a second time, and the hidden states between two blocks. Layers outside
of the blocks (patch embeddings, heads) are blocks of one layer each; embeddings, which have no
input to weigh, are rounded to nearest.

Source: the order of work is that of E. Frantar et al., "GPTQ", ICLR 2023, arXiv 2210.17323,
section 4 ("one transformer block at a time").
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyrobust._checks import check_choice, check_eval_mode
from pyrobust.quantize.block_layout import BlockLayout, Slot, find_blocks, first_output
from pyrobust.quantize.calibration import (
    CalibrationError,
    Call,
    StopForward,
    read_calibration,
    run_named,
)
from pyrobust.quantize.calibration_block import BlockQuantizer, CalibrationBlock, Quantized
from pyrobust.quantize.conversion_folder import ConversionFolder, describe_conversion
from pyrobust.quantize.round_to_nearest import round_to_nearest

__all__ = ["quantize_blockwise"]

_STREAMS = ("calls", "float")


def quantize_blockwise(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    formats: Mapping[str, Mapping[str, Any]],
    calibration: Any,
    quantizer: BlockQuantizer,
    *,
    blocks: str | Sequence[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
    subject: str = "pack",
) -> dict[str, Quantized]:
    """Quantize ``layers`` of ``model`` block by block; the model is left as it was.

    Args:
        model: in evaluation mode, with data.
        layers: ``Linear``, ``Conv1d``, ``Conv2d`` and ``Embedding`` layers by name, each weight
            once.
        formats: for each, ``bits``, ``group_size``, ``group_dim`` and ``symmetric``.
        calibration: see :func:`~pyrobust.quantize.calibration.read_calibration`.
        quantizer: see :class:`~pyrobust.quantize.calibration_block.BlockQuantizer`.
        blocks: see :func:`~pyrobust.quantize.block_layout.find_blocks`.
        resume: a folder for finished blocks. A conversion that was killed goes on from them and
            ends in the same bits (on the same number of threads).
        progress: show a progress bar.
        subject: who asks, for the errors.

    Returns:
        The result of each layer.

    Raises:
        TypeError: ``calibration`` is not an iterable of batches.
        ValueError: the calibration data is empty, not finite or does not fit the model; the model
            is in training mode; a layer never runs or has an input that is not finite; ``blocks``
            is not a chain; ``resume`` holds another conversion.
    """
    check_eval_mode(subject, model)
    check_choice(subject, "quantizer.propagate", quantizer.propagate, ("quantized", "float"))
    calls = read_calibration(subject, calibration, model)
    with _without_cache(model), torch.no_grad():
        calibrated = {n: each for n, each in layers.items() if not isinstance(each, nn.Embedding)}
        layout = find_blocks(subject, model, calibrated, calls[0], blocks)
        walk = _Walk(subject, model, dict(layers), formats, calls, quantizer, layout)
        if resume is not None:
            described = describe_conversion(quantizer, layers, formats, calls)
            walk.folder = ConversionFolder(subject, resume, described)
        with ExitStack() as stack:
            walk.stack = stack
            walk.bar = stack.enter_context(
                tqdm(total=len(layers), desc=subject, unit="layer", disable=not progress)
            )
            walk.survey()
            walk.run()
    return walk.results


@dataclass
class _Walk:
    """State of one conversion. Attributes after ``layout`` are filled in on the way."""

    subject: str
    model: nn.Module
    layers: dict[str, nn.Module]
    formats: Mapping[str, Mapping[str, Any]]
    data: list[Call]
    quantizer: BlockQuantizer
    layout: BlockLayout
    folder: ConversionFolder | None = None
    results: dict[str, Quantized] = field(default_factory=dict)
    once: frozenset[str] = frozenset()
    index: int = 0
    sides: dict[str, list[Call]] = field(default_factory=dict)
    hidden: dict[str, list[Tensor]] = field(default_factory=dict)
    tails: dict[str, list[Any]] = field(default_factory=dict)
    stack: ExitStack = field(default_factory=ExitStack)
    bar: Any = None

    @property
    def streams(self) -> tuple[str, ...]:
        """Which inputs are carried along: those the quantizer works on, and the float model's."""
        wants_float = self.quantizer.float_stream and self.quantizer.propagate != "float"
        return _STREAMS if wants_float else _STREAMS[:1]

    # -- before anything is changed ------------------------------------------------------------

    def survey(self) -> None:
        """Run the float model on all data: everything that can be refused is refused here."""
        watched = {n: m for n, m in self.layers.items() if not isinstance(m, nn.Embedding)}
        runs: dict[str, list[int]] = {name: [0] * len(self.data) for name in watched}
        handles = [
            layer.register_forward_pre_hook(self._counter(name, runs[name]), with_kwargs=True)
            for name, layer in watched.items()
        ]
        with _hooks(handles), self._block_hooks():
            for batch, call in enumerate(self.data):
                self._batch = batch
                run_named(self.subject, self.model, batch, call)
        never = next((name for name, counts in runs.items() if not any(counts)), None)
        if never is not None:
            raise ValueError(
                f"{self.subject}: every layer must run on the calibration data; '{never}' never "
                "runs (name it in skip to leave it in float)."
            )
        self.once = frozenset(n for n, counts in runs.items() if all(c == 1 for c in counts))

    def _counter(self, name: str, counts: list[int]) -> Any:
        def see(_: nn.Module, args: Any, kwargs: Any) -> None:
            counts[self._batch] += 1
            x = args[0] if args else kwargs.get("input")
            if isinstance(x, Tensor) and x.is_floating_point() and not _finite(x):
                raise CalibrationError(
                    f"{self.subject}: the input of '{name}' must be finite; on calibration batch "
                    f"{self._batch} it holds NaN or infinite values."
                )

        return see

    @contextmanager
    def _block_hooks(self) -> Iterator[None]:
        """Keep what the blocks are given: the hidden state of the first, all else of each."""
        if self.layout.whole:
            yield
            return
        first, slot = next(iter(self.layout.blocks)), self.layout.slot
        self.hidden["float"] = []

        def keep(name: str) -> Any:
            def see(_: nn.Module, args: Any, kwargs: Any) -> None:
                call = Call(tuple(args), dict(kwargs))
                if name == first:
                    self.hidden["float"].append(_read_slot(call, slot))
                self.sides.setdefault(name, []).append(_with_slot(call, slot, None))

            return see

        with _hooks(
            block.register_forward_pre_hook(keep(name), with_kwargs=True)
            for name, block in self.layout.blocks.items()
        ):
            yield

    # -- the walk ------------------------------------------------------------------------------

    def run(self) -> None:
        embeddings = [n for n, layer in self.layers.items() if isinstance(layer, nn.Embedding)]
        for name in embeddings:
            weight = self.layers[name].weight.detach()  # type: ignore[operator]
            self.results[name] = Quantized(round_to_nearest(weight, **self.formats[name]))
            self.bar.update()
        outside = self._outside(embeddings)
        for name in self.layout.before:
            self._outside_layer(name, outside)
        self._enter_blocks()
        for name, block in self.layout.blocks.items():
            self._block(name, block)
        for name in self.layout.after:
            self._outside_layer(name, outside)

    def _outside(self, embeddings: list[str]) -> CalibrationBlock:
        """Holds the results of layers outside of the blocks in the model until the end."""
        names = [*embeddings, *self.layout.before, *self.layout.after]
        outside = self._make("", self.model, names, [], None)
        self.stack.callback(outside.restore)
        if self.quantizer.propagate == "quantized":
            outside.take({name: self.results[name] for name in embeddings})
        return outside

    def _outside_layer(self, name: str, outside: CalibrationBlock) -> None:
        """A layer outside of the blocks is a block of its own."""
        layer = self.layers[name]
        calls = self._calls_of_layer(layer, "calls", outside)
        floats = self._calls_of_layer(layer, "float", outside) if len(self.streams) > 1 else None
        block = self._make(name, layer, [name], calls, floats)
        try:
            self._quantize(block)
        finally:
            block.restore()
        if self.quantizer.propagate == "quantized":
            outside.take(block.results)

    def _calls_of_layer(
        self, layer: nn.Module, stream: str, outside: CalibrationBlock
    ) -> list[Call]:
        """What ``layer`` is given when the model runs, its blocks replaced by their results."""
        seen: list[Call] = []

        def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append(Call(tuple(args), dict(kwargs)))

        with ExitStack() as stack:
            stack.enter_context(_hooks([layer.register_forward_pre_hook(keep, with_kwargs=True)]))
            if stream == "float":
                stack.enter_context(outside.as_float())
            current: list[int] = []
            if stream in self.tails:
                stack.enter_context(self._stand_ins(self.tails[stream], current))
            for batch, call in enumerate(self.data):
                current[:] = [batch]
                call.on(self.model)
        return seen

    @contextmanager
    def _stand_ins(self, tails: list[Any], current: list[int]) -> Iterator[None]:
        """Blocks that only pass on, and a last one that returns what the real one did."""
        slot, blocks = self.layout.slot, list(self.layout.blocks.values())

        def passes(*args: Any, **kwargs: Any) -> Any:
            hidden, tail = _read_slot(Call(args, kwargs), slot), tails[current[0]]
            if isinstance(tail, (tuple, list)):
                return type(tail)([hidden, *[None] * (len(tail) - 1)])
            return hidden

        def returns(*args: Any, **kwargs: Any) -> Any:
            return tails[current[0]]

        before = [block.__dict__.get("forward") for block in blocks]
        try:
            for block in blocks:
                block.__dict__["forward"] = returns if block is blocks[-1] else passes
            yield
        finally:
            for block, forward in zip(blocks, before, strict=True):
                if forward is None:
                    del block.__dict__["forward"]
                else:
                    block.__dict__["forward"] = forward

    def _enter_blocks(self) -> None:
        """The hidden states that the first block is given in each stream."""
        if self.layout.whole:
            return
        floats = self.hidden.pop("float")
        if len(self.streams) > 1:
            self.hidden["float"] = floats
        if self.quantizer.propagate == "float" or not self.results:
            self.hidden["calls"] = floats
            return
        first, hidden = next(iter(self.layout.blocks.values())), []
        slot = self.layout.slot

        def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
            hidden.append(_read_slot(Call(tuple(args), dict(kwargs)), slot))
            raise StopForward

        with _hooks([first.register_forward_pre_hook(keep, with_kwargs=True)]):
            for call in self.data:
                with suppress(StopForward):
                    call.on(self.model)
        self.hidden["calls"] = hidden

    def _block(self, name: str, module: nn.Module) -> None:
        names = self.layout.inside[name]
        more = len(self.streams) > 1
        if self.layout.whole:
            block = self._make(name, module, names, self.data, self.data if more else None)
        else:
            floats = self._calls_of_block(name, "float") if more else None
            block = self._make(name, module, names, self._calls_of_block(name, "calls"), floats)
        try:
            self._quantize(block)
            if not self.layout.whole:
                self._pass_on(block)
        finally:
            block.restore()

    def _pass_on(self, block: CalibrationBlock) -> None:
        """The outputs of ``block`` become the inputs of the next."""
        del self.sides[block.name]
        for stream in self.streams:
            as_float = stream == "calls" and self.quantizer.propagate == "float"
            with block.as_float() if as_float else ExitStack():
                outputs = list(block.outputs(stream=stream))
            self.hidden[stream] = [first_output(output) for output in outputs]
            if self.layout.after and block.name == list(self.layout.blocks)[-1]:
                self.tails[stream] = outputs

    def _calls_of_block(self, name: str, stream: str) -> list[Call]:
        return [
            _with_slot(side, self.layout.slot, hidden)
            for side, hidden in zip(self.sides[name], self.hidden[stream], strict=True)
        ]

    def _make(
        self,
        name: str,
        module: nn.Module,
        names: Sequence[str],
        calls: Sequence[Call],
        floats: Sequence[Call] | None,
    ) -> CalibrationBlock:
        layers = {each: self.layers[each] for each in names}
        if self.quantizer.propagate == "float" and self.quantizer.float_stream:
            floats = calls
        return CalibrationBlock(
            self.index, name, module, layers, self.formats, calls, floats, self.once
        )

    def _quantize(self, block: CalibrationBlock) -> None:
        """Results of one block: from the folder where it was finished before, else made now."""
        if block.layers:
            ready = None if self.folder is None else self.folder.load(self.index)
            if ready is not None:
                block.take(ready)
            else:
                self.quantizer.quantize_block(block)
            self._check_complete(block)
            if self.folder is not None and ready is None:
                self.folder.save(self.index, block.results)
        self.results.update(block.results)
        self.index += 1
        self.bar.update(len(block.layers))

    def _check_complete(self, block: CalibrationBlock) -> None:
        missing = [name for name in block.layers if name not in block.results]
        if missing:
            raise ValueError(
                f"{self.subject}: quantizer must install a result for every layer; "
                f"{type(self.quantizer).__name__} left out '{missing[0]}'."
            )


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _read_slot(call: Call, slot: Slot) -> Tensor:
    value: Tensor = call.args[slot] if isinstance(slot, int) else call.kwargs[slot]
    return value


def _with_slot(call: Call, slot: Slot, value: Any) -> Call:
    if isinstance(slot, int):
        return Call((*call.args[:slot], value, *call.args[slot + 1 :]), call.kwargs)
    return Call(call.args, {**call.kwargs, slot: value})


@contextmanager
def _hooks(handles: Any) -> Iterator[None]:
    """Remove the hooks behind ``handles`` at the end."""
    kept = list(handles)
    try:
        yield
    finally:
        for handle in kept:
            handle.remove()


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Keep Hugging Face models from filling a key-value cache, which a second run would extend."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    cached = [c for c in configs.values() if getattr(c, "use_cache", False)]
    try:
        for config in cached:
            config.use_cache = False
        yield
    finally:
        for config in cached:
            config.use_cache = True
