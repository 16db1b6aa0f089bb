"""What the CUDA compiler made of the kernels: registers, spills and, where a disassembler is at
hand, instructions. Used by ``test_cuda_gates.py``."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")
# A memory descriptor that hardware refuses as an illegal instruction: ptxas 13.0 makes such copies
# for sm_90 where an L2 policy meets uniform addresses.
ODD_DESCRIPTOR = r"desc\[UR\d*[13579]\]"


@dataclass
class Kernel:
    """One compiled kernel.

    Attributes:
        registers: of a thread.
        spills: bytes stored and loaded because registers did not suffice.
        code: address and text of every instruction; empty without a disassembler.
    """

    registers: int
    spills: int
    code: list[tuple[int, str]] = field(default_factory=list)

    def loops(self) -> list[tuple[int, int]]:
        """First and last address of every loop, the longest first."""
        found = []
        for address, text in self.code:
            target = re.search(r"BRA.*?0x([0-9a-f]+)", text)
            if target and int(target[1], 16) < address:
                found.append((int(target[1], 16), address))
        return sorted(found, key=lambda loop: loop[0] - loop[1])

    def counts(self, first: int = 0, last: int = 1 << 62) -> Counter[str]:
        """Instructions between two addresses by name, the modifiers left off."""
        names = (
            re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]
            for address, text in self.code
            if first <= address <= last
        )
        return Counter(names)

    def has(self, pattern: str) -> bool:
        """Whether an instruction matches."""
        return any(re.search(pattern, text) for _, text in self.code)


def disassembler() -> str | None:
    """A folder with ``cuobjdump`` and ``nvdisasm``: PATH, NVIDIA's wheels, or triton's."""
    found = shutil.which("cuobjdump")
    folders = [Path(found).parent] if found else []
    for package, below in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            folders.append(Path(place) / below)
    for folder in folders:
        if all((folder / tool).is_file() for tool in ("cuobjdump", "nvdisasm")):
            return str(folder)
    return None


def compile_kernels(source: str, architecture: int | str, folder: Path) -> dict[str, Kernel]:
    """Kernels of ``csrc/<source>`` by demangled name."""
    assert NVCC is not None
    output = folder / "kernels.cubin"
    command = [NVCC, "-std=c++17", "-fmad=false", "-I", str(ROOT / "csrc"), "-cubin"]
    command += [f"-arch=sm_{architecture}", "-Xptxas", "-v", "-o", str(output)]
    run = subprocess.run(
        [*command, str(ROOT / "csrc" / source)], capture_output=True, text=True, check=True
    )
    kernels = {}
    entry = re.compile(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    for name, stores, loads, registers in entry.findall(run.stderr):
        kernels[name] = Kernel(int(registers), int(stores) + int(loads))
    folder_of_tools = disassembler()
    if folder_of_tools is not None:
        _read_code(output, folder_of_tools, kernels)
    plain = subprocess.run(
        ["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True
    )
    return dict(zip(plain.stdout.splitlines(), kernels.values(), strict=True))


def _read_code(cubin: Path, tools: str, kernels: dict[str, Kernel]) -> None:
    run = subprocess.run(
        [f"{tools}/cuobjdump", "-sass", str(cubin)],
        env=os.environ | {"PATH": tools + os.pathsep + os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    kernel = None
    for line in run.stdout.splitlines():
        if name := re.search(r"Function : (\S+)", line):
            kernel = kernels.get(name[1])
        elif kernel is not None and (found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line)):
            kernel.code.append((int(found[1], 16), found[2]))
