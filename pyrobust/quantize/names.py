"""Names of quantizers, for the command line, configuration files and ``pyrobust.pack``."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from pyrobust._checks import check_choice

__all__ = ["QUANTIZERS", "quantizer_named"]

QUANTIZERS: dict[str, str] = {
    "adadim": "pyrobust.quantize.adadim:AdaDim",
    "gptq": "pyrobust.quantize.gptq:GPTQ",
    "gwq": "pyrobust.quantize.gwq:GWQ",
    "learned_rounding": "pyrobust.quantize.learned_rounding:LearnedRounding",
    "rtn": "pyrobust.quantize.round_to_nearest:round_to_nearest",
    "nf4": "pyrobust.quantize.codebook:round_to_codebook",
    "two-level": "pyrobust.quantize.two_level:round_to_two_level",
}
"""Where each name is at home, imported at its first use; a class is used with its defaults."""


def quantizer_named(subject: str, name: str) -> Any:
    """The quantizer of that name: a function, or an object with default options.

    Raises:
        ValueError: there is no such name.
    """
    check_choice(subject, "quantizer", name, QUANTIZERS)
    module, _, attribute = QUANTIZERS[name].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    return found() if inspect.isclass(found) else found
