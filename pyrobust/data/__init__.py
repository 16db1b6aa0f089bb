"""Generators and small loaders."""

from pyrobust.data.digits import load_digits
from pyrobust.data.idx import load_idx
from pyrobust.data.image_set import ImageSet

__all__ = ["ImageSet", "load_digits", "load_idx"]
