"""The three kernel families as torch operators."""

from pyrobust.ops.interval import (
    interval_conv2d,
    interval_linear,
    interval_packed_conv2d,
    interval_packed_linear,
)
from pyrobust.ops.matmul import dequantize_codes, pack_codes, packed_linear, unpack_codes
from pyrobust.ops.packed_layers import packed_conv2d, packed_embedding
from pyrobust.ops.sampling import count_votes, gaussian_samples

__all__ = [
    "count_votes",
    "dequantize_codes",
    "gaussian_samples",
    "interval_conv2d",
    "interval_linear",
    "interval_packed_conv2d",
    "interval_packed_linear",
    "pack_codes",
    "packed_conv2d",
    "packed_embedding",
    "packed_linear",
    "unpack_codes",
]
