"""Arithmetic, matching and spectra of whole state dicts."""

from pyrobust.weights.activation_matching import activation_match
from pyrobust.weights.anisotropic_composition import AnisotropicComposition
from pyrobust.weights.atlas import (
    NoFeasibleCoefficients,
    adapt_few_shot,
    learn_task_addition,
    learn_task_negation,
    select_blocks,
)
from pyrobust.weights.atlas_test_time import adapt_test_time, trusted_samples
from pyrobust.weights.batch_norm import recalibrate_batchnorm, reset_batchnorm
from pyrobust.weights.coefficient_search import CoefficientSearch
from pyrobust.weights.farms import (
    LayerSpectrum,
    PowerLawFit,
    esd,
    farms_esd,
    hill_alpha,
    spectral_report,
)
from pyrobust.weights.interpolate import interpolate
from pyrobust.weights.named_vector import state_checksum
from pyrobust.weights.packed_delta import PackedDelta, quantize_delta
from pyrobust.weights.patcher import Patcher
from pyrobust.weights.permutation import (
    AxisRun,
    PermutationSpec,
    apply_permutation,
    invert_permutation,
    mlp_spec,
    resnet_spec,
)
from pyrobust.weights.pruning import layer_sparsity, prune_
from pyrobust.weights.robust_weight_signatures import (
    compose_signatures,
    project_out,
    robust_weight_signature,
    signature_parameters,
)
from pyrobust.weights.svd_split import SVDSplit, rank_for_energy, svd_split
from pyrobust.weights.task_vector import TaskVector, WeightDelta
from pyrobust.weights.trace_spec import trace_spec
from pyrobust.weights.weight_matching import (
    Matching,
    average_states,
    match_many,
    merge_models,
    ste_match,
    weight_match,
)

__all__ = [
    "AnisotropicComposition",
    "AxisRun",
    "CoefficientSearch",
    "LayerSpectrum",
    "Matching",
    "NoFeasibleCoefficients",
    "PackedDelta",
    "Patcher",
    "PermutationSpec",
    "PowerLawFit",
    "SVDSplit",
    "TaskVector",
    "WeightDelta",
    "activation_match",
    "adapt_few_shot",
    "adapt_test_time",
    "apply_permutation",
    "average_states",
    "compose_signatures",
    "esd",
    "farms_esd",
    "hill_alpha",
    "interpolate",
    "invert_permutation",
    "layer_sparsity",
    "learn_task_addition",
    "learn_task_negation",
    "match_many",
    "merge_models",
    "mlp_spec",
    "project_out",
    "prune_",
    "quantize_delta",
    "rank_for_energy",
    "recalibrate_batchnorm",
    "reset_batchnorm",
    "resnet_spec",
    "robust_weight_signature",
    "select_blocks",
    "signature_parameters",
    "spectral_report",
    "state_checksum",
    "ste_match",
    "svd_split",
    "trace_spec",
    "trusted_samples",
    "weight_match",
]
