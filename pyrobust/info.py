"""What this installation runs on: versions, instruction set, threads, CUDA module."""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pyrobust import _native

__all__ = ["Info", "info"]

_ORDER = ("portable", "avx2", "avx512", "amx")
_ALL_PARTS = "the CPU or the operating system lacks a part of it"


@dataclass(frozen=True)
class Info:
    """The facts that explain a speed or a bug report; prints as a table.

    Attributes:
        version: of pyrobust.
        python: version and implementation.
        torch: version of torch in use.
        platform: operating system and machine.
        isa: instruction set of the kernels.
        isa_reason: why a faster one is not in use.
        supported_isas: all sets that this machine offers.
        threads: torch's threads, which the kernels share.
        openmp: what torch says about its OpenMP.
        cuda: state of the CUDA module.
    """

    version: str
    python: str
    torch: str
    platform: str
    isa: str
    isa_reason: str
    supported_isas: tuple[str, ...]
    threads: int
    openmp: str
    cuda: str

    def to_dict(self) -> dict[str, Any]:
        """Plain strings, numbers and lists, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = self.to_dict() | {"supported_isas": ", ".join(self.supported_isas)}
        return "\n".join(f"{name.replace('_', ' '):<15} {value}" for name, value in rows.items())


def info() -> Info:
    """Facts about this installation.

    Example:
        >>> info().isa in ("portable", "avx2", "avx512", "amx")
        True
    """
    from pyrobust import __version__

    supported = tuple(_native.supported_isas())
    isa = _native.isa()
    return Info(
        version=__version__,
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        torch=torch.__version__,
        platform=f"{platform.system()} {platform.machine()}",
        isa=isa,
        isa_reason=_isa_reason(isa, supported),
        supported_isas=supported,
        threads=torch.get_num_threads(),
        openmp=_openmp(),
        cuda=_cuda(),
    )


def _isa_reason(isa: str, supported: tuple[str, ...]) -> str:
    """Why no set above ``isa`` is in use."""
    faster = _ORDER[_ORDER.index(isa) + 1 :]
    if not faster:
        return "the fastest there is"
    held_back = [name for name in faster if name in supported]
    if held_back and os.environ.get("PYROBUST_ISA"):
        return f"PYROBUST_ISA={os.environ['PYROBUST_ISA']} keeps {', '.join(held_back)} out of use"
    if held_back:
        return f"set by the program; {', '.join(held_back)} would run here"
    return f"no {' or '.join(faster)} here: {_ALL_PARTS}"


def _openmp() -> str:
    """Torch's own line about OpenMP."""
    lines = torch.__config__.parallel_info().splitlines()
    return next((line.strip() for line in lines if line.startswith("OpenMP")), "not available")


def _cuda() -> str:
    """Whether the CUDA module is built and what it finds."""
    try:
        module = importlib.import_module("pyrobust._cuda")
    except ImportError:
        return "not built"
    status = getattr(module, "status", None)
    return str(status()) if callable(status) else "built"
