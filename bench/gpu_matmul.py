"""The packed product on a GPU against torch's bfloat16 product, the floor and peers.

The floor of a shape is the largest of bytes over a measured copy rate, tensor core work and
decoding work (instructions a weight from the compile gates). Peers: gpu_peers.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from gpu_ceilings import copy_bandwidth
from gpu_peers import PEERS, Peer
from gpu_timing import Clock, Row, copies_beyond_cache, no_time, seconds_of

from pyrobust import ops
from pyrobust.ops import _cuda_matmul
from pyrobust.ops.formats import levels_of, row_bytes

__all__ = ["measure"]

_PART = "matmul"
_SIZE = 8192
_GROUP = 128
_WIDTHS: tuple[float, ...] = (4, 2, 1.58, 3, 8, 1)
_STORED = {1: 1, 1.58: 2, 2: 2, 3: 3, 4: 4, 8: 8}
# Of at most 16 rows: times torch bf16 (must, lead) and share of the floor (must, lead).
_FEW = {
    8: (1.5, 1.75, 0.70, 0.80),
    4: (2.5, 3.2, 0.60, 0.75),
    3: (3.0, 4.0, 0.55, 0.70),
    2: (4.0, 5.4, 0.50, 0.65),
    1.58: (4.0, 5.4, 0.50, 0.65),
    1: (4.5, 6.5, 0.40, 0.50),
}
_MANY = {256: (0.5, 0.9), 1024: (0.8, 0.9), 4096: (0.93, 0.9)}
_PEER_ROWS = (1, 16, 64, 256)
_SWITCH_ROWS = (64, 128, 256, 512)
# Instructions a weight of decoding for float16, all of the integer pipe, which takes one where two
# are issued (tests/native/test_cuda_matmul_gates.py).
_DECODING = {8: 0.50, 4: 0.63, 3: 0.75, 2: 0.56, 1.58: 0.56, 1: 0.53}
_CLOCK = 1.83e9  # Hz under load, of an H200
_TENSOR = 490e12  # operations a second that mma.sync reaches at best there


def measure(clock: Clock) -> Iterator[Row]:
    """Few rows at every width, 64 rows, many rows, the switch, other groups, peers."""
    copy_rate = copy_bandwidth()
    for count in (1, 8, 16, 32, 64):
        dense = math.nan if clock.left() < 3 else _dense(count, torch.bfloat16)
        for bits in _WIDTHS:
            yield from _fused(clock, count, bits, dense, copy_rate)
    yield from _many(clock)
    yield from _peers(clock)
    yield from _groups(clock)
    yield from _switch(clock)


def _dense(count: int, dtype: torch.dtype, size: int = _SIZE) -> float:
    x = torch.randn(count, size, dtype=dtype)
    copies = copies_beyond_cache(2 * size * size)
    weights = [torch.randn(size, size, dtype=dtype) for _ in range(copies)]
    return seconds_of([lambda w=w: F.linear(x, w) for w in weights])


def _product(
    count: int,
    bits: float,
    dtype: torch.dtype,
    *,
    group_size: int = _GROUP,
    group_dim: int = 1,
    zero: bool = False,
) -> float:
    grouped = (_SIZE, -(-_SIZE // group_size))
    grouped = grouped if group_dim == 1 else grouped[::-1]
    x = torch.randn(count, _SIZE, dtype=dtype)
    calls: list[Callable[[], object]] = []
    for _ in range(copies_beyond_cache(_SIZE * _SIZE * _STORED[bits] // 8)):
        # Any bytes are codes; of ternary ones those below 3^5.
        most = 243 if bits == 1.58 else 256
        packed = torch.randint(0, most, (_SIZE, row_bytes(_SIZE, bits)), dtype=torch.uint8)
        scale = (torch.rand(grouped) / 64 + 1e-3).half()
        zeros = torch.randint(0, levels_of(bits), grouped, dtype=torch.uint8) if zero else None
        form = {"in_features": _SIZE, "bits": bits, "group_size": group_size}
        form["group_dim"] = group_dim
        calls.append(lambda c=packed, s=scale, z=zeros, f=form: ops.packed_linear(x, c, s, z, **f))
    with torch.no_grad():
        for call in calls:  # repacking is no part of a product
            call()
        return seconds_of(calls)


def _floor(count: int, bits: float, copy_rate: float) -> float:
    weights = _SIZE * _SIZE
    nbytes = weights * (_STORED[bits] + 16 / _GROUP) / 8 + 4 * count * _SIZE
    issue = max(2 * _DECODING[bits], _DECODING[bits] + -(-count // 8) / 8)
    lanes = _cuda_matmul.multiprocessors(torch.empty(0)) * 128 * _CLOCK
    return max(nbytes / copy_rate, 2 * count * weights / _TENSOR, weights * issue / lanes)


def _fused(clock: Clock, count: int, bits: float, dense: float, copy_rate: float) -> Iterator[Row]:
    what = f"{bits} bits, M = {count}, {_SIZE} x {_SIZE}, group {_GROUP}, float16"
    if clock.left() < 3:
        yield no_time(_PART, what)
        return
    seconds = _product(count, bits, torch.float16)
    floor = _floor(count, bits, copy_rate)
    detail = f"{seconds * 1e6:.1f} us, bf16 {dense * 1e6:.1f}, floor {floor * 1e6:.1f}"
    if count <= 16:
        must, lead, share, best = _FEW[bits]
        yield Row(_PART, what, dense / seconds, "x torch bf16", must, lead, detail)
        yield Row(_PART, what, floor / seconds, "of the floor", share, best, detail)
        return
    rate = 2 * count * _SIZE * _SIZE / seconds / 1e12
    targets = (300.0, 370.0) if bits <= 4 else (None, None)
    yield Row(_PART, what, rate, "TFLOP/s", *targets, detail)


def _many(clock: Clock) -> Iterator[Row]:
    for count, (must, lead) in _MANY.items():
        dense = math.nan if clock.left() < 3 else _dense(count, torch.bfloat16)
        for bits in (4, 2):
            path = "rounded" if count <= _cuda_matmul.ROUNDED_ROWS else "decoded"
            what, target = f"{bits} bits, M = {count}, {path}", (must, max(lead, must))
            if clock.left() < 3:
                yield no_time(_PART, what, "x torch bf16", *target)
                continue
            seconds = _product(count, bits, torch.bfloat16)
            detail = f"{seconds * 1e6:.0f} us, bf16 {dense * 1e6:.0f}"
            yield Row(_PART, what, dense / seconds, "x torch bf16", *target, detail)


def _switch(clock: Clock) -> Iterator[Row]:
    """All paths on either side of the switches: what FUSED_ROWS and ROUNDED_ROWS should say."""
    fused_rows, rounded_rows = dict(_cuda_matmul.FUSED_ROWS), _cuda_matmul.ROUNDED_ROWS
    try:
        for bits in (8, 4, 2, 1):
            for count in _SWITCH_ROWS:
                what = f"{bits} bits, M = {count}, switches now {fused_rows[bits]}, {rounded_rows}"
                if clock.left() < 3:
                    yield no_time(_PART, what, "x the decoded path")
                    continue
                times = {"fused": _by_path(bits, count, 1 << 30, 0)}
                if count > 64:
                    times["rounded"] = _by_path(bits, count, 0, 1 << 30)
                decoded = _by_path(bits, count, 0, 0)
                detail = ", ".join(f"{name} {time * 1e6:.0f} us" for name, time in times.items())
                detail += f", decoded {decoded * 1e6:.0f}"
                best = decoded / min(times.values())
                yield Row(_PART, what, best, "x the decoded path", detail=detail)
    finally:
        _cuda_matmul.FUSED_ROWS.update(fused_rows)
        _cuda_matmul.ROUNDED_ROWS = rounded_rows


def _by_path(bits: float, count: int, fused: int, rounded: int) -> float:
    """Seconds where fused and rounding kernels serve up to so many rows of x."""
    _cuda_matmul.FUSED_ROWS[bits], _cuda_matmul.ROUNDED_ROWS = fused, rounded
    return _product(count, bits, torch.float16)


def _groups(clock: Clock) -> Iterator[Row]:
    """What other groups, directions and types cost at 4 bits."""
    base = math.nan if clock.left() < 3 else _product(16, 4, torch.float16)
    for what, options, dtype in (
        ("group 32", {"group_size": 32}, torch.float16),
        ("one scale a row", {"group_size": _SIZE}, torch.float16),
        ("zero-points", {"zero": True}, torch.float16),
        ("group_dim 0", {"group_dim": 0}, torch.float16),
        ("bfloat16", {}, torch.bfloat16),
        ("float32", {}, torch.float32),
    ):
        cell = f"4 bits, M = 16, {what}"
        if clock.left() < 3:
            yield no_time(_PART, cell, "x group 128")
            continue
        seconds = _product(16, 4, dtype, **options)
        detail = f"{seconds * 1e6:.1f} us, base {base * 1e6:.1f}"
        yield Row(_PART, cell, base / seconds, "x group 128", detail=detail)


def _peers(clock: Clock) -> Iterator[Row]:
    """Every peer that is installed, at the bits and types that it has; others are named."""
    best: dict[tuple[float, int], tuple[float, str]] = {}
    for name, build in PEERS.items():
        dtype = torch.bfloat16 if name == "torch's tinygemm" else torch.float16
        for bits in (4, 2, 8, 3, 1) if name == "humming" else (4, 2) if name == "gemlite" else (4,):
            if clock.left() < 3:
                yield no_time(_PART, f"{bits} bits against {name}", "x the peer", 0.85, 1.1)
                continue
            try:
                for count, row in _against(name, build, bits, dtype):
                    yield row
                    cell = (row.value, name)
                    best[bits, count] = min(best.get((bits, count), cell), cell)
            except Exception as error:  # not installed, or not for this card
                kind = "NOT INSTALLED" if isinstance(error, ImportError) else type(error).__name__
                what = f"{bits} bits against {name}: {kind}: {str(error)[:80]}"
                yield Row(_PART, what, math.nan, "x the peer", 0.85, 1.1)
                break
    for (bits, count), (ratio, name) in sorted(best.items()):
        what = f"{bits} bits, M = {count}, against the best peer"
        yield Row(_PART, what, ratio, "x the best peer", 0.85, 1.1, name)


def _against(name: str, build: Peer, bits: float, dtype: torch.dtype) -> Iterator[tuple[int, Row]]:
    """Rows of x, and the ratio there."""
    copies = copies_beyond_cache(_SIZE * _SIZE * _STORED[bits] // 8)
    weight = torch.randn(_SIZE, _SIZE, dtype=dtype) / 64
    calls = [build(bits, weight) for _ in range(copies)]
    for count in _PEER_ROWS:
        x = torch.randn(count, _SIZE, dtype=dtype)
        with torch.no_grad():
            for call in calls[:2]:
                call(x)
            peer = seconds_of([lambda c=call, x=x: c(x) for call in calls])  # type: ignore[misc]
        ours = _product(count, bits, dtype, zero=name == "torch's tinygemm")
        detail = f"ours {ours * 1e6:.1f} us, the peer {peer * 1e6:.1f}"
        what = f"{bits} bits, M = {count}, {str(dtype)[6:]}, against {name}"
        yield count, Row(_PART, what, peer / ours, "x the peer", 0.85, 1.1, detail)
