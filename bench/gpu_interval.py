"""Interval layers on a GPU against two bfloat16 products with a cached |W|."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from gpu_ceilings import copy_bandwidth
from gpu_timing import Clock, Row, copies_beyond_cache, no_time, seconds_of
from torch import Tensor

from pyrobust.ops import _cuda_interval, _interval_conv, _interval_packed
from pyrobust.ops import _cuda_interval_library as library

__all__ = ["measure"]

_PART = "interval"
_SIZES = (8192, 4096)
_MUST = {1: (1.5, 1.9), 16: (1.5, 1.9), 64: (1.5, 1.9), 256: (0.9, None), 1024: (0.9, None)}
_BITS = (8, 4, 2)
_IMAGES = (128, 128, 32)  # images, channels in and out, height and width; windows of 3 x 3
_SWITCH = (16, 32, 64, 128, 256, 512)  # inputs at which both paths are timed
_CHUNKS = (512, 1024, 2048, 1 << 17)
_CHUNKED_INPUTS = 1024
_LEAST_SECONDS = 4.0  # left for one more cell

Calls = Callable[[str], list[Callable[[], object]]]


def measure(clock: Clock) -> Iterator[Row]:
    """Every batch, size and kind of weight, sound and unsound; a failing cell is a row."""
    try:
        bandwidth = copy_bandwidth()
    except Exception as error:
        bandwidth = math.nan
        yield _failed("copy", error)
    for cell in _cells(bandwidth, clock):
        if clock.left() < _LEAST_SECONDS:
            yield no_time(_PART, cell.what)
            continue
        try:
            yield from cell.rows()
        except Exception as error:
            yield _failed(cell.what, error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Cell:
    what: str
    rows: Callable[[], Iterator[Row]]


def _failed(what: str, error: Exception) -> Row:
    return Row(_PART, what, math.nan, "", detail=f"{type(error).__name__}: {str(error)[:120]}")


def _cells(bandwidth: float, clock: Clock) -> Iterator[_Cell]:
    """The cells of the largest size first; references are timed on the way, while there is time."""
    for index, size in enumerate(_SIZES):
        weight = torch.randn(size, size) / size**0.5
        references: dict[int, float] = {}
        for batch in _MUST:
            references[batch] = math.nan
            with contextlib.suppress(Exception):
                if clock.left() >= _LEAST_SECONDS:
                    references[batch] = _two_products(weight, batch)
            shape = _Shape(size, batch, references[batch], bandwidth)
            for name, matrix in (("bf16", weight.bfloat16()), ("fp32", weight)):
                yield _Cell(
                    shape.what(name), lambda s=shape, n=name, w=matrix: _dense_rows(s, n, w)
                )
            for bits in _BITS:
                yield _Cell(shape.what(f"{bits} bits"), lambda s=shape, b=bits: _packed_rows(s, b))
        if index == 0:
            yield _Cell("convolution", _convolution_rows)
            yield _Cell("chunks", lambda w=weight, r=references: _chunk_rows(w, r))
            for batch in _SWITCH:
                yield _Cell(f"switch, M = {batch}", lambda w=weight, m=batch: _switch_rows(w, m))


@dataclass(frozen=True)
class _Shape:
    size: int
    batch: int
    reference: float  # seconds of two bfloat16 products
    bandwidth: float

    def what(self, name: str) -> str:
        return f"{name} W, {self.size}^2, M = {self.batch}"


def _boxes(batch: int, size: int) -> tuple[Tensor, Tensor]:
    centre = torch.rand(batch, size)
    return centre - 0.03, centre + 0.03


def _copies(tensor: Tensor) -> list[Tensor]:
    return [tensor.clone() for _ in range(copies_beyond_cache(tensor.nbytes))]


def _warm(calls: list[Callable[[], object]]) -> list[Callable[[], object]]:
    """The calls, each made once: what is kept of a weight is made before a graph is captured."""
    for call in calls:
        call()
    return calls


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
    lower, upper = _boxes(batch, weight.shape[1])

    def layer(w: Tensor) -> tuple[Tensor, Tensor]:
        middle = (lower + upper) / 2 @ w.T
        reach = (upper - lower) / 2 @ w.abs().T
        return middle - reach, middle + reach

    return seconds_of([lambda w=w: layer(w) for w in _copies(weight)])  # type: ignore[misc]


# --- layers -----------------------------------------------------------------------------------


def _dense_rows(shape: _Shape, name: str, matrix: Tensor) -> Iterator[Row]:
    ends, copies = _boxes(shape.batch, shape.size), _copies(matrix)

    def calls(mode: str) -> list[Callable[[], object]]:
        own = [lambda w=w: _cuda_interval.linear(*ends, w, None, mode) for w in copies]
        return _warm(own)  # type: ignore[arg-type]

    yield from _rows(shape, name, calls, matrix.nbytes)
    if name == "fp32" and shape.batch <= 64:
        plain, ours = _float32_ibp(matrix, shape.batch), seconds_of(calls("real"))
        detail = f"{plain * 1e6:.1f} us"
        ratio = plain / ours
        yield Row(_PART, shape.what(name), ratio, "x torch float32 IBP", 4.0, None, detail)


def _packed_calls(size: int, bits: int, batch: int) -> tuple[Calls, int]:
    """Calls by mode, and the bytes of a weight. Random codes: their values do not matter."""
    groups = max(1, size // 128)
    codes = torch.randint(0, 256, (size, size * bits // 8), dtype=torch.uint8)
    scale = torch.rand(size, groups).half()
    zero = torch.full((size, groups), 1 << (bits - 1), dtype=torch.uint8)
    ends, copies = _boxes(batch, size), _copies(codes)
    tail = (scale, zero, None, size, bits, 128, 1, None)

    def calls(mode: str) -> list[Callable[[], object]]:
        extras = (None,) * 5
        own = [
            lambda c=c: _interval_packed._linear_cuda(*ends, c, *tail, mode, *extras)
            for c in copies
        ]
        return _warm(own)  # type: ignore[arg-type]

    return calls, codes.nbytes + scale.nbytes + zero.nbytes


def _packed_rows(shape: _Shape, bits: int) -> Iterator[Row]:
    yield from _rows(shape, f"{bits} bits", *_packed_calls(shape.size, bits, shape.batch))


def _rows(shape: _Shape, name: str, calls: Calls, nbytes: int) -> Iterator[Row]:
    sound, unsound = seconds_of(calls("real")), seconds_of(calls("nearest"))
    must, lead = _MUST[shape.batch]
    what, reference = shape.what(name), shape.reference
    detail = f"{sound * 1e6:.1f} us, two products {reference * 1e6:.1f} us"
    detail += f", {nbytes / shape.bandwidth / sound:.2f} of the memory floor"
    yield Row(_PART, what, reference / sound, "x two bf16 products", must, lead, detail)
    yield Row(_PART, f"{what}: sound mode", sound / unsound, "x unsound", 1.5, 1.1, "", below=True)


# --- convolutions -----------------------------------------------------------------------------


def _convolution_rows() -> Iterator[Row]:
    """A layer of a CIFAR network against two bfloat16 convolutions and against float32 IBP."""
    count, channels, size = _IMAGES
    x = torch.rand(count, channels, size, size)
    lower, upper = x - 0.01, x + 0.01
    weight, bias = torch.randn(channels, channels, 3, 3) / 30, torch.randn(channels)
    half, kernel = x.bfloat16(), weight.bfloat16()
    kernel_size = kernel.abs()

    def layer() -> tuple[Tensor, Tensor]:
        middle = F.conv2d((lower + upper) / 2, weight, bias, padding=1)
        reach = F.conv2d((upper - lower) / 2, weight.abs(), padding=1)
        return middle - reach, middle + reach

    def two() -> tuple[Tensor, Tensor]:
        return F.conv2d(half, kernel, padding=1), F.conv2d(half, kernel_size, padding=1)

    reference, plain = seconds_of([two]), seconds_of([layer])
    window = ([1, 1], [1] * 4, [1, 1], 1)
    times = {}
    for mode in ("real", "nearest"):

        def ours(mode: str = mode) -> object:
            return _interval_conv._conv_cuda(lower, upper, weight, bias, *window, mode)

        times[mode] = seconds_of(_warm([ours]))
    what = f"fp32 convolution 3x3, {channels} channels, {count} images of {size}^2"
    detail = f"{times['real'] * 1e6:.0f} us, two bf16 convolutions {reference * 1e6:.0f} us"
    yield Row(_PART, what, reference / times["real"], "x two bf16 convolutions", detail=detail)
    detail = f"{plain * 1e6:.0f} us"
    yield Row(_PART, what, plain / times["real"], "x torch float32 IBP", None, None, detail)
    ratio = times["real"] / times["nearest"]
    yield Row(_PART, f"{what}: sound mode", ratio, "x unsound", 1.5, 1.1, "", below=True)


# --- constants that measurements decide -------------------------------------------------------


@contextlib.contextmanager
def _setting(module: ModuleType = library, **values: int) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _dense_seconds(copies: list[Tensor], batch: int) -> float:
    ends = _boxes(batch, copies[0].shape[1])
    calls = [lambda w=w: _cuda_interval.linear(*ends, w, None, "real") for w in copies]
    return seconds_of(_warm(calls))  # type: ignore[arg-type]


def _chunk_rows(weight: Tensor, references: dict[int, float]) -> Iterator[Row]:
    """What chunks cost: their results travel through memory, longer ones widen the bounds."""
    copies = _copies(weight.bfloat16())
    reference = references.get(_CHUNKED_INPUTS, math.nan)
    for terms in _CHUNKS:
        with _setting(CHUNK_TERMS=terms, LEAST_INPUTS=1, LEAST_PRODUCTS=0, MOST_FUSED_INPUTS=0):
            seconds = _dense_seconds(copies, _CHUNKED_INPUTS)
        what = f"bf16 W, {weight.shape[0]}^2, M = {_CHUNKED_INPUTS}, chunks of {terms} terms"
        detail = f"{seconds * 1e6:.1f} us"
        yield Row(_PART, what, reference / seconds, "x two bf16 products", detail=detail)


def _switch_rows(weight: Tensor, batch: int) -> Iterator[Row]:
    """Both paths; MOST_FUSED_INPUTS belongs where the ratio passes 1."""
    copies = _copies(weight.bfloat16())
    with _setting(LEAST_INPUTS=1 << 60):
        fused = _dense_seconds(copies, batch)
    with _setting(LEAST_INPUTS=1, LEAST_PRODUCTS=0, MOST_FUSED_INPUTS=0):
        around = _dense_seconds(copies, batch)
    what = f"bf16 W, {weight.shape[0]}^2, M = {batch}: library's product"
    detail = f"fused {fused * 1e6:.1f} us, library {around * 1e6:.1f} us"
    yield Row(_PART, what, fused / around, "x the fused kernel", detail=detail)
