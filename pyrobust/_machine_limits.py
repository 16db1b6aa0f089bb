"""What this machine can do at most, measured in the run that it judges.

Reading is timed over a buffer that has the size of what is to be judged, again and again, so that
the caches serve it as they would serve that. 8-bit products are timed from registers, those with
one bit also as look-ups of sums of five.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pyrobust import _native

BEYOND_CACHE = 256 << 20
"""Bytes that no cache of a desktop or small server processor holds."""

_PRODUCT_ROUNDS = 20000


@functools.cache
def buffer() -> Tensor:
    """``BEYOND_CACHE`` bytes that have been written, as int64, from a border of 64 bytes on."""
    return torch.ones(BEYOND_CACHE // 8, dtype=torch.int64)


@functools.cache
def bandwidth(nbytes: int, threads: int) -> float:
    """Bytes a second that ``threads`` threads read of the same ``nbytes`` again and again."""
    nbytes = min(max(nbytes, 1 << 16), BEYOND_CACHE)
    nbytes -= nbytes % (512 * threads)
    rounds = 300 if nbytes < BEYOND_CACHE // 2 else 12
    data = buffer()[: nbytes // 8]
    return nbytes / _fastest(lambda: _native.read_words(data, threads), threads, rounds)


@functools.cache
def product_rate(bits: float = 8) -> float:
    """8-bit multiplications and additions a second of one thread; 0: unknown on this processor.

    Known where AVX-512 VNNI is the fastest way: tiles (AMX) do more, and have no rate here. With
    weights of one bit it is the rate of sums looked up where these are faster.
    """
    if "amx" in _native.supported_isas():
        return 0.0
    if bits == 1:
        return max(product_rate(), _rate(_native.look_words_up))
    return _rate(_native.multiply_bytes)


def _rate(multiply: Callable[[int], int]) -> float:
    operations = 2 * multiply(1)
    if operations == 0:
        return 0.0
    seconds = _fastest(lambda: multiply(_PRODUCT_ROUNDS), 1, 30)
    return operations * _PRODUCT_ROUNDS / seconds


def least_seconds(
    nbytes: int, operations: int, threads: int, *, bits: float = 8, size: int | None = None
) -> float:
    """Seconds to read ``nbytes`` or to do 8-bit ``operations``, whichever takes longer.

    Args:
        nbytes: to be read.
        operations: multiplications and additions; free where their rate is unknown.
        threads: at work.
        bits: of the weights; what is not 1 has the rate of 8.
        size: bytes over which reading is timed; None for ``nbytes``.

    Returns:
        Seconds, for a product that neither unpacks nor scales.
    """
    reading = nbytes / bandwidth(nbytes if size is None else size, threads)
    rate = threads * product_rate(bits)
    return max(reading, operations / rate if rate else 0.0)


def _fastest(call: Callable[[], object], threads: int, rounds: int) -> float:
    clock = time.thread_time if threads == 1 else time.perf_counter
    best = float("inf")
    for _ in range(rounds):
        start = clock()
        call()
        best = min(best, clock() - start)
    return best
