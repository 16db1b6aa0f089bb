"""The machine's own limits, measured in the run that they judge; needs a C compiler."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

BEYOND_CACHE = 256 << 20
"""Bytes that no cache of a desktop or small server processor holds."""


@functools.cache
def _library() -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="limits-"))
    built = folder / "limits.so"
    source = Path(__file__).with_name("limits.c")
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, str(source), "-o", str(built)], check=True)
    library = ctypes.CDLL(str(built))
    library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.dot_products.argtypes = [ctypes.c_int64]
    library.dot_products.restype = ctypes.c_int64
    return library


def _fastest(call: Callable[[], object], threads: int, rounds: int) -> float:
    clock = time.thread_time if threads == 1 else time.perf_counter
    times = []
    for _ in range(rounds):
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)


@functools.cache
def buffer() -> torch.Tensor:
    """``BEYOND_CACHE`` bytes that have been written."""
    return torch.ones(BEYOND_CACHE, dtype=torch.uint8)


def empty_caches(threads: int) -> None:
    """Read so much else that nothing of a weight is left in a cache."""
    _library().read_all(buffer().data_ptr(), BEYOND_CACHE // 2, threads)


@functools.cache
def bandwidth(nbytes: int, threads: int) -> float:
    """Bytes a second that ``threads`` read of the same ``nbytes`` again and again."""
    nbytes = min(max(nbytes, 1 << 16), BEYOND_CACHE)
    read, rounds = _library().read_all, 300 if nbytes < BEYOND_CACHE else 12
    place = buffer().data_ptr() + -buffer().data_ptr() % 64
    nbytes -= nbytes % (512 * threads) + 64 * (nbytes == BEYOND_CACHE)
    return nbytes / _fastest(lambda: read(place, nbytes, threads), threads, rounds)


@functools.cache
def int8_rate() -> float:
    """8-bit multiplications and additions a second of one thread, from registers; 0: unknown."""
    products = _library().dot_products(1)
    if products == 0:
        return 0.0
    rounds = 20000
    return 2 * 64 * products * rounds / _fastest(lambda: _library().dot_products(rounds), 1, 30)
