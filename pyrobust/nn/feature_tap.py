"""FeatureTap: a model that also returns what some of its layers put out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["FeatureTap"]


class FeatureTap(nn.Module):
    """Wraps a model; the call returns its output and the outputs of named layers.

    Hooks live during the call only, so the wrapper can be copied, pickled and used from threads.

    Args:
        model: any module.
        layers: names of its submodules, as in ``named_modules``; each must run exactly once.

    Raises:
        ValueError: a name is not a submodule of ``model``, or no name is given.

    Example:
        >>> import torch
        >>> tap = FeatureTap(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), ["0"])
        >>> output, features = tap(torch.zeros(1, 2))
        >>> features[0].shape
        torch.Size([1, 3])
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        known = [name for name, _ in model.named_modules() if name]
        unknown = [name for name in layers if name not in known]
        if unknown or not layers:
            raise ValueError(
                f"FeatureTap: layers must be names of submodules; got {list(layers)}, known are "
                f"{', '.join(known)}."
            )
        self.model = model
        self.layers = tuple(layers)
        self.training = model.training

    def forward(self, x: Tensor) -> tuple[Any, list[Tensor]]:
        """The model's output, and the layers' outputs in the order of ``layers``."""
        seen: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        modules = dict(self.model.named_modules())
        handles = [
            modules[name].register_forward_hook(
                lambda module, inputs, output, name=name: seen[name].append(output)
            )
            for name in self.layers
        ]
        try:
            output = self.model(x)
        finally:
            for handle in handles:
                handle.remove()
        for name, values in seen.items():
            if len(values) != 1:
                raise ValueError(
                    f"FeatureTap: layer {name!r} must run once per call; got {len(values)} runs."
                )
        return output, [seen[name][0] for name in self.layers]

    def extra_repr(self) -> str:
        """The names of the layers."""
        return f"layers={self.layers}"
