"""How weights become low-bit codes."""

from pyrobust.ops.formats import BITS
from pyrobust.quantize.qtensor import QTensor, round_scale
from pyrobust.quantize.round_to_nearest import round_to_nearest

__all__ = ["BITS", "QTensor", "round_scale", "round_to_nearest"]
