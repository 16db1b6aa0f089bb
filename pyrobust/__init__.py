"""Neural networks packed to 1-8 bits, bounded and smoothed, with guarantees that hold."""

from __future__ import annotations

import importlib as _importlib
from typing import Any as _Any

import torch as _torch  # loaded first: the native module then shares torch's OpenMP runtime

try:
    from pyrobust import _native
except ImportError as error:
    raise ImportError(
        "pyrobust: the native module is not built here; run `pip install -c constraints.txt -e .` "
        "in the source folder (or `make install`)."
    ) from error

from pyrobust.info import Info, info
from pyrobust.interval import Interval
from pyrobust.io import load, save
from pyrobust.pack import PackReport, pack, pack_report

_native.isa()  # decides the instruction set now, so that a bad PYROBUST_ISA fails at import

__version__ = "0.1.0"
__all__ = ["Info", "Interval", "PackReport", "info", "load", "pack", "pack_report", "save"]
del _torch

_PACKAGES = ("certify", "data", "evaluate", "nn", "ops", "quantize", "train", "weights")


def __getattr__(name: str) -> _Any:
    """Import the method packages at their first use: SciPy alone takes half a second."""
    if name in _PACKAGES:
        return _importlib.import_module(f"pyrobust.{name}")
    raise AttributeError(f"module 'pyrobust' has no attribute {name!r}")
