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


@pytest.fixture
def watch_passes(monkeypatch):
    """Called with names of native passes: the list of those whose ends are taken from now on."""
    from pyrobust import _native

    taken = []

    def watched(name, kernel):
        def run(*args):
            finite = kernel(*args)
            if finite:
                taken.append(name)
            return finite

        return run

    def watch(*names):
        for name in names:
            monkeypatch.setattr(_native, name, watched(name, getattr(_native, name)))
        return taken

    return watch


def native_isas() -> list[str]:
    from pyrobust import _native

    return _native.supported_isas()


def _emulate_tiles(monkeypatch):
    """Interval products go through emulated AMX tiles: all of them, as the eager paths decline."""
    from pyrobust import _native

    shim = pytest.importorskip("pyrobust._amx_shim", reason="not built (PYROBUST_AMX_SHIM=ON)")
    if "avx512" not in native_isas():
        pytest.skip("no AVX-512 here, which the AMX kernels need besides their tiles")
    others = ("set_interval_coarse_radius", "has_bfloat16_products", "has_bfloat16_tiles", "isa")
    for name in (*(name for name in dir(shim) if name.startswith("interval_")), *others):
        monkeypatch.setattr(_native, name, getattr(shim, name))
    eager = ("eager_interval_linear", "eager_interval_packed", "box_linear", "box_packed_linear")
    for name in (*eager, "box_chain"):
        monkeypatch.setattr(_native, name, lambda *arguments: None)
    shim.take_interval_counters()
    return shim


@pytest.fixture
def emulated_tiles(monkeypatch):
    """The interval kernels for AMX on emulated tiles; gives the module that has them."""
    shim = _emulate_tiles(monkeypatch)
    yield shim
    shim.cut_bfloat16_sums(False)


@pytest.fixture(params=["portable", "avx2", "avx512", "amx"])
def isa(request, monkeypatch):
    """Run a test once per instruction set that this machine has.

    Tests marked ``emulated_tiles`` run the interval kernels for AMX on emulated tiles elsewhere.
    """
    from pyrobust import _native

    if request.param not in native_isas():
        if request.param != "amx" or request.node.get_closest_marker("emulated_tiles") is None:
            pytest.skip(f"this machine does not support {request.param}")
        _emulate_tiles(monkeypatch)
        yield request.param
        return
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
