"""The three kernel families as torch operators."""

from pyrobust.ops.matmul import dequantize_codes, pack_codes, packed_linear, unpack_codes

__all__ = ["dequantize_codes", "pack_codes", "packed_linear", "unpack_codes"]
