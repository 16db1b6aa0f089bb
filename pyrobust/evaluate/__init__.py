"""Attacks, scores, detectors and benchmark protocols."""

from pyrobust.evaluate.loss_barrier import BarrierCurve, loss_barrier
from pyrobust.evaluate.singular_alignment import singular_alignment

__all__ = ["BarrierCurve", "loss_barrier", "singular_alignment"]
