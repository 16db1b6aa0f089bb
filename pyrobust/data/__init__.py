"""Generators and small loaders."""
