"""CalibrationBlock: one block of a model, the inputs it was given, the layers to quantize in it.

This is what a block-wise quantizer works on. It offers the data (layer inputs, Hessians, outputs
of the block) and takes the results; running the model up to here is the walker's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from pyrobust._checks import check_choice, check_instance
from pyrobust.quantize.calibration import Call, StopForward
from pyrobust.quantize.hessian import HessianAccumulator, relative_output_error
from pyrobust.quantize.learned_activation import rounding_inputs
from pyrobust.quantize.qtensor import QTensor
from pyrobust.quantize.round_to_nearest import round_to_nearest

if TYPE_CHECKING:
    from pyrobust.nn.affine_rounding import AffineRounding

__all__ = ["BlockQuantizer", "CalibrationBlock", "Observer", "Quantized", "quantize_by_layer"]

Observer = Callable[[str, Tensor, Tensor], None]
"""``observer(layer name, its input, its output)``, called while a batch runs."""


@dataclass(frozen=True)
class Quantized:
    """What a quantizer made of one layer.

    Attributes:
        qtensor: the weight as rows and columns.
        bias: the new bias, or None to keep the old one.
        error_nearest: relative change of the layer's output, had the weight been rounded to
            nearest in the same format; None where it was not measured.
        error: the same for ``qtensor``.
        activation: the rounding of the layer's input, or None to leave that in float.
    """

    qtensor: QTensor
    bias: Tensor | None = None
    error_nearest: float | None = None
    error: float | None = None
    activation: AffineRounding | None = None


class BlockQuantizer(Protocol):
    """What ``pack`` asks of an object that quantizes block by block.

    ``propagate`` says ``"quantized"`` (a block's inputs come from the blocks before it as already
    quantized) or ``"float"``; ``float_stream`` asks to have the float model's inputs as well.
    A random choice must depend on the quantizer's own seed and on ``block.index`` alone, so that a
    resumed conversion makes the same one.
    """

    @property
    def propagate(self) -> str:
        """``"quantized"`` or ``"float"``."""

    @property
    def float_stream(self) -> bool:
        """Whether the float model's inputs are wanted as well."""

    def quantize_block(self, block: CalibrationBlock) -> None:
        """Call ``block.install`` once for every layer of ``block.layers``."""


class CalibrationBlock:
    """One block, its inputs and its layers.

    Attributes:
        index: position among the blocks of the conversion.
        name: of the module in the model; "" for the model itself.
        module: the block.
        layers: the layers to quantize by full name, in the order they run: ``Linear``,
            ``Conv1d``, ``Conv2d``.
        formats: for each, ``bits``, ``group_size``, ``group_dim`` and ``symmetric`` as asked for.
        calls: the arguments of the block, one call a batch (or more), in the stream that the
            quantizer propagates.
        float_calls: those of the float model, or None when the quantizer did not ask for them.
        results: what was installed so far.
    """

    def __init__(
        self,
        index: int,
        name: str,
        module: nn.Module,
        layers: Mapping[str, nn.Module],
        formats: Mapping[str, Mapping[str, Any]],
        calls: Sequence[Call],
        float_calls: Sequence[Call] | None,
        once: frozenset[str],
    ) -> None:
        self.index = index
        self.name = name
        self.module = module
        self.layers = dict(layers)
        self.formats = {each: dict(formats[each]) for each in layers}
        self.calls = list(calls)
        self.float_calls = None if float_calls is None else list(float_calls)
        self.results: dict[str, Quantized] = {}
        self._once = once
        self._float = {each: _parameter(layer, "weight").data for each, layer in layers.items()}
        self._bias: dict[str, Tensor] = {}
        self._hessians: dict[str, Tensor] = {}
        self._rounding: dict[str, ExitStack] = {}
        self._rounds = True

    # -- weights -------------------------------------------------------------------------------

    def weight(self, name: str) -> Tensor:
        """The float weight of a layer as rows and columns."""
        return self._float[name].flatten(1)

    def install(
        self,
        name: str,
        qtensor: QTensor,
        bias: Tensor | None = None,
        activation: AffineRounding | None = None,
    ) -> None:
        """Make ``qtensor`` the result of a layer; the block computes with it from now on.

        Args:
            name: of the layer.
            qtensor: its weight, rows and columns.
            bias: its new bias, or None to keep it.
            activation: the rounding of its input, or None.
        """
        check_instance("install", "qtensor", qtensor, QTensor)
        nearest = error = None
        hessian = self._hessians.pop(name, None)
        if hessian is not None:
            plain = round_to_nearest(self.weight(name), **self.formats[name])
            nearest = relative_output_error(hessian, self.weight(name), plain.dequantize())
            error = relative_output_error(hessian, self.weight(name), qtensor.dequantize())
        self.take({name: Quantized(qtensor, bias, nearest, error, activation)})

    def take(self, results: Mapping[str, Quantized]) -> None:
        """Install results that were computed before."""
        for name, result in results.items():
            self.results[name] = result
            self._put(name, result.qtensor.dequantize(), result.bias)
            self._round_input(name, result.activation)

    def _put(self, name: str, weight: Tensor, bias: Tensor | None = None) -> None:
        old = self._float[name]
        layer = self.layers[name]
        _parameter(layer, "weight").data = weight.reshape(old.shape).to(old)
        if bias is not None:
            parameter = _parameter(layer, "bias")
            self._bias.setdefault(name, parameter.data)
            parameter.data = bias.detach().to(self._bias[name])

    def _round_input(self, name: str, activation: AffineRounding | None) -> None:
        if name in self._rounding:
            self._rounding.pop(name).close()
        if activation is None:
            return

        def rounding(x: Tensor) -> Tensor:
            return cast(Tensor, activation(x)) if self._rounds else x

        self._rounding[name] = ExitStack()
        self._rounding[name].enter_context(rounding_inputs(self.layers, {name: rounding}))

    def restore(self) -> None:
        """Put the float weights back."""
        for name in list(self._rounding):
            self._round_input(name, None)
        self._restore_parameters()

    def _restore_parameters(self) -> None:
        for name, layer in self.layers.items():
            _parameter(layer, "weight").data = self._float[name]
            if name in self._bias:
                _parameter(layer, "bias").data = self._bias[name]

    @contextmanager
    def trial(self, name: str, weight: Tensor) -> Iterator[None]:
        """Compute with ``weight`` (rows and columns) in one layer for a while."""
        before = _parameter(self.layers[name], "weight").data
        self._put(name, weight)
        try:
            yield
        finally:
            _parameter(self.layers[name], "weight").data = before

    @contextmanager
    def as_float(self) -> Iterator[None]:
        """Compute with the float weights for a while."""
        names = [*self.layers]
        parameters = [_parameter(self.layers[name], "weight") for name in names]
        parameters += [_parameter(self.layers[name], "bias") for name in self._bias]
        now = [parameter.data for parameter in parameters]
        self._restore_parameters()
        self._rounds = False
        try:
            yield
        finally:
            self._rounds = True
            for parameter, value in zip(parameters, now, strict=True):
                parameter.data = value

    # -- data ----------------------------------------------------------------------------------

    def outputs(self, *, stream: str = "calls") -> Iterator[Any]:
        """What the block returns, batch by batch, with the weights that are in it now.

        Args:
            stream: ``"calls"``, or ``"float"`` for the float model's inputs and weights.
        """
        with torch.no_grad():
            if stream == "calls":
                for call in self.calls:
                    yield call.on(self.module)
                return
            calls = self._calls_of(stream)
            for call in calls:
                with self.as_float():
                    output = call.on(self.module)
                yield output

    def observe(self, names: Sequence[str], observer: Observer, *, stream: str = "calls") -> None:
        """Run the block on its inputs and show the calls of some layers.

        A run ends early, where the last of them has been seen.

        Args:
            names: of the layers.
            observer: called with name, input and output, under ``torch.no_grad``.
            stream: as for :meth:`outputs`.
        """
        calls = self._calls_of(stream)
        early = all(name in self._once for name in names)
        waiting: set[str] = set()

        def hook(name: str) -> Callable[..., None]:
            def see(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                observer(name, args[0] if args else kwargs["input"], output)
                waiting.discard(name)
                if early and not waiting:
                    raise StopForward

            return see

        handles = [
            self.layers[name].register_forward_hook(hook(name), with_kwargs=True) for name in names
        ]
        try:
            with torch.no_grad():
                for call in calls:
                    waiting.update(names)
                    try:
                        if stream == "float":
                            with self.as_float():
                                call.on(self.module)
                        else:
                            call.on(self.module)
                    except StopForward:
                        pass
        finally:
            for handle in handles:
                handle.remove()

    def calls_of(self, module: nn.Module, *, stream: str = "calls") -> list[Call]:
        """The arguments that a module inside the block is given, call by call.

        Args:
            module: the block itself or a module in it.
            stream: as for :meth:`outputs`.
        """
        if module is self.module:
            return list(self._calls_of(stream))
        seen: list[Call] = []

        def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append(Call(tuple(args), dict(kwargs)))

        handle = module.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            for _ in self.outputs(stream=stream):
                pass
        finally:
            handle.remove()
        return seen

    def _calls_of(self, stream: str) -> Sequence[Call]:
        check_choice("CalibrationBlock", "stream", stream, ("calls", "float"))
        if stream == "calls":
            return self.calls
        if self.float_calls is None:
            raise ValueError(
                "CalibrationBlock: stream must be 'calls' for a quantizer without float_stream; "
                "got 'float'."
            )
        return self.float_calls

    def groups(self) -> list[tuple[str, ...]]:
        """Layers in the order they run; those of one tuple are given the same input tensor."""
        seen: dict[str, Tensor] = {}

        def see(name: str, x: Tensor, _: Tensor) -> None:
            seen.setdefault(name, x)

        everything, self.calls = self.calls, self.calls[:1]
        try:
            self.observe(list(self.layers), see)
        finally:
            self.calls = everything
        groups: list[list[str]] = []
        for name in self.layers:  # layers that the first batch does not reach stand alone
            previous = groups[-1][0] if groups else None
            if previous in seen and name in seen and _same_columns(self, previous, name, seen):
                groups[-1].append(name)
            else:
                groups.append([name])
        return [tuple(group) for group in groups]

    def hessians(self, names: Sequence[str], *, stream: str = "calls") -> dict[str, Tensor]:
        """The Hessian of each layer's inputs; ``names`` must be one tuple of :meth:`groups`.

        The layers share one tensor. It is kept until their results are installed, which then tell
        the errors of their outputs.

        Args:
            names: of the layers.
            stream: as for :meth:`outputs`.

        Raises:
            ValueError: an input holds NaN or infinite values, or a layer never runs.
        """
        first = names[0]
        accumulator = HessianAccumulator.of(self.layers[first])

        def see(_: str, x: Tensor, __: Tensor) -> None:
            try:
                accumulator.add_inputs(self.layers[first], x)
            except ValueError as error:
                raise ValueError(f"the input of '{first}': {error}") from error

        self.observe([first], see, stream=stream)
        if accumulator.count == 0:
            raise ValueError(f"'{first}' never runs on the calibration data.")
        hessian = accumulator.hessian()
        self._hessians.update(dict.fromkeys(names, hessian))
        return dict.fromkeys(names, hessian)


def quantize_by_layer(block: CalibrationBlock, quantize: Callable[[str, Tensor], QTensor]) -> None:
    """Install ``quantize(name, hessian)`` for the layers of a block, in the order they run.

    Hessians are those of the block as quantized so far: the input of a layer comes through the
    layers before it as they will be.
    """
    for group in block.groups():
        hessians = block.hessians(group)
        for name in group:
            block.install(name, quantize(name, hessians[name]))


def _same_columns(
    block: CalibrationBlock, first: str, second: str, seen: Mapping[str, Tensor]
) -> bool:
    """Whether two layers multiply the same rows: one input tensor, both linear."""
    kinds = {type(block.layers[first]), type(block.layers[second])}
    return seen[first] is seen[second] and kinds == {nn.Linear}


def _parameter(layer: nn.Module, name: str) -> nn.Parameter:
    return cast(nn.Parameter, getattr(layer, name))
