"""Whether calling a module does only what its class says."""

from __future__ import annotations

from torch import nn

__all__ = ["is_customised"]


def is_customised(module: nn.Module) -> bool:
    """Whether hooks or a replaced ``forward`` may change what a call of the module computes."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
