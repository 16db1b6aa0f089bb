import json
import os
import subprocess
import sys

import pytest
import torch

import pyrobust
from pyrobust import _native
from pyrobust.info import _isa_reason


def test_info_agrees_with_the_machine():
    facts = pyrobust.info()
    assert facts.isa == _native.isa()
    assert facts.threads == torch.get_num_threads()
    assert facts.version == pyrobust.__version__
    assert facts.cuda == "not built" or facts.cuda
    table = str(facts)
    assert f"torch           {torch.__version__}" in table
    assert json.loads(json.dumps(facts.to_dict()))["isa"] == facts.isa


@pytest.mark.parametrize(
    ("isa", "supported", "forced", "expected"),
    [
        ("amx", ("portable", "avx2", "avx512", "amx"), None, "the fastest there is"),
        ("avx2", ("portable", "avx2"), None, "no avx512 or amx here"),
        ("portable", ("portable", "avx2"), "portable", "PYROBUST_ISA=portable keeps avx2"),
        ("portable", ("portable", "avx2"), None, "set by the program; avx2 would run here"),
    ],
)
def test_the_reason_names_what_holds_back(isa, supported, forced, expected, monkeypatch):
    monkeypatch.delenv("PYROBUST_ISA", raising=False)
    if forced:
        monkeypatch.setenv("PYROBUST_ISA", forced)
    assert _isa_reason(isa, supported).startswith(expected)


def test_a_forced_instruction_set_is_told():
    result = subprocess.run(
        [sys.executable, "-c", "import pyrobust; print(pyrobust.info())"],
        env=os.environ | {"PYROBUST_ISA": "portable"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "isa             portable" in result.stdout
