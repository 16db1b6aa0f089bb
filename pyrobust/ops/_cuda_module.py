"""Where the CUDA kernels are found, and what every launch needs besides its data.

The kernels of ``pyrobust._cuda`` take raw pointers and the caller's stream. They never wait and
allocate nothing; outputs and scratch come from torch's allocator here, so calls can be captured in
CUDA graphs.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["FLOAT_CODES", "cuda_module", "has_cuda_module", "has_large_blocks", "where"]

FLOAT_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # core/float_types.h


@cache
def _load() -> Any:
    try:
        return importlib.import_module("pyrobust._cuda")
    except ImportError:
        return None


def has_cuda_module() -> bool:
    """Whether ``pyrobust._cuda`` is built here."""
    return _load() is not None


def cuda_module(subject: str) -> Any:
    """``pyrobust._cuda``; raises RuntimeError, with what to do, where it is not built."""
    module = _load()
    if module is None:
        raise RuntimeError(
            f"{subject}: pyrobust._cuda is not built here, so CUDA tensors cannot be used; build "
            "with nvcc on PATH (PYROBUST_CUDA=ON pip install .), or pass .cpu() tensors."
        )
    return module


def has_large_blocks(tensor: Tensor) -> bool:
    """Whether a thread block of the tensor's device may have the shared memory that fused products
    want: 163 KB, which compute capability 8.6, 8.9 and 12.0 do not have.
    """
    return bool(cuda_module("pyrobust").large_blocks(where(tensor)[0]))


def where(tensor: Tensor) -> tuple[int, int]:
    """Device index of ``tensor`` and the current stream there."""
    if not tensor.is_cuda:  # the emulation of the tests
        return 0, 0
    return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream
