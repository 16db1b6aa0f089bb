"""Shared test settings: one OpenMP thread (two spinning ones on two busy cores are 10x slower)."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import atexit
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

# Designs computed by an earlier version must not meet the tests of this one.
if "PYROBUST_CACHE" not in os.environ:
    os.environ["PYROBUST_CACHE"] = tempfile.mkdtemp(prefix="pyrobust-tests-")
    atexit.register(shutil.rmtree, os.environ["PYROBUST_CACHE"], ignore_errors=True)

DATA_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data beside the checkout; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("PYROBUST_TEST_DATA", DATA_FOLDER))
    if not folder.is_dir():
        pytest.skip(f"real data folder {folder} is absent (set PYROBUST_TEST_DATA)")
    return folder


def native_isas() -> list[str]:
    from pyrobust import _native

    return _native.supported_isas()


@pytest.fixture(params=["portable", "avx2", "avx512", "amx"])
def isa(request):
    """Run a test once per instruction set that this machine has."""
    from pyrobust import _native

    if request.param not in native_isas():
        pytest.skip(f"this machine does not support {request.param}")
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def emulated_cuda(request, monkeypatch):
    """The CUDA kernels on fibres in place of ``pyrobust._cuda``, in both orders of threads.

    The functions of ``pyrobust/ops/_cuda_*.py`` then run on CPU tensors.
    """
    shim = pytest.importorskip("pyrobust._cuda_shim", reason="not built (PYROBUST_CUDA_SHIM=ON)")
    from pyrobust.ops import _cuda_module

    shim.set_options(descending=request.param)
    shim.take_counters()
    monkeypatch.setattr(_cuda_module, "_load", lambda: shim)
    yield shim
    shim.set_options()
