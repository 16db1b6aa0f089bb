"""Losses and training procedures."""
