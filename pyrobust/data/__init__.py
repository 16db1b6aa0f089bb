"""Generators and small loaders."""

from pyrobust.data.corruptions import CORRUPTIONS, corrupt
from pyrobust.data.digits import load_digits
from pyrobust.data.idx import load_idx
from pyrobust.data.image_set import ImageSet

__all__ = [
    "CORRUPTIONS",
    "ImageSet",
    "corrupt",
    "load_digits",
    "load_idx",
]
