"""How weights become low-bit codes."""

from typing import TYPE_CHECKING, Any

from pyrobust.ops.formats import BITS
from pyrobust.quantize.activations import fake_quantize_activation, quantize_activation
from pyrobust.quantize.adadim import AdaDim, AdaDimChoice, AdaDimReport
from pyrobust.quantize.bit_allocation import allocate_bits, bit_costs, knapsack
from pyrobust.quantize.calibration_block import (
    BlockQuantizer,
    CalibrationBlock,
    Quantized,
    quantize_by_layer,
)
from pyrobust.quantize.codebook import codebook_of, nf4_levels, round_to_codebook
from pyrobust.quantize.fold_batch_norm import fold_batch_norm
from pyrobust.quantize.gptq import GPTQ, gptq, gptq_weight
from pyrobust.quantize.gwq import GWQ, gwq_quantize
from pyrobust.quantize.hessian import HessianAccumulator
from pyrobust.quantize.ifairy import ComplexLinear, PhaseQuantizeSTE, TwoStageSchedule
from pyrobust.quantize.learned_rounding import LearnedRounding, learned_rounding
from pyrobust.quantize.lsq import ActivationQuantizer, LSQQuantizer
from pyrobust.quantize.names import QUANTIZERS
from pyrobust.quantize.ofq import ConfidenceGuidedAnnealing, train_ofq
from pyrobust.quantize.oscillation import OscillationTracker
from pyrobust.quantize.outliers import outlier_columns, outlier_mask, quantize_with_outliers
from pyrobust.quantize.phase_codes import (
    PhaseCodes,
    PhaseTensor,
    dequantize,
    pack_codes_2bit,
    phase_quantize,
    unpack_codes_2bit,
)
from pyrobust.quantize.power_quantizer import PowerQuantizer
from pyrobust.quantize.qk_reparam import QKReparamAttention
from pyrobust.quantize.qtensor import QTensor, round_scale
from pyrobust.quantize.quant_layers import QuantConv2d, QuantLinear
from pyrobust.quantize.quantize_vit import quantize_vit
from pyrobust.quantize.remainder import SparseRemainder
from pyrobust.quantize.round_to_nearest import quantize_groupwise, round_to_nearest, rtn
from pyrobust.quantize.rounding_study import StudyTable, study
from pyrobust.quantize.second_level import QTensorWithStatistics, SecondLevel
from pyrobust.quantize.sensitivity import SENSITIVITY_KINDS, prediction_loss, sensitivity
from pyrobust.quantize.stats_quantizer import StatsQuantizer
from pyrobust.quantize.two_level import round_to_two_level

if TYPE_CHECKING:
    from pyrobust.nn.packed_complex_linear import PackedComplexLinear

__all__ = [
    "PackedComplexLinear",
    "unpack_codes_2bit",
    "phase_quantize",
    "pack_codes_2bit",
    "dequantize",
    "PhaseTensor",
    "PhaseCodes",
    "TwoStageSchedule",
    "PhaseQuantizeSTE",
    "ComplexLinear",
    "SecondLevel",
    "quantize_with_outliers",
    "outlier_mask",
    "outlier_columns",
    "GWQ",
    "gwq_quantize",
    "QTensorWithStatistics",
    "ActivationQuantizer",
    "AdaDim",
    "AdaDimChoice",
    "AdaDimReport",
    "GPTQ",
    "gptq",
    "gptq_weight",
    "quantize_groupwise",
    "rtn",
    "BITS",
    "BlockQuantizer",
    "CalibrationBlock",
    "ConfidenceGuidedAnnealing",
    "HessianAccumulator",
    "LSQQuantizer",
    "LearnedRounding",
    "OscillationTracker",
    "PowerQuantizer",
    "QKReparamAttention",
    "QTensor",
    "QUANTIZERS",
    "QuantConv2d",
    "QuantLinear",
    "Quantized",
    "SENSITIVITY_KINDS",
    "fake_quantize_activation",
    "prediction_loss",
    "quantize_activation",
    "StatsQuantizer",
    "StudyTable",
    "allocate_bits",
    "bit_costs",
    "knapsack",
    "study",
    "fold_batch_norm",
    "learned_rounding",
    "quantize_by_layer",
    "quantize_vit",
    "round_scale",
    "round_to_nearest",
    "sensitivity",
    "SparseRemainder",
    "codebook_of",
    "nf4_levels",
    "round_to_codebook",
    "round_to_two_level",
    "train_ofq",
]


def __getattr__(name: str) -> Any:
    """Import a module of ``pyrobust.nn`` at its first use: that package imports this one."""
    if name == "PackedComplexLinear":
        from pyrobust.nn.packed_complex_linear import PackedComplexLinear

        return PackedComplexLinear
    raise AttributeError(f"module 'pyrobust.quantize' has no attribute {name!r}")
