"""Arithmetic, matching and spectra of whole state dicts."""

from pyrobust.weights.batch_norm import recalibrate_batchnorm, reset_batchnorm
from pyrobust.weights.farms import (
    LayerSpectrum,
    PowerLawFit,
    esd,
    farms_esd,
    hill_alpha,
    layer_sparsity,
    prune_,
    spectral_report,
)
from pyrobust.weights.interpolate import interpolate
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
from pyrobust.weights.svd_split import SVDSplit, rank_for_energy, svd_split
from pyrobust.weights.task_vector import TaskVector, WeightDelta, state_checksum
from pyrobust.weights.trace_spec import trace_spec
from pyrobust.weights.weight_matching import (
    Matching,
    activation_match,
    average_states,
    match_many,
    merge_models,
    ste_match,
    weight_match,
)

__all__ = [
    "AxisRun",
    "LayerSpectrum",
    "Matching",
    "PackedDelta",
    "Patcher",
    "PermutationSpec",
    "PowerLawFit",
    "SVDSplit",
    "TaskVector",
    "WeightDelta",
    "activation_match",
    "apply_permutation",
    "average_states",
    "esd",
    "farms_esd",
    "hill_alpha",
    "interpolate",
    "invert_permutation",
    "layer_sparsity",
    "match_many",
    "merge_models",
    "mlp_spec",
    "prune_",
    "quantize_delta",
    "rank_for_energy",
    "recalibrate_batchnorm",
    "reset_batchnorm",
    "resnet_spec",
    "spectral_report",
    "state_checksum",
    "ste_match",
    "svd_split",
    "trace_spec",
    "weight_match",
]
