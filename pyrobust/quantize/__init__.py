"""How weights become low-bit codes."""

from pyrobust.ops.formats import BITS
from pyrobust.quantize.calibration_block import (
    BlockQuantizer,
    CalibrationBlock,
    Quantized,
    quantize_by_layer,
)
from pyrobust.quantize.hessian import HessianAccumulator
from pyrobust.quantize.names import QUANTIZERS
from pyrobust.quantize.qtensor import QTensor, round_scale
from pyrobust.quantize.round_to_nearest import round_to_nearest

__all__ = [
    "BITS",
    "BlockQuantizer",
    "CalibrationBlock",
    "HessianAccumulator",
    "QTensor",
    "QUANTIZERS",
    "Quantized",
    "quantize_by_layer",
    "round_scale",
    "round_to_nearest",
]
