"""Bounds and certificates: statements with a guarantee."""

from pyrobust.certify.bound import bound, margin_specification
from pyrobust.certify.certdr import (
    BiEncoder,
    RankingCertificate,
    SmoothedRanker,
    certified_robust_query,
)
from pyrobust.certify.certificates import (
    ABSTAIN,
    Certificate,
    SequentialCertificate,
    SmoothingCertificate,
)
from pyrobust.certify.dual_smoothing import (
    DualSmoothedClassifier,
    DualSmoothingCertificate,
    dual_radius,
)
from pyrobust.certify.first_layer_noise import (
    after_linear_samples,
    noise_factor,
    split_first_linear,
)
from pyrobust.certify.great_job import GreatJob
from pyrobust.certify.job import CertificationJob, certificate_of_log, certify_to_log
from pyrobust.certify.job_methods import IntervalJob, JobMethod, SmoothingJob
from pyrobust.certify.lipschitz import conv_norm_bound, lipschitz_bound
from pyrobust.certify.mixture_radius import (
    lipschitz_radius,
    smoothed_lipschitz,
    smoothed_mixture_radius,
)
from pyrobust.certify.modality_job import MultimodalJob
from pyrobust.certify.multimodal_radius import (
    ModalityLipschitz,
    certify_multimodal,
    fused_radius,
    modality_lipschitz,
    multimodal_radius,
)
from pyrobust.certify.onnx_model import load_onnx
from pyrobust.certify.part_jobs import AdaptiveJob, DualJob, MixtureJob
from pyrobust.certify.planning import RadiusPlan, radius_plan
from pyrobust.certify.population import SMOOTHING_POPULATION, Population
from pyrobust.certify.propagation_tightness import (
    TightnessProfile,
    certified_margin,
    expected_init_tightness,
    interval_bounds,
    is_propagation_invariant,
    propagation_tightness,
    tightness_by_layer,
)
from pyrobust.certify.property import Verdict, decide_property
from pyrobust.certify.radii import ablation_radius, laplace_radius, uniform_radius
from pyrobust.certify.ranking_job import RankingJob, load_synonyms
from pyrobust.certify.sentence_models import sentence_bi_encoder, sentence_cross_encoder
from pyrobust.certify.sequential import (
    SequentialDesign,
    fixed_design,
    look_schedule,
    optimal_design,
    sequential_design,
    spending_design,
)
from pyrobust.certify.smoothed_great_score import SmoothedGreatScore, smoothed_great_score
from pyrobust.certify.smoothed_mixture import SmoothedMixture
from pyrobust.certify.statistics import (
    class_bounds,
    clopper_pearson_lower,
    clopper_pearson_upper,
    empirical_bernstein_margin,
    gaussian_radius,
    hoeffding_lower,
    hoeffding_upper,
    randomised_lower,
    union_bound,
)
from pyrobust.certify.sub_image import SubImage, checkerboard_masks, partition_masks
from pyrobust.certify.synonym_table import SynonymTable
from pyrobust.certify.tightness_job import TightnessJob
from pyrobust.certify.verification import verified
from pyrobust.certify.vnnlib import Property, PropertyCase, load_vnnlib, parse_vnnlib

__all__ = [
    "randomised_lower",
    "Property",
    "PropertyCase",
    "Verdict",
    "decide_property",
    "load_onnx",
    "load_synonyms",
    "load_vnnlib",
    "parse_vnnlib",
    "GreatJob",
    "AdaptiveJob",
    "DualJob",
    "MixtureJob",
    "MultimodalJob",
    "lipschitz_radius",
    "smoothed_lipschitz",
    "smoothed_mixture_radius",
    "SmoothedMixture",
    "ABSTAIN",
    "after_linear_samples",
    "noise_factor",
    "split_first_linear",
    "BiEncoder",
    "Certificate",
    "CertificationJob",
    "IntervalJob",
    "JobMethod",
    "SmoothingJob",
    "certificate_of_log",
    "DualSmoothedClassifier",
    "DualSmoothingCertificate",
    "ModalityLipschitz",
    "Population",
    "RadiusPlan",
    "RankingCertificate",
    "RankingJob",
    "TightnessJob",
    "SMOOTHING_POPULATION",
    "SequentialCertificate",
    "SequentialDesign",
    "SmoothedGreatScore",
    "SmoothedRanker",
    "SmoothingCertificate",
    "SubImage",
    "SynonymTable",
    "checkerboard_masks",
    "dual_radius",
    "partition_masks",
    "TightnessProfile",
    "ablation_radius",
    "bound",
    "certified_margin",
    "certified_robust_query",
    "certify_multimodal",
    "certify_to_log",
    "class_bounds",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "conv_norm_bound",
    "empirical_bernstein_margin",
    "expected_init_tightness",
    "fixed_design",
    "fused_radius",
    "gaussian_radius",
    "hoeffding_lower",
    "hoeffding_upper",
    "interval_bounds",
    "laplace_radius",
    "is_propagation_invariant",
    "lipschitz_bound",
    "look_schedule",
    "margin_specification",
    "modality_lipschitz",
    "multimodal_radius",
    "optimal_design",
    "propagation_tightness",
    "radius_plan",
    "sentence_bi_encoder",
    "sentence_cross_encoder",
    "sequential_design",
    "smoothed_great_score",
    "spending_design",
    "tightness_by_layer",
    "uniform_radius",
    "union_bound",
    "verified",
]
