"""Neural networks packed to 1-8 bits, bounded and smoothed, with guarantees that hold."""

from __future__ import annotations

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
