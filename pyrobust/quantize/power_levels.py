"""The levels of power grids as packed codebooks: integers out of 127.

Source: Yvinec, Dapogny, Cord, Bailly, "PowerQuant", ICLR 2023, arXiv 2301.09858.
Departure: levels lie on a grid of 1/127 of the largest one, as codebooks of packed weights do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrobust.quantize.codebook import codebook_of

__all__ = ["power_codebook", "power_unit"]

_TOP = 127  # of a codebook


def power_codebook(bits: int, power: float) -> Tensor:
    """``(2^bits,)`` uint8: the levels ``sign(c) |c|^(1/power)`` of all steps, out of 127."""
    half = 2 ** (bits - 1)
    steps = torch.arange(-half, half, dtype=torch.float64)
    return codebook_of(steps.sign() * steps.abs() ** (1 / power))


def power_unit(bits: int, power: float) -> float:
    """What one codebook step stands for, where the level of step 1 stands for 1."""
    return float((2 ** (bits - 1)) ** (1 / power) / _TOP)
