"""Attacks, scores, detectors and benchmark protocols."""

from pyrobust.evaluate.attack_objective import AttackObjective, attack_loss, evaluation_mode
from pyrobust.evaluate.attack_report import AttackReport, attack_report
from pyrobust.evaluate.auto_pgd import auto_pgd, targeted_auto_pgd
from pyrobust.evaluate.loss_barrier import (
    BarrierCurve,
    loss_barrier,
)
from pyrobust.evaluate.norm_ball import NormBall
from pyrobust.evaluate.ownership import (
    Ownership,
    bit_accuracy,
    ownership_threshold,
    verify_ownership,
)
from pyrobust.evaluate.pgd import pgd
from pyrobust.evaluate.singular_alignment import singular_alignment
from pyrobust.evaluate.word_substitution import SubstitutionResult, word_substitution_attack

__all__ = [
    "AttackObjective",
    "attack_loss",
    "evaluation_mode",
    "AttackReport",
    "attack_report",
    "auto_pgd",
    "targeted_auto_pgd",
    "NormBall",
    "pgd",
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
