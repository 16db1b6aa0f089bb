"""Attacks, scores, detectors and benchmark protocols."""

from pyrobust.evaluate.attack_objective import AttackObjective, attack_loss, evaluation_mode
from pyrobust.evaluate.attack_report import AttackReport, attack_report
from pyrobust.evaluate.auto_pgd import auto_pgd, targeted_auto_pgd
from pyrobust.evaluate.confidence_margin import confidence_margin, squash
from pyrobust.evaluate.great_calibration import CalibratedGreatScore, calibrate_great_score
from pyrobust.evaluate.great_score import (
    GreatScore,
    great_sample_size,
    great_score,
    great_score_from_logits,
    merge_great_scores,
)
from pyrobust.evaluate.loss_barrier import (
    BarrierCurve,
    loss_barrier,
)
from pyrobust.evaluate.multimodal_pgd import multimodal_pgd
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
    "CalibratedGreatScore",
    "GreatScore",
    "Ownership",
    "SubstitutionResult",
    "bit_accuracy",
    "calibrate_great_score",
    "confidence_margin",
    "great_sample_size",
    "great_score",
    "great_score_from_logits",
    "loss_barrier",
    "merge_great_scores",
    "multimodal_pgd",
    "ownership_threshold",
    "singular_alignment",
    "squash",
    "verify_ownership",
    "word_substitution_attack",
]
