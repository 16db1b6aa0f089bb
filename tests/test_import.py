"""Importing pyrobust and choosing an instruction set."""

import os
import subprocess
import sys

import pytest

from pyrobust import _native


def test_best_instruction_set_is_supported():
    assert _native.isa() in _native.supported_isas()


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="PYROBUST_ISA must be one of portable, avx2"):
        _native.set_isa("sse9")


@pytest.mark.parametrize("name", ["sse9", "portable"])
def test_environment_variable_decides_at_import(name):
    code = "import pyrobust; from pyrobust import _native; print(_native.isa())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYROBUST_ISA": name},
        capture_output=True,
        text=True,
    )
    if name == "portable":
        assert run.stdout.strip().endswith("portable")
    else:
        assert run.returncode != 0
        assert "PYROBUST_ISA must be one of" in run.stderr
