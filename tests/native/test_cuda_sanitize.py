"""``tests/cuda/sanitize.sh`` with a stand-in for compute-sanitizer: which reports count."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "cuda" / "sanitize.sh"
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]

# Writes what a file of the tool's name holds to the log, and ends as the tool would: by 1 where it
# was asked to and found something, else as the tests did.
STAND_IN = """#!/bin/sh
exitcode=0
while [ "$#" -gt 0 ]; do
    case $1 in
        --tool) tool=$2; shift ;;
        --error-exitcode) exitcode=$2; shift ;;
        --target-processes) shift ;;
        --log-file) log=$2; shift ;;
        *) break ;;
    esac
    shift
done
echo "$tool: $*"
here=$(dirname "$0")
[ ! -f "$here/$tool.tests" ] || exit 3
[ -f "$here/$tool.report" ] || exit 0
cat "$here/$tool.report" >"$log"
exit "$exitcode"
"""


@pytest.fixture
def sanitize(tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(STAND_IN)
    tool.chmod(0o755)

    def run():
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["sh", str(SCRIPT)],
            env=os.environ | {"PATH": path, "PYTHON": "its-python"},
            capture_output=True,
            text=True,
        )

    return run


def test_all_four_tools_run_the_gpu_tests(sanitize):
    done = sanitize()
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [*TOOLS, "sanitize"]
    assert all("its-python -m pytest -q tests/cuda" in line for line in lines[:-1])


@pytest.mark.parametrize("tool", TOOLS)
def test_reports_of_our_kernels_fail_and_the_other_tools_still_run(sanitize, tmp_path, tool):
    text = "=== Error: at pyrobust::matmul::gpu::few_linear_kernel<...>+0x10"
    (tmp_path / f"{tool}.report").write_text(text)
    done = sanitize()
    assert done.returncode == 1
    assert text in done.stdout
    assert f"{tool}(pyrobust)" in done.stderr
    assert all(f"{each}: " in done.stdout for each in TOOLS)


@pytest.mark.parametrize("tool", TOOLS)
def test_reports_of_libraries_count_where_they_are_faults(sanitize, tmp_path, tool):
    (tmp_path / f"{tool}.report").write_text("=== Warning: at nvjet_tst_256x128_64x4+0x10")
    assert sanitize().returncode == (1 if tool in ("memcheck", "synccheck") else 0)


@pytest.mark.parametrize("tool", TOOLS)
def test_tests_that_fail_under_a_tool_fail(sanitize, tmp_path, tool):
    (tmp_path / f"{tool}.tests").touch()
    done = sanitize()
    assert done.returncode == 1
    assert tool in done.stderr
