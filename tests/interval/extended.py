"""References in 64-bit extended precision: how far torch's functions of one number are off."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).with_name("extended.c")


class Widening(ctypes.Structure):
    """The bounds of a Curve that errors are judged by."""

    _fields_ = [
        (name, ctypes.c_double)
        for name in (
            *(
                "relative",
                "steep",
                "deployed",
                "deployed_input",
                "deployed_absolute",
                "range",
                "least",
            ),
        )
    ]


class Worst(ctypes.Structure):
    """Largest errors as shares of their widening, where they are, and in units of 2^-53."""

    _fields_ = [
        (name, ctypes.c_double)
        for name in ("real", "real_at", "real_units", "deployed", "deployed_at")
    ]


@dataclass(frozen=True)
class Reference:
    """The compiled functions."""

    library: ctypes.CDLL
    numbers: dict[str, int]

    def compare(self, name, curve, x, wide, narrow, worst, least=2.0**-1050):
        """Take the errors of ``wide`` (float64) and ``narrow`` (float32) at ``x`` into worst.

        Those of ``wide`` that are no larger than ``least`` do not count.
        """
        bounds = (getattr(curve, field) for field, _ in Widening._fields_[:-2])
        most = np.finfo(np.float32).max / 8 if curve.turn is not None else np.inf
        widening = Widening(*bounds, most, least)
        x, wide, narrow = (
            np.ascontiguousarray(values, dtype)
            for values, dtype in ((x, np.float32), (wide, np.float64), (narrow, np.float32))
        )
        self.library.compare(
            self.numbers[name],
            ctypes.byref(widening),
            *(ctypes.c_void_p(values.ctypes.data) for values in (x, wide, narrow)),
            ctypes.c_long(len(x)),
            ctypes.byref(worst),
        )


def build(folder: Path) -> Reference:
    """Compile the references; skips where long double or a compiler is missing."""
    if np.finfo(np.longdouble).nmant < 63:
        pytest.skip("long double has no more bits than double")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the references in extended precision")
    target = folder / "extended.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", SOURCE, "-o", target, "-lm"], check=True)
    library = ctypes.CDLL(str(target))
    library.name_of.restype = ctypes.c_char_p
    numbers: dict[str, int] = {}
    while (name := library.name_of(len(numbers))) is not None:
        numbers[name.decode()] = len(numbers)
    return Reference(library, numbers)
