"""Derived tensors that outlive a call, used from streams other than the one that made them.

Kernels see addresses, so neither torch's caching allocator nor a second stream knows of their use
of a tensor that is kept here: a stream that finds such a tensor waits until it is made, and tells
the allocator, which then does not hand the memory out before the stream is done with it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["Made", "capturing", "made_now"]


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, whose memory is its own."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class Made:
    """The stream that made some tensors, the end of that work, and the streams that know of it."""

    def __init__(self, device: torch.device) -> None:
        stream = torch.cuda.current_stream(device)
        self._device = device
        self._end = torch.cuda.Event()
        self._end.record(stream)
        self._known = {stream.cuda_stream}

    def wait(self, tensors: Iterable[Tensor | None]) -> None:
        """Order the current stream of the tensors' device after their making."""
        stream = torch.cuda.current_stream(self._device)
        if stream.cuda_stream in self._known or torch.cuda.is_current_stream_capturing():
            return  # a capture begins synchronized
        self._end.wait(stream)
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(stream)
        self._known.add(stream.cuda_stream)


def made_now(example: Tensor) -> Made | None:
    """Of work that the current stream of ``example``'s device has been given up to now; None on a
    CPU, and within a capture.
    """
    return Made(example.device) if example.is_cuda and not capturing(example) else None
