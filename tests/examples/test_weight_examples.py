"""The examples of methods on weights import what exists; run whole, they print their tables."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# name: what its table must hold, and whether it draws a plot where a file is named
TABLES = {
    "atlas": ("own models", False),
    "farms": ("0.weight", False),
    "lora_watermark": ("after JPEG 80: claimed", False),
    "rift": ("accuracy drop", True),
    "robust_weight_signatures": ("strength", True),
    "siren_square": ("WINNER, rescaled", False),
    "svfit": ("SVFit, full length", False),
    "weight_compander": ("companded", False),
    "weight_matching": ("matched", True),
}


@pytest.mark.parametrize("name", TABLES)
def test_it_imports(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.main)


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_it_runs(name, tmp_path):
    expected, draws = TABLES[name]
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    plot = tmp_path / "plot.png"
    if draws:
        pytest.importorskip("matplotlib")
        command.append(str(plot))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert len(re.findall(r"\d\.\d", done.stdout)) >= 4
    assert plot.exists() == draws
