"""Bounds and certificates: statements with a guarantee."""

from pyrobust.certify.certificates import ABSTAIN, Certificate, SmoothingCertificate
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
    "SmoothingCertificate",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "gaussian_radius",
    "hoeffding_lower",
    "hoeffding_upper",
    "union_bound",
]
