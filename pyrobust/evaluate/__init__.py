"""Attacks, scores, detectors and benchmark protocols."""

from pyrobust.evaluate.loss_barrier import (
    BarrierCurve,
    loss_barrier,
)
from pyrobust.evaluate.ownership import (
    Ownership,
    bit_accuracy,
    ownership_threshold,
    verify_ownership,
)
from pyrobust.evaluate.singular_alignment import singular_alignment
from pyrobust.evaluate.word_substitution import SubstitutionResult, word_substitution_attack

__all__ = [
    "BarrierCurve",
    "Ownership",
    "SubstitutionResult",
    "bit_accuracy",
    "loss_barrier",
    "ownership_threshold",
    "singular_alignment",
    "verify_ownership",
    "word_substitution_attack",
]
