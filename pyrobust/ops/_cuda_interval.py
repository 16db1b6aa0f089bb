"""The interval products on CUDA tensors.

Few inputs: two launches, W read once for both sums. Many, and convolutions: the library's matrix
product between two kernels (:mod:`pyrobust.ops._cuda_interval_library`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrobust.ops import _cuda_interval_library as library
from pyrobust.ops._cuda_matmul import GpuWeight
from pyrobust.ops._cuda_module import FLOAT_CODES, cuda_module, has_large_blocks, where
from pyrobust.ops.formats import levels_of

__all__ = [
    "convolve",
    "decoded_linear",
    "decodes_in_blocks",
    "linear",
    "packed_fits",
    "packed_linear",
]


def linear(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rounding: str,
    *,
    int8: bool = False,
    packed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Image of ``(B, K)`` boxes under a dense ``(N, K)`` weight.

    Args:
        lower: ``(B, K)`` float32, dense, like ``upper``.
        upper: upper ends.
        weight: ``(N, K)`` float32 or bfloat16, dense. bfloat16 is exact and half the bytes.
        bias: ``(N,)`` float32, dense, or None.
        rounding: ``"real"``, ``"deployed"`` or ``"nearest"``.
        int8: the layer rounds each input to 8 bits first.
        packed: the weight is a decoded one, so ``"deployed"`` speaks of the packed product.
    """
    module = cuda_module("interval_linear")
    rows, terms = weight.shape
    exact = weight.dtype == torch.bfloat16
    if library.serves_linear(lower, rows, terms, exact=exact):
        mode = library.Mode(rounding, int8, packed)
        return library.linear(lower, upper, weight, bias, mode, keep=not packed)
    pointers, ends, _scratch = _outputs(module, lower, upper, rows, bias, 1 if exact else 0)
    module.interval_linear(
        pointers,
        weight.data_ptr(),
        exact,
        int8,
        packed,
        _sizes(lower, rows),
        rounding,
        where(lower),
    )
    return ends


def _sizes(lower: Tensor, rows: int) -> tuple[int, int, int]:
    """Inputs, rows and terms."""
    return lower.shape[0], rows, lower.shape[1]


def packed_fits(
    codes: Tensor, terms: int, bits: float, group_size: int, group_dim: int, has_extras: bool
) -> bool:
    """Whether :func:`packed_linear` takes the format as it is stored."""
    if has_extras or not has_large_blocks(codes):
        return False
    module = cuda_module("interval_packed_linear")
    weight_format = (levels_of(bits), group_size, group_dim)
    return bool(module.interval_packed_fits(codes.data_ptr(), terms, weight_format))


def packed_linear(
    lower: Tensor,
    upper: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    terms: int,
    bits: float,
    group_size: int,
    int8: bool,
    rounding: str,
) -> tuple[Tensor, Tensor]:
    """The same under packed codes in the canonical layout, where :func:`packed_fits` holds."""
    module = cuda_module("interval_packed_linear")
    rows = codes.shape[0]
    pointers, ends, _scratch = _outputs(module, lower, upper, rows, bias, 2)
    module.interval_packed_linear(
        pointers,
        codes.data_ptr(),
        scale.data_ptr(),
        FLOAT_CODES[scale.dtype],
        0 if zero is None else zero.data_ptr(),
        (levels_of(bits), group_size, 1),
        int8,
        _sizes(lower, rows),
        rounding,
        where(lower),
    )
    return ends


def decodes_in_blocks(lower: Tensor, codes: Tensor, terms: int, *, fits: bool) -> bool:
    """Whether inputs are so many that :func:`decoded_linear` is the faster way.

    ``fits``: what :func:`packed_fits` says of the weight.
    """
    return library.serves_linear(lower, codes.shape[0], terms, exact=fits, packed=True)


def decoded_linear(
    lower: Tensor,
    upper: Tensor,
    weight: GpuWeight,
    bias: Tensor | None,
    rounding: str,
    int8: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`linear` under packed weights of any format, which are decoded in blocks of rows."""
    mode = library.Mode(rounding, int8, packed=True)
    return library.packed_linear(lower, upper, weight, bias, mode)


def _outputs(
    module: object, lower: Tensor, upper: Tensor, rows: int, bias: Tensor | None, kind: int
) -> tuple[tuple[int, ...], tuple[Tensor, Tensor], Tensor]:
    """Pointers of a launch, its outputs, and its scratch, which must outlive the launch.

    ``kind``: of the weight, 0 float32, 1 bfloat16, 2 packed.
    """
    batch = lower.shape[0]
    out_lower = lower.new_empty((batch, rows))
    out_upper = torch.empty_like(out_lower)
    sizes = _sizes(lower, rows)
    size = module.interval_scratch_bytes(kind, sizes, where(lower))  # type: ignore[attr-defined]
    scratch = lower.new_empty((size,), dtype=torch.uint8)
    shift = 0 if bias is None else bias.data_ptr()
    tensors = (lower, upper, out_lower, out_upper, scratch)
    addresses = [tensor.data_ptr() for tensor in tensors]
    return (*addresses[:2], shift, *addresses[2:]), (out_lower, out_upper), scratch


# Unfolded ends of a block of images: a part of a cache that 60 MB make, not of the memory.
_BLOCK_BYTES = 1 << 25


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
    rounding: str,
    *,
    int8: bool = False,
    packed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Image of boxes of images under a convolution: :func:`linear` of unfolded patches.

    Each patch is an input of its own, so int8 activations have a scale a patch, as the layer.

    Args:
        lower: ``(B, C, H, W)`` float32 with the zeros of the padding; like ``upper``.
        upper: upper ends.
        weight: ``(O, K)`` or ``(O, C / groups, kh, kw)``, a filter a row, dense.
        bias: ``(O,)`` float32, dense, or None.
        kernel: height and width of the window; like the next two.
        stride: steps of the window.
        dilation: steps inside the window.
        groups: divides ``C`` and the outputs.
        out_size: height and width of the result.
        rounding: as for :func:`linear`, like the two that follow.
        int8: the layer rounds each input to 8 bits first.
        packed: the weight is a decoded one.
    """
    inputs = lower.shape[1] // groups * kernel[0] * kernel[1]
    if library.serves_convolution(lower, inputs, groups, out_size):
        window = (kernel, stride, dilation, groups, out_size)
        mode = library.Mode(rounding, int8, packed)
        lower, upper = lower.contiguous(), upper.contiguous()
        return library.convolve(lower, upper, weight, bias, *window, mode, keep=not packed)
    matrices = weight.flatten(1).chunk(groups)
    shifts = (None,) * groups if bias is None else bias.chunk(groups)
    pixels, terms = out_size[0] * out_size[1], lower.shape[1] * kernel[0] * kernel[1]
    images = max(1, _BLOCK_BYTES // max(1, 8 * pixels * terms))
    parts: list[tuple[Tensor, Tensor]] = []
    for low, high in zip(lower.split(images), upper.split(images), strict=True):
        patches = [
            F.unfold(end, tuple(kernel), tuple(dilation), 0, tuple(stride))[:, :, :pixels]
            .unflatten(1, (groups, -1))
            .permute(1, 0, 3, 2)
            .reshape(groups, -1, terms // groups)
            .contiguous()
            for end in (low, high)
        ]
        ends = [
            linear(a, b, matrix, shift, rounding, int8=int8, packed=packed)
            for a, b, matrix, shift in zip(*patches, matrices, shifts, strict=True)
        ]
        parts.append(_as_images([end[0] for end in ends], [end[1] for end in ends], out_size))
    lowers, uppers = zip(*parts, strict=True)
    return torch.cat(lowers), torch.cat(uppers)


def _as_images(
    lowers: list[Tensor], uppers: list[Tensor], out_size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Products ``(images * pixels, O / groups)`` of every group to ``(images, O, H, W)``."""
    pixels = out_size[0] * out_size[1]

    def image(ends: list[Tensor]) -> Tensor:
        rows = torch.cat(ends, dim=1)
        images = rows.reshape(-1, pixels, rows.shape[1]).transpose(1, 2)
        return images.reshape(images.shape[0], rows.shape[1], *out_size)

    return image(lowers), image(uppers)
