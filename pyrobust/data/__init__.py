"""Generators and small loaders."""

from pyrobust.data.cifar import load_cifar
from pyrobust.data.class_generator import (
    ClassGaussian,
    ClassGenerator,
    DiffusersGenerator,
    draw_labelled,
)
from pyrobust.data.corruptions import CORRUPTIONS, KORNIA_CORRUPTIONS, corrupt
from pyrobust.data.digits import load_digits
from pyrobust.data.idx import load_idx
from pyrobust.data.image_folder import load_image_folder
from pyrobust.data.image_set import ImageSet
from pyrobust.data.sources import load_images
from pyrobust.data.text_collection import TextCollection, load_texts

__all__ = [
    "CORRUPTIONS",
    "KORNIA_CORRUPTIONS",
    "ClassGaussian",
    "ClassGenerator",
    "DiffusersGenerator",
    "ImageSet",
    "TextCollection",
    "corrupt",
    "load_cifar",
    "draw_labelled",
    "load_digits",
    "load_idx",
    "load_image_folder",
    "load_images",
    "load_texts",
]
