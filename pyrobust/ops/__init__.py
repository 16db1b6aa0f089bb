"""The three kernel families as torch operators."""

from pyrobust.ops._decompositions import decompositions
from pyrobust.ops._kept_memory import set_kept_memory
from pyrobust.ops._panel_copies import set_panel_copies
from pyrobust.ops.add_packed import add_dequantized_, add_levels_
from pyrobust.ops.complex_matmul import complex_2bit_matmul, complex_2bit_sums
from pyrobust.ops.grid import grid_samples
from pyrobust.ops.interval import (
    interval_conv2d,
    interval_linear,
    interval_packed_conv2d,
    interval_packed_linear,
    radius_precision,
)
from pyrobust.ops.masking import masked_samples, split_gaussian_samples
from pyrobust.ops.matmul import dequantize_codes, pack_codes, packed_linear, unpack_codes
from pyrobust.ops.packed_conv import packed_conv1d, packed_conv2d
from pyrobust.ops.packed_embedding import packed_embedding
from pyrobust.ops.packed_weight import WeightExtras
from pyrobust.ops.sampling import gaussian_samples, laplace_samples, uniform_samples
from pyrobust.ops.substitution import substituted_tokens
from pyrobust.ops.votes import count_votes

__all__ = [
    "WeightExtras",
    "add_dequantized_",
    "add_levels_",
    "complex_2bit_matmul",
    "complex_2bit_sums",
    "count_votes",
    "decompositions",
    "dequantize_codes",
    "gaussian_samples",
    "grid_samples",
    "interval_conv2d",
    "interval_linear",
    "interval_packed_conv2d",
    "interval_packed_linear",
    "laplace_samples",
    "masked_samples",
    "pack_codes",
    "packed_conv1d",
    "packed_conv2d",
    "packed_embedding",
    "packed_linear",
    "radius_precision",
    "set_kept_memory",
    "set_panel_copies",
    "split_gaussian_samples",
    "substituted_tokens",
    "uniform_samples",
    "unpack_codes",
]
