"""Interval layers on a GPU against two bfloat16 products with a cached |W|."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from gpu_ceilings import copy_bandwidth
from gpu_timing import Clock, Row, copies_beyond_cache, seconds_of
from torch import Tensor

from pyrobust.ops import _cuda_interval
from pyrobust.quantize import round_to_nearest

__all__ = ["measure"]

_PART = "interval"
_SIZES = (8192, 4096)
_MUST = {1: (1.5, 1.9), 16: (1.5, 1.9), 64: (1.5, 1.9), 256: (0.9, None), 1024: (0.9, None)}


def measure(clock: Clock) -> Iterator[Row]:
    """Every batch, size and kind of weight, sound and unsound."""
    bandwidth = copy_bandwidth()
    for size in _SIZES:
        weight = torch.randn(size, size) / size**0.5
        packed = {bits: _packed(weight, bits) for bits in (8, 4, 2)}
        for batch in _MUST:
            if clock.left() < 20:
                return
            reference = _two_products(weight, batch)
            yield from _kinds(weight, packed, batch, reference, bandwidth)
        torch.cuda.empty_cache()


def _packed(weight: Tensor, bits: int) -> list[Tensor]:
    with torch.device("cpu"):
        packed = round_to_nearest(weight.cpu(), bits=bits, group_size=128)
    assert packed.zero is not None
    return [part.to(weight.device) for part in (packed.codes, packed.scale, packed.zero)]


def _boxes(batch: int, size: int) -> tuple[Tensor, Tensor]:
    centre = torch.rand(batch, size)
    return centre - 0.03, centre + 0.03


def _two_products(weight: Tensor, batch: int) -> float:
    """Seconds of ``c W'`` and ``r |W|'`` in bfloat16, both weights in memory."""
    first = weight.bfloat16()
    pairs = [(first.clone(), first.abs()) for _ in range(copies_beyond_cache(2 * first.nbytes))]
    x = torch.rand(batch, weight.shape[1]).bfloat16()

    def products(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return x @ pair[0].T, x @ pair[1].T

    return seconds_of([lambda p=pair: products(p) for pair in pairs])  # type: ignore[misc]


def _float32_ibp(weight: Tensor, batch: int) -> float:
    """Seconds of interval propagation as torch programs write it, ``W.abs()`` in every call."""
    copies = [weight.clone() for _ in range(copies_beyond_cache(weight.nbytes))]
    lower, upper = _boxes(batch, weight.shape[1])

    def layer(w: Tensor) -> tuple[Tensor, Tensor]:
        middle = (lower + upper) / 2 @ w.T
        reach = (upper - lower) / 2 @ w.abs().T
        return middle - reach, middle + reach

    return seconds_of([lambda w=w: layer(w) for w in copies])  # type: ignore[misc]


def _kinds(
    weight: Tensor,
    packed: dict[int, list[Tensor]],
    batch: int,
    reference: float,
    bandwidth: float,
) -> Iterator[Row]:
    rows, terms = weight.shape
    ends = _boxes(batch, terms)
    must, lead = _MUST[batch]
    for name, matrix in (("bf16", weight.bfloat16()), ("fp32", weight)):
        copies = [matrix.clone() for _ in range(copies_beyond_cache(matrix.nbytes))]

        def calls(mode: str, own: list[Tensor] = copies) -> list[Callable[[], object]]:
            return [lambda w=w: _cuda_interval.linear(*ends, w, None, mode) for w in own]  # type: ignore[misc]

        yield from _rows(name, rows, batch, calls, reference, must, lead, matrix.nbytes / bandwidth)
    if batch <= 64:
        plain = _float32_ibp(weight, batch)
        ours = seconds_of(calls("real"))
        what = f"fp32 W, {rows}^2, M = {batch}"
        yield Row(
            _PART, what, plain / ours, "x torch float32 IBP", 4.0, None, f"{plain * 1e6:.1f} us"
        )
    for bits, parts in packed.items():
        copies = [parts[0].clone() for _ in range(copies_beyond_cache(parts[0].nbytes))]
        nbytes = sum(part.nbytes for part in parts)

        def packed_calls(
            mode: str, own: list[Tensor] = copies, bits: int = bits, parts: list[Tensor] = parts
        ) -> list[Callable[[], object]]:
            tail = (*parts[1:], None, terms, bits, 128, False, mode)
            return [lambda c=c: _cuda_interval.packed_linear(*ends, c, *tail) for c in own]  # type: ignore[misc]

        floor = nbytes / bandwidth
        yield from _rows(f"{bits} bits", rows, batch, packed_calls, reference, must, lead, floor)


def _rows(
    name: str,
    size: int,
    batch: int,
    calls: Callable[[str], list[Callable[[], object]]],
    reference: float,
    must: float,
    lead: float | None,
    floor: float,
) -> Iterator[Row]:
    sound, unsound = seconds_of(calls("real")), seconds_of(calls("nearest"))
    what = f"{name} W, {size}^2, M = {batch}"
    detail = f"{sound * 1e6:.1f} us, two products {reference * 1e6:.1f} us"
    detail += f", {floor / sound:.2f} of the memory floor"
    yield Row(_PART, what, reference / sound, "x two bf16 products", must, lead, detail)
    yield Row(_PART, f"{what}: sound mode", sound / unsound, "x unsound", 1.5, 1.1, "", below=True)
