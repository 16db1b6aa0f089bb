"""Arithmetic, matching and spectra of whole state dicts."""

from pyrobust.weights.svd_split import SVDSplit, rank_for_energy, svd_split

__all__ = ["SVDSplit", "rank_for_energy", "svd_split"]
