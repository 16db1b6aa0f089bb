"""Bounds and certificates: statements with a guarantee."""
