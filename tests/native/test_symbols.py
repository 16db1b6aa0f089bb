"""Objects built with wide instructions must not offer code that the linker could share."""

import shutil
import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).resolve().parents[2] / "build"
OBJECTS = sorted(
    path for isa in ("avx2", "avx512", "amx") for path in BUILD.rglob(f"csrc/*/{isa}.cpp.o")
)


@pytest.mark.skipif(not OBJECTS, reason="no build tree beside the tests")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_isa_objects_define_only_their_tables():
    for path in OBJECTS:
        run = subprocess.run(
            ["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True
        )
        for line in run.stdout.splitlines():
            kind, name = line.split(maxsplit=2)[-2:]
            assert kind not in "uVvWw", f"{path.name}: {name} could be merged into another file"
            if kind.isupper():
                table = name.lower().removesuffix("()").endswith("kernels")
                assert table, f"{path.name}: {name} is visible"
