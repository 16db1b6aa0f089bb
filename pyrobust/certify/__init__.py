"""Bounds and certificates: statements with a guarantee."""

from pyrobust.certify.bound import bound, margin_specification, verified
from pyrobust.certify.certificates import (
    ABSTAIN,
    Certificate,
    SequentialCertificate,
    SmoothingCertificate,
)
from pyrobust.certify.log import CertificationJob, certify_to_log
from pyrobust.certify.population import SMOOTHING_POPULATION, Population
from pyrobust.certify.sequential import (
    SequentialDesign,
    look_schedule,
    optimal_design,
    sequential_design,
    spending_design,
)
from pyrobust.certify.statistics import (
    clopper_pearson_lower,
    clopper_pearson_upper,
    gaussian_radius,
    hoeffding_lower,
    hoeffding_upper,
    union_bound,
)

__all__ = [
    "ABSTAIN",
    "Certificate",
    "CertificationJob",
    "Population",
    "SMOOTHING_POPULATION",
    "SequentialCertificate",
    "SequentialDesign",
    "SmoothingCertificate",
    "bound",
    "certify_to_log",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "gaussian_radius",
    "hoeffding_lower",
    "hoeffding_upper",
    "look_schedule",
    "margin_specification",
    "optimal_design",
    "sequential_design",
    "spending_design",
    "union_bound",
    "verified",
]
