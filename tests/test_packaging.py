"""What an installation holds and needs."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_importing_needs_no_compiler(tmp_path):
    code = "import pyrobust, pyrobust.nn, pyrobust.demo; print(pyrobust.info().isa)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PATH": str(tmp_path), "CC": "/bin/false", "CXX": "/bin/false"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in ("portable", "avx2", "avx512", "amx")


def test_the_native_module_does_not_link_torch():
    from pyrobust import _native

    content = Path(_native.__file__).read_bytes()
    for library in (b"libtorch", b"libc10", b"libtorch_cpu"):
        assert library not in content


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("scikit_build_core"), reason="scikit-build-core is not installed"
)
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    command = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    config = ["-C", f"build-dir={tmp_path / 'build'}"]
    subprocess.run([sys.executable, "-m", *command, *config], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("pyrobust-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for p in ROOT.glob("pyrobust*/**/*.py")}
    assert modules <= names
    assert {"pyrobust/py.typed", "pyrobust/_native.pyi"} <= names
    rest = {n for n in names - modules if ".dist-info/" not in n and not n.endswith(".pyi")}
    assert all(
        n == "pyrobust/py.typed" or Path(n).name.startswith(("_native.", "_cuda.")) for n in rest
    ), rest
