"""The packed product on a GPU: repacked weights, workspaces, and the choice between two paths.

Up to :data:`FUSED_ROWS` rows of x go through the fused kernels, 64 at a time; up to
:data:`ROUNDED_ROWS` through one that rounds weights to the type of x, where that kernel serves;
more rows multiply with W decoded in pieces of bounded size, by torch's own matrix product. What is
computed, and to which error, is said in ``csrc/matmul/cuda.h``. Kernels see addresses only: the
tensors are kept here, and everything comes from torch's allocator.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pyrobust.ops._cuda_module import FLOAT_CODES, cuda_module, has_large_blocks, where
from pyrobust.ops._cuda_streams import Made, capturing, made_now
from pyrobust.ops.formats import levels_of
from pyrobust.ops.packed_weight import NO_EXTRAS, WeightExtras

__all__ = [
    "FUSED_ROWS",
    "ROUNDED_ROWS",
    "GpuWeight",
    "Parts",
    "address",
    "clusters",
    "dequantize",
    "gpu_weight",
    "linear",
    "linear_int8",
    "multiprocessors",
    "product",
    "version",
    "warpgroups",
    "whole_chunks",
    "workspace",
]

# Rows of x up to which the fused kernels serve, by bits; more are one launch for every 64. The part
# "switch" of bench/gpu.py prints both sides.
FUSED_ROWS: dict[float, int] = {1: 128, 1.58: 128, 2: 128, 3: 128, 4: 128, 8: 128}

# The same of the kernel that takes more rows in one launch. On an H200, 4 bits, 8192 x 8192: 256
# rows took it 67 us and decoding with torch's product 93; 512 rows 130 and 133.
ROUNDED_ROWS = 256

# Of one launch, by the direction of groups: kMostColumnwiseRows, kMaxFusedRows.
_CALL_ROWS = (16, 64)
_MOST_COLUMNWISE = 64  # rows of x; on an H200 as many decoded take as long as five or six launches
_PIECE_BYTES = 128 << 20  # of decoded W at a time
_TILE = 128  # rows and columns of a result that one thread block of torch's product makes
_STRIP, _BLOCK = 64, 64


class Parts(NamedTuple):
    """A packed weight as the operators take it (:func:`pyrobust.ops.packed_linear`)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    in_features: int
    bits: float
    group_size: int
    group_dim: int
    extras: WeightExtras = NO_EXTRAS


_SUBJECT = "packed_linear"


def multiprocessors(tensor: Tensor) -> int:
    count: int = cuda_module(_SUBJECT).multiprocessors(where(tensor)[0])
    return count


def clusters(tensor: Tensor) -> bool:
    """Whether thread blocks of the tensor's device can share memory (compute capability 9.0)."""
    return bool(cuda_module(_SUBJECT).clusters(where(tensor)[0]))


def warpgroups(tensor: Tensor) -> bool:
    """Whether warps of the tensor's device multiply by fours (compute capability 9.0 alone)."""
    return bool(cuda_module(_SUBJECT).warpgroups(where(tensor)[0]))


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class _Fused:
    """The repacked weight for one type of x."""

    native: Any
    tensors: tuple[Tensor | None, ...]  # that `native` points into


@dataclass
class GpuWeight:
    """What is derived from a packed weight for a device; never saved."""

    parts: Parts
    matrix: Any
    stored: Tensor | None = None
    fused: dict[torch.dtype, _Fused | None] = field(default_factory=dict)
    made: Made | None = None  # by the last repacking

    @classmethod
    def of(cls, parts: Parts) -> GpuWeight:
        """Point at the parts, made contiguous; kept alive as long as the result is."""
        extras = WeightExtras(*(None if e is None else e.contiguous() for e in parts.extras))
        zero = None if parts.zero is None else parts.zero.contiguous()
        parts = parts._replace(
            codes=parts.codes.contiguous(), scale=parts.scale.contiguous(), zero=zero, extras=extras
        )
        matrix = cuda_module(_SUBJECT).Matrix(
            parts.codes.data_ptr(), parts.scale.data_ptr(), FLOAT_CODES.get(parts.scale.dtype, 0),
            address(zero), parts.codes.shape[0], parts.in_features, levels_of(parts.bits),
            parts.group_size, parts.group_dim,
        )  # fmt: skip
        matrix.set_parts(address(extras.row_scale), address(extras.codebook))
        if extras.values is not None:
            matrix.set_remainder(
                extras.values.data_ptr(), FLOAT_CODES[extras.values.dtype],
                address(extras.columns), address(extras.offsets), extras.values.numel(),
            )  # fmt: skip
        return cls(parts, matrix)

    @property
    def rows(self) -> int:
        """Output features."""
        return self.parts.codes.shape[0]

    @property
    def where(self) -> tuple[int, int]:
        """Device index and current stream."""
        return where(self.parts.codes)

    def fused_for(self, dtype: torch.dtype) -> _Fused | None:
        """The repacked weight, made at the first call; None where only decoding serves."""
        if dtype not in self.fused:
            self.fused[dtype] = _repack(self, dtype) if _fusible(self.parts, dtype) else None
            self.made = made_now(self.parts.codes) or self.made
        return self.fused[dtype]

    def wait(self) -> None:
        """Order the current stream after the making, where another stream did that."""
        if self.made is None:
            return
        parts = self.parts
        fused = (tensor for form in self.fused.values() if form for tensor in form.tensors)
        self.made.wait((parts.codes, parts.scale, parts.zero, *parts.extras, self.stored, *fused))


_WEIGHTS: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of the codes


def gpu_weight(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    in_features: int,
    bits: float,
    group_size: int,
    group_dim: int,
    *extras: Tensor | None,
) -> GpuWeight:
    """What is derived from these tensors, made once and forgotten with ``codes``.

    While a CUDA graph is captured nothing is kept, since its memory belongs to the graph: a layer
    that has run once before is captured without its repacking.

    Raises:
        ValueError: the tensors lie on different devices.
    """
    missing = (None,) * (len(NO_EXTRAS) - len(extras))
    form = WeightExtras(*extras, *missing)
    tensors = (codes, scale, zero, *form)
    for tensor in tensors:
        if tensor is not None and tensor.device != codes.device:
            raise ValueError(
                f"{_SUBJECT}: all parts of a weight must be on one device; got {codes.device} and "
                f"{tensor.device}."
            )
    options = (in_features, bits, group_size, group_dim)
    key = (*options, *(None if t is None else (t.data_ptr(), version(t)) for t in tensors))
    kept = _WEIGHTS.get(codes)
    if kept is not None and kept[0] == key:
        weight: GpuWeight = kept[1]
        weight.wait()
        return weight
    # detach(): another object over the same memory, so that the entry does not keep its own key.
    weight = GpuWeight.of(Parts(codes.detach(), scale, zero, *options, form))
    weight.made = made_now(codes)
    if not capturing(codes):
        _WEIGHTS[codes] = (key, weight)
    return weight


def version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


# --- repacking --------------------------------------------------------------------------------


def _fusible(parts: Parts, dtype: torch.dtype) -> bool:
    rows, cols = parts.codes.shape[0], parts.in_features
    if rows == 0 or cols == 0 or not has_large_blocks(parts.codes):
        return False
    extent = cols if parts.group_dim == 1 else rows
    if parts.group_size != 32 and parts.group_size % 64 != 0 and parts.group_size < extent:
        return False
    plain = parts.extras.codebook is None and parts.bits < 8
    if dtype == torch.bfloat16 and plain and parts.zero is not None:
        return int(parts.zero.max()) <= 128  # larger ones are no exact addend (cuda_decode.cuh)
    return True


def _repack(weight: GpuWeight, dtype: torch.dtype) -> _Fused:
    parts, module = weight.parts, cuda_module(_SUBJECT)
    if weight.stored is None:
        weight.stored = _stored_codes(weight)
    alpha = None
    extent = parts.in_features if parts.group_dim == 1 else weight.rows
    pairs = parts.group_size == 32 and extent > 32
    if parts.group_dim == 1:
        scale, zero = _strip_order(parts.scale, pairs), parts.zero
        zero = None if zero is None else _strip_order(zero, pairs)
        scale = scale.half() if scale.dtype == torch.uint8 else scale
    else:
        scale, alpha = _column_scales(parts.scale, dtype, pairs)
        zero = None if parts.zero is None else _whole_blocks(parts.zero, pairs)
    native = module.Linear(
        weight.matrix, weight.stored.data_ptr(), scale.data_ptr(), FLOAT_CODES[scale.dtype],
        address(zero), address(alpha), multiprocessors(parts.codes), clusters(parts.codes),
        warpgroups(parts.codes),
    )  # fmt: skip
    return _Fused(native, (scale, zero, alpha))


def _stored_codes(weight: GpuWeight) -> Tensor:
    parts, module = weight.parts, cuda_module(_SUBJECT)
    form = levels_of(parts.bits), parts.extras.codebook is not None
    sizes = weight.rows, parts.in_features
    stored = parts.codes.new_empty(module.stored_words(*form, *sizes), dtype=torch.int32)
    module.repack(*form, False, parts.codes.data_ptr(), *sizes, stored.data_ptr(), weight.where)
    return stored


def _strip_order(grouped: Tensor, pairs: bool) -> Tensor:
    """``(rows, groups)`` -> strips, groups, and 64 rows in the order of ``scale_place``.

    ``pairs``: a block of 64 columns has two groups; their number becomes even.
    """
    rows, groups = grouped.shape
    padded = F.pad(grouped, (0, groups % 2 if pairs else 0, 0, -rows % _STRIP))
    strips = padded.view(padded.shape[0] // _STRIP, 4, 2, 8, padded.shape[1])
    return strips.permute(0, 4, 3, 1, 2).contiguous()


def _whole_blocks(grouped: Tensor, pairs: bool) -> Tensor:
    groups, columns = grouped.shape
    return F.pad(grouped, (0, -columns % _BLOCK, 0, groups % 2 if pairs else 0)).contiguous()


def _column_scales(scale: Tensor, dtype: torch.dtype, pairs: bool) -> tuple[Tensor, Tensor]:
    """Scales in ``dtype`` under a power of two that brings the largest near 1, and that power."""
    exact = scale.float()
    _, exponent = torch.frexp(exact.abs().max())
    alpha = torch.ldexp(torch.ones((), device=scale.device), exponent).reshape(1)
    return _whole_blocks((exact / alpha).to(dtype), pairs), alpha


# --- products ---------------------------------------------------------------------------------


def product(
    weight: GpuWeight, x: Tensor, bias: Tensor | None, int8: bool, rows: slice | None = None
) -> Tensor:
    """The operator: of some rows of W where ``rows`` names them.

    Raises:
        ValueError: ``x`` or ``bias`` is not where the weight is.
    """
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.device != weight.parts.codes.device:
            raise ValueError(
                f"{_SUBJECT}: {name} must be on the device of the weight, "
                f"{weight.parts.codes.device}; got {tensor.device}."
            )
    x = x.resolve_conj().resolve_neg()
    bias = None if bias is None else bias.float().contiguous()
    if int8:
        out = linear_int8(weight, x, bias)
    elif rows is None:
        return linear(weight, x, bias)
    else:
        part = None if bias is None else bias[rows].to(x.dtype)
        return F.linear(x, dequantize(weight, rows.start, rows.stop, x.dtype), part)
    return out if rows is None else out[..., rows]


def linear(weight: GpuWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + bias``; x ``(..., in_features)`` in one of three float types, bias float32."""
    flat = x.reshape(x.shape[:-1].numel(), weight.parts.in_features)
    # Weights that float32 must not see rounded: one scale a column is multiplied in before.
    exact = flat.dtype == torch.float32 and weight.parts.group_dim == 0
    most = FUSED_ROWS[weight.parts.bits]
    most = most if weight.parts.group_dim == 1 else min(most, _MOST_COLUMNWISE)
    few = 0 < flat.shape[0] <= most
    rounded = most < flat.shape[0] <= ROUNDED_ROWS and flat.dtype != torch.float32
    kind = torch.bfloat16 if flat.dtype == torch.float32 else flat.dtype
    fused = weight.fused_for(kind) if (few or rounded) and not exact else None
    if fused is None or (rounded and not fused.native.takes_many_rows(FLOAT_CODES[kind])):
        out = _decoded_linear(weight, flat, bias)
    elif flat.dtype == torch.float32:
        out = _two_term_linear(weight, fused, flat, bias)
    else:
        out = _fused_linear(weight, fused, flat, bias, flat.dtype, rounded)
    return out.reshape(*x.shape[:-1], weight.rows)


def _fused_linear(
    weight: GpuWeight, fused: _Fused, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype,
    rounded: bool = False,
) -> Tensor:  # fmt: skip
    """``rounded``: all rows in one launch, which may round weights to the type of ``x``."""
    x = whole_chunks(x)
    out = x.new_empty((x.shape[0], weight.rows), dtype=out_dtype)
    on, kind = weight.where, FLOAT_CODES[x.dtype]
    rows = x.shape[0] if rounded else _CALL_ROWS[weight.parts.group_dim]
    for begin in range(0, x.shape[0], rows):
        part, to = x[begin : begin + rows], out[begin : begin + rows]
        sizes = fused.native.workspace(part.shape[0], kind, rounded)
        partials, arrivals = workspace(sizes, part)
        fused.native.run(
            part.data_ptr(), kind, part.shape[0], address(bias), to.data_ptr(),
            FLOAT_CODES[out_dtype], rounded, address(partials), address(arrivals), on,
        )  # fmt: skip
    return out


def whole_chunks(x: Tensor) -> Tensor:
    """Rows of whole 16-byte chunks at a 16-byte address, as asynchronous copies want them."""
    if x.shape[1] % 8 != 0:
        return F.pad(x, (0, -x.shape[1] % 8))
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def workspace(sizes: tuple[int, int], x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Floats and int32 zeros as a product wants them, on the device of ``x``."""
    floats, words = sizes
    if floats == 0:
        return None, None
    return (
        x.new_empty(floats, dtype=torch.float32),
        x.new_zeros(words, dtype=torch.int32),
    )


def _two_term_linear(weight: GpuWeight, fused: _Fused, x: Tensor, bias: Tensor | None) -> Tensor:
    """float32 x as a sum of two bfloat16 terms: within 2^-16 of it."""
    high = x.bfloat16()
    low = torch.where(high.isfinite(), x - high.float(), 0.0).bfloat16()
    both = _fused_linear(weight, fused, torch.cat((high, low)), None, torch.float32)
    out = both[: x.shape[0]] + both[x.shape[0] :]
    return out if bias is None else out.add_(bias)


def _decoded_linear(weight: GpuWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    out = x.new_empty((x.shape[0], weight.rows))
    size = max(1, weight.parts.in_features) * x.element_size()
    # Pieces bound the memory, but have enough tiles for all multiprocessors. On an H200, 4096 rows
    # of x by 8192 x 8192 at 4 bits in pieces of 24 MB took 838 us, one dense product 706, decoding
    # all of W 45.
    enough = -(-2 * multiprocessors(x) // -(-x.shape[0] // _TILE)) * _TILE
    piece = max(_STRIP, _PIECE_BYTES // size // _STRIP * _STRIP, enough)
    for begin in range(0, weight.rows, piece):
        end = min(weight.rows, begin + piece)
        columns, transposed = out[:, begin:end], dequantize(weight, begin, end, x.dtype).T
        if bias is None:
            torch.mm(x, transposed, out=columns)
        else:
            torch.addmm(bias[begin:end].to(x.dtype), x, transposed, out=columns)
    return out


def dequantize(
    weight: GpuWeight, begin: int, end: int, dtype: torch.dtype, indices: Tensor | None = None
) -> Tensor:
    """Rows of W in ``dtype`` (float32: exact): ``begin`` to ``end``, or those of ``indices``."""
    out = weight.parts.codes.new_empty((end - begin, weight.parts.in_features), dtype=dtype)
    weight.matrix.dequantize(
        begin, end, address(indices), FLOAT_CODES[dtype], out.data_ptr(),
        weight.where,
    )  # fmt: skip
    return out


def linear_int8(weight: GpuWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    """The product with x rounded to 8 bits a row: the bits of the CPU."""
    flat = x.reshape(x.shape[:-1].numel(), weight.parts.in_features).contiguous()
    out = flat.new_empty((flat.shape[0], weight.rows))
    rounded = torch.empty_like(flat, dtype=torch.int8)
    steps = flat.new_empty(flat.shape[0], dtype=torch.float64)
    weight.matrix.int8(
        flat.data_ptr(), FLOAT_CODES[flat.dtype], flat.shape[0], address(bias), rounded.data_ptr(),
        steps.data_ptr(), out.data_ptr(), weight.where,
    )  # fmt: skip
    return out.reshape(*x.shape[:-1], weight.rows)
