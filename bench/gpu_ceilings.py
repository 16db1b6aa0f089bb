"""What the card and torch can do at best: the figures that all others are compared with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_timing import Clock, Row, copies_beyond_cache, seconds_of

__all__ = ["copy_bandwidth", "measure"]

_BYTES = 1 << 30
_SIZE = 8192


def copy_bandwidth() -> float:
    """Bytes a second, read and written together: the better of a copy and of an addition."""
    source = torch.empty(_BYTES // 4)
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.add(source, 1.0, out=target))
    return max(2 * _BYTES / seconds_of([way]) for way in ways)


def measure(clock: Clock) -> Iterator[Row]:
    """Copy, fill, matrix products and an empty launch."""
    part = "ceilings"
    yield Row(part, "copy of 1 GiB", copy_bandwidth() / 1e12, "TB/s")
    target = torch.empty(_BYTES // 4)
    fill = seconds_of([lambda: target.fill_(1.0)])
    yield Row(part, "fill_ of 1 GiB", _BYTES / fill / 1e12, "TB/s")
    one = torch.zeros(1)
    yield Row(part, "a launch in a graph", seconds_of([one.zero_] * 64) * 1e6, "us")
    size = _SIZE
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float64, "float64")):
        a = torch.randn(size, size).to(dtype)
        seconds = seconds_of([lambda a=a: a @ a])  # type: ignore[misc]
        yield Row(part, f"{name} product of {size}^3", 2 * size**3 / seconds / 1e12, "TFLOP/s")
    for rows in (1, 16, 64, 256):
        weights = [
            torch.randn(size, size).bfloat16() for _ in range(copies_beyond_cache(2 * size * size))
        ]
        x = torch.randn(rows, size).bfloat16()
        seconds = seconds_of([lambda w=w, x=x: x @ w.T for w in weights])  # type: ignore[misc]
        yield Row(part, f"bfloat16 {rows} x {size} by {size} x {size}", seconds * 1e6, "us")
        if clock.left() < 0:
            return
