"""The complex product on a GPU: four integer sums from one read of the weight.

On tensor cores, with the 8-bit parts of x as float16: every sum is an integer below 2^25 and even
before it is halved, so float32 holds it exactly. The contract is ``csrc/matmul/complex.h``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pyrobust.ops._cuda_matmul import (
    address,
    clusters,
    multiprocessors,
    version,
    whole_chunks,
    workspace,
)
from pyrobust.ops._cuda_module import cuda_module, has_large_blocks, where
from pyrobust.ops._cuda_streams import capturing, made_now

__all__ = ["complex_sums"]

_ROWS = 8  # of one launch; real and imaginary parts are 16
_EXACT_COLUMNS = 1 << 17
_WEIGHTS: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of the codes


def complex_sums(x_real: Tensor, x_imag: Tensor, codes: Tensor, in_features: int) -> Tensor:
    """``(4, M, rows)`` int32 of :func:`pyrobust.ops.complex_2bit_sums`; x ``(M, in_features)``."""
    if in_features > _EXACT_COLUMNS:
        raise ValueError(
            f"complex_2bit_sums: in_features must be at most 2**17 on a GPU; got {in_features}."
        )
    if not has_large_blocks(codes):
        raise RuntimeError(
            f"complex_2bit_sums: a thread block of {codes.device} has less than the 163 KB of "
            "shared memory that the kernel needs; pass .cpu() tensors."
        )
    rows, on = codes.shape[0], where(codes)
    out = codes.new_zeros((4, x_real.shape[0], rows), dtype=torch.int32)
    if out.numel() == 0 or in_features == 0:
        return out
    native, stored = _complex_weight(codes, in_features)  # stored: alive until the end
    for begin in range(0, x_real.shape[0], _ROWS):
        part = slice(begin, begin + _ROWS)
        x = whole_chunks(torch.cat((x_real[part], x_imag[part])).half())
        sums = x.new_empty((2, x.shape[0], rows), dtype=torch.int32)
        partials, arrivals = workspace(native.workspace(x.shape[0]), x)
        native.run(
            x.data_ptr(), x.shape[0], sums.data_ptr(), address(partials), address(arrivals),
            on,
        )  # fmt: skip
        (a_u, b_u), (a_v, b_v) = (side.chunk(2) for side in sums)
        out[:, part] = torch.stack((a_u, b_v, a_v, -b_u))
    del stored
    return out


def _complex_weight(codes: Tensor, in_features: int) -> tuple[Any, Tensor]:
    """The repacked weight and the tensor it points into; kept as ``gpu_weight`` keeps its own."""
    key = codes.data_ptr(), version(codes), in_features
    kept = _WEIGHTS.get(codes)
    if kept is not None and kept[0] == key:
        _, (native, stored), made = kept
        if made is not None:
            made.wait((stored,))
        return native, stored
    module, rows, on = cuda_module("complex_2bit_sums"), codes.shape[0], where(codes)
    stored = codes.new_empty(module.stored_words(4, False, rows, in_features), dtype=torch.int32)
    plain = codes.contiguous()
    module.repack(4, False, True, plain.data_ptr(), rows, in_features, stored.data_ptr(), on)
    native = module.ComplexLinear(
        stored.data_ptr(), rows, in_features, multiprocessors(codes), clusters(codes)
    )
    if not capturing(codes):
        _WEIGHTS[codes] = (key, (native, stored), made_now(codes))
    return native, stored
