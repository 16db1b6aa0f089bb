"""PackedSequential: torch.nn.Sequential, but boxes pass runs of packed layers in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

from pyrobust import _native
from pyrobust.nn.packed_linear import PackedLinear
from pyrobust.ops._library import autocasting, dispatcher_watched, function_modes

__all__ = ["PackedSequential", "join_packed_layers"]

_native.set_chain_types(
    PackedLinear,
    nn.ReLU,
    [
        getattr(_torch_module, name)
        for name in (
            "_global_forward_hooks",
            "_global_forward_pre_hooks",
            "_global_backward_hooks",
            "_global_backward_pre_hooks",
        )
    ],
)


class PackedSequential(nn.Sequential):
    """``torch.nn.Sequential``, and what :func:`pyrobust.pack` makes of one with packed layers.

    Everything is as there, but that up to four boxes (:class:`pyrobust.Interval`) in plain eager
    inference pass a run of :class:`PackedLinear` and ``nn.ReLU`` in one native call, with the same
    ends as layer by layer. Modules with hooks, a ``forward`` of their own or another class are
    called one after another, and so are all under ``torch.compile``, in traces, in torch's function
    modes and where gradients are recorded.

    Example:
        >>> from pyrobust import Interval
        >>> layers = [PackedLinear(4, 4), nn.ReLU(), PackedLinear(4, 2)]
        >>> PackedSequential(*layers)(Interval(torch.zeros(1, 4), torch.ones(1, 4))).shape
        torch.Size([1, 2])
    """

    def forward(self, input: Any) -> Any:
        """The modules on ``input``, one after another."""
        if isinstance(input, Tensor) or _watched():
            return super().forward(input)  # type: ignore[no-untyped-call]
        modules, at = self._modules, 0
        threads, graded = torch.get_num_threads(), torch.is_grad_enabled()
        while at < len(modules):
            done = _native.box_chain(input, modules, at, threads, graded)
            if done is None:
                module: Any = self[at]
                done = module(input), at + 1
            input, at = done
        return input


def _watched() -> bool:
    """Whether something wants to see every call."""
    return dispatcher_watched() or function_modes() or autocasting()


def join_packed_layers(model: nn.Module) -> None:
    """Make each plain ``nn.Sequential`` in ``model`` with two packed layers a PackedSequential."""
    for module in model.modules():
        if type(module) is nn.Sequential:
            packed = sum(type(child) is PackedLinear for child in module)
            if packed >= 2:
                module.__class__ = PackedSequential
