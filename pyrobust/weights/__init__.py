"""Arithmetic, matching and spectra of whole state dicts."""
