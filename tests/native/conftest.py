"""What several tests of native code share."""

import ctypes
import mmap

import pytest
import torch


@pytest.fixture
def last_bytes():
    """A function that copies bytes to the end of pages behind which no byte may be read."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mprotect"):
        pytest.skip("no mprotect on this system")
    page, kept = mmap.PAGESIZE, []

    def place(value: torch.Tensor) -> torch.Tensor:
        size = value.numel()
        inside = -(-size // page) * page
        memory = mmap.mmap(-1, inside + page)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        end = whole.data_ptr() + inside
        kept.append((memory, whole, end))
        assert libc.mprotect(ctypes.c_void_p(end), page, 0) == 0  # neither read nor write
        return whole[inside - size : inside].view(value.shape).copy_(value)

    yield place
    for _, _, end in kept:
        libc.mprotect(ctypes.c_void_p(end), page, 3)
