"""How weights become low-bit codes."""

from pyrobust.ops.formats import BITS
from pyrobust.quantize.activations import fake_quantize_activation, quantize_activation
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
from pyrobust.quantize.sensitivity import SENSITIVITY_KINDS, prediction_loss, sensitivity

__all__ = [
    "BITS",
    "BlockQuantizer",
    "CalibrationBlock",
    "HessianAccumulator",
    "QTensor",
    "QUANTIZERS",
    "Quantized",
    "SENSITIVITY_KINDS",
    "fake_quantize_activation",
    "prediction_loss",
    "quantize_activation",
    "quantize_by_layer",
    "round_scale",
    "round_to_nearest",
    "sensitivity",
]
