"""Arithmetic, matching and spectra of whole state dicts."""

from pyrobust.weights.batch_norm import recalibrate_batchnorm, reset_batchnorm
from pyrobust.weights.interpolate import interpolate
from pyrobust.weights.permutation import (
    AxisRun,
    PermutationSpec,
    apply_permutation,
    invert_permutation,
    mlp_spec,
    resnet_spec,
)
from pyrobust.weights.svd_split import SVDSplit, rank_for_energy, svd_split
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
    "Matching",
    "PermutationSpec",
    "SVDSplit",
    "activation_match",
    "apply_permutation",
    "average_states",
    "interpolate",
    "invert_permutation",
    "match_many",
    "merge_models",
    "mlp_spec",
    "rank_for_energy",
    "recalibrate_batchnorm",
    "reset_batchnorm",
    "resnet_spec",
    "ste_match",
    "svd_split",
    "trace_spec",
    "weight_match",
]
