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


def test_what_editable_installations_switch_on_wheels_switch_off():
    """Both may use one build folder, where CMake remembers what it was told last."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]
    (editable,) = (each for each in settings["overrides"] if each["if"] == {"state": "editable"})
    defines = settings["cmake"]["define"]
    shims = [name for name in editable["cmake"]["define"] if name.endswith("_SHIM")]
    assert len(shims) == 2
    for name in shims:
        assert (defines[name], editable["cmake"]["define"][name]) == ("OFF", "ON")


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
    _bench_of_an_installation(wheel, tmp_path / "installed")


def _bench_of_an_installation(wheel: Path, folder: Path) -> None:
    """The short measurement needs nothing that a wheel does not hold."""
    zipfile.ZipFile(wheel).extractall(folder)
    # Without site, an editable installation of this package is not found; torch still is.
    paths = [str(folder), *(path for path in sys.path if path.endswith("site-packages"))]
    code = "import sys; sys.path[:0] = {!r}; import pyrobust, pyrobust_cli; "
    code += "print(pyrobust.__file__); sys.exit(pyrobust_cli.main(['bench', 'matmul']))"
    command = [sys.executable, "-I", "-S", "-c", code.format(paths)]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    place, head, *lines = run.stdout.splitlines()
    assert place.startswith(str(folder))
    assert "this machine's limit" in head
    assert len(lines) == 6 * 2 * 2
