"""Where a model's blocks are: the chain of modules that a block-wise conversion goes along.

Found by running one batch: a container counts when each of its modules is called once and is given
what the one before it returned. So any causal language model or vision transformer is recognised
by what it does, not by its class; a model without such a chain is one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pyrobust.quantize.calibration import Call, run_named

__all__ = ["BlockLayout", "Slot", "find_blocks", "first_output"]

Slot = int | str
"""Position or keyword of the argument that carries the hidden state from block to block."""


@dataclass(frozen=True)
class BlockLayout:
    """The order in which a conversion meets the layers of a model.

    Attributes:
        blocks: modules by name, in the order they run; one entry named "" is the whole model.
        slot: which argument of a block is the output of the one before it.
        inside: for each block, the names of its layers in the order they run.
        before: layers outside of the blocks that run before the first, in order.
        after: layers outside that run after the last, in order.
    """

    blocks: dict[str, nn.Module]
    slot: Slot
    inside: dict[str, list[str]]
    before: list[str]
    after: list[str]

    @property
    def whole(self) -> bool:
        """Whether the model is one block."""
        return "" in self.blocks


@dataclass
class _Chain:
    """What was seen of one container while a batch ran."""

    names: list[str]
    modules: list[nn.Module]
    steps: list[tuple[int, int]] = field(default_factory=list)
    slot: Slot | None = None
    broken: str | None = None
    output: Any = None
    begun: list[int] = field(default_factory=list)

    def enter(self, index: int, args: Any, kwargs: Any, step: int) -> None:
        if index != len(self.steps) or self.begun:
            self._break(f"'{self.names[index]}' does not run once and in order")
        if index > 0 and self.broken is None:
            values = [*enumerate(args), *kwargs.items()]
            slot = next((key for key, value in values if value is self.output), None)
            if slot is None or (self.slot is not None and slot != self.slot):
                self._break(f"'{self.names[index]}' is not given what the one before returns")
            self.slot = slot
        self.begun.append(step)

    def leave(self, output: Any, step: int) -> None:
        self.output = first_output(output)
        if not isinstance(self.output, Tensor):
            self._break("an output does not begin with a tensor")
        self.steps.append((self.begun.pop() if self.begun else step, step))

    def _break(self, reason: str) -> None:
        self.broken = self.broken or reason

    def finish(self) -> None:
        self.output = None
        if len(self.steps) != len(self.modules):
            self._break(f"{len(self.steps)} of {len(self.modules)} modules ran")


def first_output(output: Any) -> Any:
    """The hidden state in what a block returns: itself, or the first of a tuple or list."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def find_blocks(
    subject: str,
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    call: Call,
    blocks: str | Sequence[str] | None,
) -> BlockLayout:
    """Run one batch and tell the layout.

    Args:
        subject: who asks, for the errors.
        model: in evaluation mode.
        layers: the layers to convert by name.
        call: one calibration batch.
        blocks: name of the container of the blocks, or the names of the blocks in order; None
            takes the longest ``ModuleList`` that is a chain, else the longest such ``Sequential``
            that holds at least half of the layers, else the whole model.

    Raises:
        ValueError: ``blocks`` names no modules, or modules that are not a chain; or the batch does
            not fit the model.
    """
    chains = [_named_chain(subject, model, blocks)] if blocks is not None else _candidates(model)
    order = _watch(subject, model, layers, call, chains)
    if blocks is not None and chains[0].broken is not None:
        raise ValueError(
            f"{subject}: blocks must be modules that each take the output of the one before; "
            f"{chains[0].broken}."
        )
    for chain in chains:
        layout = None if chain.broken else _layout(chain, layers, order)
        if layout is None:
            continue
        enough = sum(map(len, layout.inside.values())) * 2 >= len(layers)
        if blocks is not None or enough:
            return layout
    if blocks is not None:
        raise ValueError(
            f"{subject}: blocks must leave no layer to convert that runs between them; it does."
        )
    return BlockLayout({"": model}, 0, {"": _by_order(list(layers), order)}, [], [])


def _named_chain(subject: str, model: nn.Module, blocks: str | Sequence[str]) -> _Chain:
    modules = dict(model.named_modules())
    names = [blocks] if isinstance(blocks, str) else list(blocks)
    missing = next((name for name in names if name not in modules or not name), None)
    if missing is not None or not names:
        raise ValueError(f"{subject}: blocks must name modules of the model; got {blocks!r}.")
    if isinstance(blocks, str):
        names = [f"{blocks}.{child}" for child, _ in modules[blocks].named_children()]
        if not names:
            raise ValueError(f"{subject}: blocks must name a container; '{blocks}' is empty.")
    return _Chain(names, [modules[name] for name in names])


def _candidates(model: nn.Module) -> list[_Chain]:
    """Containers in the order of preference."""
    found: list[tuple[bool, int, _Chain]] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 0:
            prefix = f"{name}." if name else ""
            chain = _Chain([f"{prefix}{child}" for child in module._modules], list(module))
            found.append((isinstance(module, nn.Sequential), -len(module), chain))
    return [chain for _, _, chain in sorted(found, key=lambda each: each[:2])]


def _watch(
    subject: str,
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    call: Call,
    chains: list[_Chain],
) -> dict[str, int]:
    """Fill in ``chains``; returns when each layer first ran, counted in events."""
    order: dict[str, int] = {}
    clock = iter(range(1 << 62))
    handles = []

    def saw(name: str) -> Any:
        def see(*_: Any) -> None:
            order.setdefault(name, next(clock))

        return see

    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(saw(name)))
    for chain in chains:
        for index, module in enumerate(chain.modules):
            handles += _watch_module(chain, index, module, clock)
    try:
        run_named(subject, model, 0, call)
    finally:
        for handle in handles:
            handle.remove()
    for chain in chains:
        chain.finish()
    return order


def _watch_module(
    chain: _Chain, index: int, module: nn.Module, clock: Iterator[int]
) -> tuple[Any, Any]:
    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        chain.enter(index, args, kwargs, next(clock))

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        chain.leave(output, next(clock))

    # Entered before, and left after, the layer that a block may itself be.
    first = module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    return first, module.register_forward_hook(leave)


def _layout(
    chain: _Chain, layers: Mapping[str, nn.Module], order: dict[str, int]
) -> BlockLayout | None:
    """The layout along ``chain``; None where a layer runs between its blocks."""
    owner: dict[nn.Module, str] = {}
    for name, block in zip(chain.names, chain.modules, strict=True):
        owner.update(dict.fromkeys(block.modules(), name))
    inside: dict[str, list[str]] = {name: [] for name in chain.names}
    before, after = [], []
    begin, end = chain.steps[0][0], chain.steps[-1][1]
    for name in _by_order(list(layers), order):
        when = order.get(name)
        if layers[name] in owner:
            inside[owner[layers[name]]].append(name)
        elif when is None or when > end:
            after.append(name)
        elif when < begin:
            before.append(name)
        else:
            return None
    slot = 0 if chain.slot is None else chain.slot
    blocks = dict(zip(chain.names, chain.modules, strict=True))
    return BlockLayout(blocks, slot, inside, before, after)


def _by_order(names: list[str], order: dict[str, int]) -> list[str]:
    return sorted(names, key=lambda name: order.get(name, 1 << 62))
