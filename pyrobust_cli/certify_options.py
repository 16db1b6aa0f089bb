"""The options of ``pyrobust certify``: one row per method, read before anything slow is imported.

The name of an option is that of a field of the method's class in ``pyrobust.certify.job_methods``,
which holds its default and checks its value.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["METHODS", "add_method_options", "method_options"]


class Option(NamedTuple):
    """How an option is read and explained."""

    kind: Callable[[str], Any]
    help: str


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between."""
    return tuple(float(part) for part in text.split(","))


_OPTIONS = {
    "eps": Option(float, "l-infinity radius, pixels in [0, 1] (default: 0.1)"),
    "bound": Option(
        str, "ibp (default), crown-ibp, crown or alpha-crown; for a property the last to try"
    ),
    "sigma": Option(float, "standard deviation of the noise (default: 0.25)"),
    "samples": Option(
        int, "noisy copies per image or draws per document, with --radii at most (default: 1000)"
    ),
    "selection": Option(int, "noisy copies that choose the class (default: 100)"),
    "alpha": Option(float, "probability of error per image (default: 0.001)"),
    "seed": Option(int, "of the noise (default: 0)"),
    "radii": Option(numbers, "R1,R2,...: decide these radii, with as few copies as it takes"),
    "batch_size": Option(int, "copies per forward pass (default: 512)"),
    "weight": Option(float, "share of the robust part in a mixture (default: 0.85)"),
    "standard_scale": Option(float, "factor of the accurate part's logits (default: 1)"),
    "robust_scale": Option(float, "factor of the robust part's logits (default: 1)"),
    "activation": Option(str, "squashing of the logits: sigmoid or softmax (default: sigmoid)"),
    "temperature": Option(float, "of the squashing (default: 1)"),
    "scheme": Option(str, "checkerboard or columns (default: checkerboard)"),
    "fill": Option(str, "pool, zero or bilinear: what stands at hidden pixels (default: pool)"),
    "norm": Option(str, "of the radii: l2, l1 or l0 (default: l2)"),
    "noise": Option(str, "uniform or laplace for l1 (default: the first of the norm)"),
    "grid": Option(int, "255 for 8-bit images: exact noise on their grid (l2)"),
    "planned": Option(bool, "let the first copies choose how many a radius is worth"),
    "price": Option(float, "of a copy with --planned, in sigmas of radius (default: 1e-6)"),
    "randomised": Option(bool, "bound with hardly any of alpha left unused"),
    "relu": Option(str, "local, center or identity: where ReLUs are linearised (default: local)"),
    "attacked": Option(int, "the one modality that may move (default: all, jointly)"),
    "synonyms": Option(str, "file of the words that may stand for one another"),
    "top": Option(int, "ranks to protect (default: 10)"),
    "max_edits": Option(int, "words that may be changed per document (default: all)"),
    "candidates": Option(int, "documents of highest plain score to rank (default: all)"),
    "held_out": Option(int, "last queries, which only calibrate (default: 10)"),
    "squash": Option(str, "calibrated, sigmoid or identity: scores to [0, 1]"),
    "block": Option(int, "images that share forward passes, with --radii (default: 64)"),
}

# method: the options that it takes
METHODS: dict[str, tuple[str, ...]] = {
    "ibp": ("eps", "bound"),
    "smoothing": (
        "sigma",
        "samples",
        "selection",
        "alpha",
        "seed",
        "radii",
        "batch_size",
        "block",
        "norm",
        "noise",
        "grid",
        "planned",
        "price",
        "randomised",
    ),
    "dual": ("sigma", "samples", "selection", "alpha", "seed", "scheme", "fill", "batch_size"),
    "adaptive": (
        "sigma",
        "weight",
        "samples",
        "selection",
        "alpha",
        "seed",
        "standard_scale",
        "batch_size",
    ),
    "great": ("sigma", "samples", "alpha", "seed", "activation", "temperature", "batch_size"),
    "ranking": (
        "synonyms",
        "top",
        "max_edits",
        "candidates",
        "held_out",
        "squash",
        "samples",
        "alpha",
        "seed",
        "batch_size",
    ),
    "multimodal": ("attacked",),
    "tightness": ("eps", "relu"),
    "mixture": ("eps", "weight", "standard_scale", "robust_scale"),
}


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--method`` and every method's options; their defaults stay with the methods."""
    parser.add_argument("--method", choices=list(METHODS), default="ibp")
    for name, option in _OPTIONS.items():
        users = ", ".join(method for method, names in METHODS.items() if name in names)
        flag = f"--{name.replace('_', '-')}"
        text = f"{users}: {option.help}"
        if option.kind is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(flag, type=option.kind, default=argparse.SUPPRESS, help=text)


def method_options(options: argparse.Namespace) -> dict[str, Any]:
    """The method options that were given, also those of other methods."""
    return {name: getattr(options, name) for name in _OPTIONS if hasattr(options, name)}
