"""The CUDA module loads on any machine, and says what it finds there."""

import shutil
import subprocess
import sys

import pytest
import torch

import pyrobust
from pyrobust.ops import _cuda_module

BUILT = _cuda_module.has_cuda_module()
needs_module = pytest.mark.skipif(not BUILT, reason="pyrobust._cuda is not built here")


def test_info_tells_the_state_of_the_module():
    text = pyrobust.info().cuda
    assert text.startswith("built for compute capability") if BUILT else text == "not built"


@needs_module
def test_it_loads_without_torch_having_touched_cuda():
    code = (
        "import torch, pyrobust._cuda as m; print(m.status()); "
        "assert not torch.cuda.is_initialized()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "compute capability 8.0" in run.stdout


@needs_module
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_it_needs_no_cuda_library():
    path = _cuda_module.cuda_module("test").__file__
    run = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True)
    needed = [line for line in run.stdout.splitlines() if "NEEDED" in line]
    assert needed
    assert not any("cuda" in line or "torch" in line for line in needed)


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_launch_without_a_device_is_one_sentence():
    with pytest.raises(RuntimeError, match="CUDA: "):
        _cuda_module.cuda_module("test").check_device(0)
