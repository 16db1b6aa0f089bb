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


PUBLIC_NAMES = [
    "pack",
    "info",
    "Interval",
    "save",
    "load",
    "nn.PackedLinear",
    "nn.PackedConv1d",
    "nn.PackedConv2d",
    "nn.PackedEmbedding",
    "nn.SmoothedClassifier",
    "ops.packed_linear",
    "ops.gaussian_samples",
    "ops.count_votes",
    "ops.grid_samples",
    "ops.masked_samples",
    "ops.interval_linear",
    "certify.bound",
    "certify.verified",
    "certify.clopper_pearson_lower",
    "certify.gaussian_radius",
]


def test_public_names_need_only_the_top_import():
    code = f"import pyrobust; [eval('pyrobust.' + name) for name in {PUBLIC_NAMES!r}]; print('ok')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip().endswith("ok"), run.stderr


def test_unknown_attribute_is_an_attribute_error():
    import pyrobust

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pyrobust.nonsense
