"""Interval products of many inputs, and of convolutions, through the library's matrix product.

A kernel writes inputs as bfloat16 operands, ``torch.mm`` multiplies them into float32, a kernel
rounds outward: what is computed, and why it is sound, is said in ``csrc/interval/cuda_library.h``.
The bfloat16 parts of a float weight are kept as long as the weight, for its memory and version.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pyrobust.ops._cuda_matmul import GpuWeight, address, dequantize, version
from pyrobust.ops._cuda_module import cuda_module, has_large_blocks, where
from pyrobust.ops._cuda_streams import Made, made_now
from pyrobust.ops._cuda_streams import capturing as under_capture

__all__ = ["Mode", "convolve", "linear", "packed_linear", "serves_convolution", "serves_linear"]

# Terms of W1 c_hi that meet on tensor cores before float32 sums: 2^-22 a term joins the radius.
CHUNK_TERMS = 1024

# Where the library's products serve. Measured on an H200 with 8192 x 8192 bfloat16 weights: 3.0,
# 4.8 and 7.2 times as fast as the fused kernel for 64, 128 and 256 inputs. The fused kernel takes
# as long for 32 inputs as for 17. Decoding packed weights costs 0.9 ms there, what the fused kernel
# takes for 256 inputs.
LEAST_INPUTS = 32
LEAST_PRODUCTS = 1 << 27  # 32 inputs of 2048 x 2048: below, launches of the library's path count
LEAST_PACKED_INPUTS = 256

# Up to so many inputs the fused product of warpgroups is taken before the library's, where the card
# has it and the weight is bfloat16, or packed in a format that it reads. Counted, not timed: it
# reads W once where the library reads W twice and |W| once, or decodes W to memory.
MOST_FUSED_INPUTS = 64
MOST_FUSED_PACKED_INPUTS = 1023

_SUM_BYTES = 1 << 28  # of a block of inputs
_WEIGHT_BYTES = 24 << 20  # of a decoded block of packed weights
_IMAGE_BYTES = 48 << 20  # of operands and sums of a block of images
_LEAST_ROWS = 128
_PLANES = 3


class Mode(NamedTuple):
    """What the layer promises, as for :func:`pyrobust.ops._cuda_interval.linear`."""

    rounding: str
    int8: bool = False
    packed: bool = False


def _available(example: Tensor) -> bool:
    # float32 results of bfloat16 operands: torch 2.8 and later; the tests' CPU multiplies floats.
    return not example.is_cuda or "dtype" in torch.ops.aten.mm.overloads()


def serves_linear(
    lower: Tensor, rows: int, terms: int, *, exact: bool, packed: bool = False
) -> bool:
    """Whether :func:`linear`, or :func:`packed_linear`, is the faster way, and possible.

    ``exact``: a fused kernel takes the weight's values as bfloat16.
    """
    batch = lower.shape[0]
    most = MOST_FUSED_PACKED_INPUTS if packed else MOST_FUSED_INPUTS
    if exact and batch <= most and cuda_module("interval_linear").warpgroups(where(lower)[0]):
        return False
    if not has_large_blocks(lower):
        _require_library(lower, terms)
        return True
    many = (
        batch >= (LEAST_PACKED_INPUTS if packed else LEAST_INPUTS)
        and batch * rows * terms >= LEAST_PRODUCTS
    )
    return many and _sum_fits(terms) and _available(lower)


def _require_library(lower: Tensor, terms: int) -> None:
    if not (_sum_fits(terms) and _available(lower)):
        raise RuntimeError(
            f"interval_linear: a thread block of {lower.device} has less than the 163 KB of shared "
            "memory that the fused kernel needs, and torch's product serves 1 to 2**18 terms with "
            f"torch 2.8 or later; got {terms} terms, torch {torch.__version__}."
        )


def serves_convolution(lower: Tensor, terms: int, groups: int, out_size: Sequence[int]) -> bool:
    """Whether :func:`convolve` is the faster way, and possible; ``terms`` of one output."""
    patches = lower.shape[0] * out_size[0] * out_size[1]
    if patches < LEAST_INPUTS or not (_sum_fits(terms) and _available(lower)):
        return False
    padded = _chunked(terms)[1]
    return bool(cuda_module("interval_conv2d").interval_split_patches_fits(groups, padded))


def _sum_fits(terms: int) -> bool:
    limit: int = cuda_module("interval_linear").INTERVAL_MOST_TERMS
    return terms > 0 and _chunked(terms)[1] <= limit


def _chunked(terms: int) -> tuple[int, int]:
    """Chunks, and the terms of all of them together: a multiple of 8 each."""
    chunks = -(-terms // CHUNK_TERMS)
    return chunks, chunks * -(-terms // (8 * chunks)) * 8


# --- weights ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weight:
    """``(rows, padded)`` bfloat16 parts of a weight; ``source`` keeps its memory, so that no other
    weight gets the same address while this one is remembered.
    """

    source: Tensor
    first: Tensor
    second: Tensor | None
    magnitude: Tensor
    terms: int
    chunks: int
    made: Made | None = None

    @property
    def padded(self) -> int:
        return self.first.shape[1]

    def sum_options(self, mode: Mode) -> tuple[Any, ...]:
        """As the kernels take them."""
        two_parts = self.second is not None
        return self.terms, self.padded, self.chunks, two_parts, mode.rounding, mode.packed


_WEIGHTS: WeakIdKeyDictionary = WeakIdKeyDictionary()
_CAPTURED: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parts whose addresses graphs hold


def _weight_of(weight: Tensor, keep: bool) -> _Weight:
    """The parts of a ``(rows, ...)`` weight, made once for its memory and version.

    An inference tensor has no version, and memory of a graph under capture is not ours: neither is
    kept. A graph takes kept parts of frozen weights only; weights that may be trained are split by
    the graph itself, whose replays then see their changes. Changes that torch does not count, in
    place through ``.data``, are not seen.
    """
    capturing = under_capture(weight)
    keep = keep and not weight.is_inference() and not (capturing and weight.requires_grad)
    key = (weight.data_ptr(), version(weight), weight.dtype, tuple(weight.shape), CHUNK_TERMS)
    kept = _WEIGHTS.get(weight) if keep else None
    if kept is not None and kept[0] == key:
        made: _Weight = kept[1]
        if capturing:  # which begins synchronized
            _CAPTURED.setdefault(weight, []).append(made)
        elif made.made is not None:
            made.made.wait((made.source, made.first, made.second, made.magnitude))
        return made
    parts = _split(weight.detach().flatten(1))
    if keep and not capturing:
        parts = replace(parts, made=made_now(weight))
        _WEIGHTS[weight] = (key, parts)
    return parts


def _split(matrix: Tensor) -> _Weight:
    rows, terms = matrix.shape
    chunks, padded = _chunked(terms)
    exact = matrix.dtype == torch.bfloat16
    ready = exact and padded == terms and matrix.data_ptr() % 16 == 0

    def part() -> Tensor:
        return matrix.new_empty((rows, padded), dtype=torch.bfloat16)

    first, magnitude = matrix if ready else part(), part()
    second = None if exact else part()
    to = (0 if ready else first.data_ptr(), address(second), magnitude.data_ptr())
    cuda_module("interval_linear").interval_split_weight(
        matrix.data_ptr(), exact, rows, terms, padded, to, where(matrix)
    )
    return _Weight(matrix, first, second, magnitude, terms, chunks)


# --- products ---------------------------------------------------------------------------------


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of bfloat16 matrices or batches of them, summed and returned in float32."""
    if not a.is_cuda:  # the tests: bfloat16 is exact in float32
        return a.float() @ b.float()
    multiply = torch.mm if a.ndim == 2 else torch.bmm
    out: Tensor = multiply(a, b, out_dtype=torch.float32)
    return out


class _Sums(NamedTuple):
    """What the epilogue adds: ``first`` has a result a chunk; with ``in_chunks`` others have too,
    but for ``second``.
    """

    first: Tensor
    low: Tensor
    second: Tensor | None
    radius: Tensor
    in_chunks: bool = False


def linear(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mode: Mode,
    *,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """Image of ``(B, K)`` boxes under an ``(N, K)`` weight, float32 or bfloat16.

    ``keep``: whether the same weight may come again.
    """
    blocks = [(0, _weight_of(weight, keep))]
    return _image(lower, upper, blocks, weight.shape[0], bias, mode)


def packed_linear(
    lower: Tensor, upper: Tensor, weight: GpuWeight, bias: Tensor | None, mode: Mode
) -> tuple[Tensor, Tensor]:
    """The same under packed weights of any format, decoded to float32 a cache-sized block at a
    time.
    """
    rows, terms = weight.rows, weight.parts.in_features
    block = max(_LEAST_ROWS, _WEIGHT_BYTES // (4 * terms))

    def blocks() -> Iterator[tuple[int, _Weight]]:
        for begin in range(0, rows, block):
            end = min(rows, begin + block)
            yield begin, _split(dequantize(weight, begin, end, torch.float32))

    return _image(lower, upper, blocks(), rows, bias, mode)


def _image(
    lower: Tensor,
    upper: Tensor,
    blocks: Iterable[tuple[int, _Weight]],
    rows: int,
    bias: Tensor | None,
    mode: Mode,
) -> tuple[Tensor, Tensor]:
    """``blocks``: the first row of each block of the weight, and its parts."""
    batch = lower.shape[0]
    out = (lower.new_empty((batch, rows)), lower.new_empty((batch, rows)))
    planes: Tensor | None = None
    for first, parts in blocks:
        planes = _split_rows(lower, upper, parts, mode) if planes is None else planes
        own = parts.first.shape[0]
        shift = None if bias is None else bias[first : first + own]
        inputs = max(_LEAST_ROWS, _SUM_BYTES // (4 * own * (parts.chunks + 3)))
        for begin in range(0, batch, inputs):
            end = min(batch, begin + inputs)
            sums = _row_sums(planes[:, begin:end], parts)
            ends = [each[begin:end, first : first + own] for each in out]
            _finish(sums, parts, shift, (1, end - begin, own, 0, 0, rows), mode, ends)
    return out


def _split_rows(lower: Tensor, upper: Tensor, parts: _Weight, mode: Mode) -> Tensor:
    batch = lower.shape[0]
    planes = lower.new_empty((_PLANES, batch, parts.padded), dtype=torch.bfloat16)
    extra = lower.new_empty(batch) if mode.int8 else None
    pointers = (lower.data_ptr(), upper.data_ptr(), planes.data_ptr(), address(extra))
    cuda_module("interval_linear").interval_split_rows(
        pointers, batch, parts.sum_options(mode), where(lower)
    )
    return planes


def _row_sums(planes: Tensor, parts: _Weight) -> _Sums:
    high, low, radius = planes
    first = parts.first.T
    if parts.chunks == 1 and planes.is_contiguous():
        both = _product(planes[:2].flatten(0, 1), first).unflatten(0, (2, -1))
        sums = (both[0], both[1])
    else:
        pieces = (
            high.unflatten(1, (parts.chunks, -1)).transpose(0, 1),
            first.unflatten(0, (parts.chunks, -1)),
        )
        sums = (_product(*pieces), _product(low, first))
    second = None if parts.second is None else _product(high, parts.second.T)
    return _Sums(*sums, second, _product(radius, parts.magnitude.T))


def _finish(
    sums: _Sums,
    parts: _Weight,
    bias: Tensor | None,
    sizes: tuple[int, ...],
    mode: Mode,
    out: Sequence[Tensor],
) -> None:
    pointers = (
        sums.first.data_ptr(), sums.low.data_ptr(), address(sums.second), sums.radius.data_ptr(),
        address(bias), out[0].data_ptr(), out[1].data_ptr(),
    )  # fmt: skip
    cuda_module("interval_linear").interval_finish(
        pointers, sizes, sums.in_chunks, parts.sum_options(mode), where(sums.first)
    )


# --- convolutions -----------------------------------------------------------------------------


class _Window(NamedTuple):
    kernel: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    out_size: Sequence[int]
    groups: int


def convolve(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out_size: Sequence[int],
    mode: Mode,
    *,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """Image of boxes of padded images; arguments as :func:`pyrobust.ops._cuda_interval.convolve`.

    A block of images at a time is unfolded, in bfloat16, into a part of the cache.
    """
    parts = _weight_of(weight, keep)
    batch = _batch_of(parts, groups)
    window = _Window(kernel, stride, dilation, out_size, groups)
    pixels, rows = out_size[0] * out_size[1], weight.shape[0]
    out = tuple(lower.new_empty((lower.shape[0], rows, *out_size)) for _ in range(2))
    sums_of_pixel = 4 * rows * (_PLANES * parts.chunks + 1)
    each = pixels * (2 * _PLANES * parts.padded * groups + sums_of_pixel)
    block = max(1, _IMAGE_BYTES // each)
    for begin in range(0, lower.shape[0], block):
        images = slice(begin, min(lower.shape[0], begin + block))
        planes = _split_patches(lower[images], upper[images], parts, window, mode)
        sums = _patch_sums(planes, batch, parts)
        patches = (images.stop - begin) * pixels
        sizes = (groups, rows, planes.shape[-1], pixels, patches, 0)
        _finish(sums, parts, bias, sizes, mode, (out[0][images], out[1][images]))
    return out[0], out[1]


def _split_patches(
    lower: Tensor, upper: Tensor, parts: _Weight, window: _Window, mode: Mode
) -> Tensor:
    """Planes ``(3, groups, padded, columns)``, a patch a column."""
    patches = lower.shape[0] * window.out_size[0] * window.out_size[1]
    columns = -(-patches // 8) * 8
    shape = (_PLANES, window.groups, parts.padded, columns)
    planes = lower.new_empty(shape, dtype=torch.bfloat16)
    scratch = lower.new_empty((*lower.shape, 2), dtype=torch.int32)
    extra = lower.new_empty((window.groups, columns)) if mode.int8 else None
    pointers = (lower.data_ptr(), upper.data_ptr(), planes.data_ptr(), address(extra))
    sizes = (*window.kernel, *window.stride, *window.dilation, *window.out_size, window.groups)
    cuda_module("interval_conv2d").interval_split_patches(
        (*pointers, scratch.data_ptr()), tuple(lower.shape), sizes, columns,
        parts.sum_options(mode), where(lower),
    )  # fmt: skip
    return planes


def _batch_of(parts: _Weight, groups: int) -> Tensor:
    """Left operands of W1 c_hi, W1 c_lo and |W| r: ``(3 * groups * chunks, rows, terms)``."""
    planes = torch.stack((parts.first, parts.first, parts.magnitude))
    split: Tensor = planes.unflatten(1, (groups, -1)).unflatten(3, (parts.chunks, -1))
    return split.transpose(2, 3).flatten(0, 2)


def _patch_sums(planes: Tensor, batch: Tensor, parts: _Weight) -> _Sums:
    """One batch of equal products: those of a block of images alone are too few for a card."""
    groups, columns = planes.shape[1], planes.shape[3]
    products = _product(batch, planes.view(batch.shape[0], -1, columns))
    first, low, radius = products.view(_PLANES, groups, parts.chunks, -1, columns)
    second = None
    if parts.second is not None:
        second = _product(parts.second.unflatten(0, (groups, -1)), planes[0])
    return _Sums(first, low, second, radius, in_chunks=True)
