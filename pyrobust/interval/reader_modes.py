"""Steps that were put off in plain eager mode run as in that mode, whatever the reader's is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes

from pyrobust.ops._library import dispatcher_watched

__all__ = ["reader_watches", "without_modes_of_reader"]


def reader_watches() -> bool:
    """Whether a transform, a tracer, a mode or inference mode would change what is made here."""
    return dispatcher_watched() or torch.is_inference_mode_enabled()


@contextmanager
def without_modes_of_reader(graded: bool = False) -> Iterator[None]:
    """As in plain eager mode with gradients on or off: the results outlive the reader's modes."""
    with torch.inference_mode(False), torch.set_grad_enabled(graded), ExitStack() as stack:
        if dispatcher_watched():
            stack.enter_context(torch._C._DisableFuncTorch())
            stack.enter_context(_disable_current_modes())
            stack.enter_context(_not_compiling())
        yield


@contextmanager
def _not_compiling() -> Iterator[None]:
    """Dynamo reads a box while it compiles, but what that carries out is not compiled."""
    flag = "_is_compiling_flag"  # a private name: without it, only errors are worded otherwise
    before = getattr(torch.compiler, flag, None)
    if not before:
        yield
        return
    setattr(torch.compiler, flag, False)
    try:
        yield
    finally:
        setattr(torch.compiler, flag, before)
