"""Attacks, scores, detectors and benchmark protocols."""
