"""The table of packed products: its cells, its text, and its place in ``bench/results``.

What was measured lies beside the text as JSON, so that a run may fill in some columns of a table
and leave the others as they were: a column, one number of rows of x, is always of one run.
"""

from __future__ import annotations

import json
import platform
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyrobust._machine_limits import BEYOND_CACHE, bandwidth, least_seconds, product_rate

from .peer import Peer

RESULTS = Path(__file__).parent / "results"
LEGEND = """\
A cell: microseconds, GB/s of packed weights, for ours the fastest other product of the same width
(or dense) over it, and the share of the limit: bytes over the bandwidth measured in the same run
for weights of this size, or multiplications over those of `vpdpbusd` from registers (1 bit: or of
sums of five looked up by `vpermw`, if these are more), whichever is longer.
"hot" uses a weight again and again, "beyond cache" reads 128 MiB of other data in between,
then multiplies x with another weight of 256 rows, so that only the weight is out of cache.
Times are the least of interleaved rounds; one thread is timed by its own clock, since the machine
is shared. Products that are far too slow with few rows are left out with more.
"""


def processor() -> str:
    """A name for this CPU, as ``amd-epyc-26-2``: model name, family, model."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return re.sub(r"\W+", "-", platform.processor() or platform.machine()).lower()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.*)$", text, re.MULTILINE))
    name = " ".join(found.get(k, "") for k in ("model name", "cpu family", "model"))
    return re.sub(r"\W+", "-", name).strip("-").lower()


@dataclass(frozen=True)
class Measured:
    """One cell: a product with one number of rows of x; ``limit`` is what the machine needs."""

    bits: float
    ours: bool
    nbytes: int
    seconds: float
    limit: float


@dataclass
class Section:
    """One shape, number of threads and state of the caches: cells by rows of x and name."""

    shape: tuple[int, int]
    threads: int
    cold: bool
    columns: dict[int, dict[str, Measured]] = field(default_factory=dict)
    bounds: dict[int, str] = field(default_factory=dict)  # the limits measured with each column

    @property
    def title(self) -> str:
        """The heading in the file."""
        rows, cols = self.shape
        state = "beyond cache" if self.cold else "hot"
        return f"Packed matmul, {rows} x {cols}, {self.threads} threads, {state}"

    def add(self, batch: int, seconds: dict[Peer, float]) -> None:
        """Put the column of ``batch`` in the place of an earlier one."""
        self.columns[batch] = {
            kind.name: Measured(kind.bits, kind.ours, kind.nbytes, took, self._limit(kind, batch))
            for kind, took in seconds.items()
        }
        size = BEYOND_CACHE if self.cold else 8 << 20
        speed, rate = bandwidth(size, self.threads), self.threads * product_rate()
        signs = self.threads * product_rate(1)
        self.bounds[batch] = (
            f"{speed / 1e9:.1f} GB/s, {rate / 1e9:.0f} GOP/s, {signs / 1e9:.0f} with 1 bit"
        )

    def best_peer(self, bits: float, batch: int) -> float:
        """Seconds of the fastest other product of that width, or dense."""
        return min(
            cell.seconds
            for cell in self.columns[batch].values()
            if not cell.ours and cell.bits in (bits, 16, 32)
        )

    def _limit(self, kind: Peer, batch: int) -> float:
        """Seconds that the machine needs at least, by memory and by 8-bit arithmetic."""
        work = 2 * batch * self.shape[0] * self.shape[1]
        size = BEYOND_CACHE if self.cold else kind.nbytes
        return least_seconds(kind.nbytes, work, self.threads, bits=kind.bits, size=size)

    def cell(self, name: str, batch: int) -> str:
        """One cell of the table; empty where the kind was left out as far too slow."""
        cell = self.columns[batch].get(name)
        if cell is None:
            return " " * 28
        best = self.best_peer(cell.bits, batch)
        ratio = f"{best / cell.seconds:5.2f}x" if cell.ours else " " * 6
        rate, share = cell.nbytes / cell.seconds / 1e9, cell.limit / cell.seconds
        took = f"{1e6 * cell.seconds:9.{0 if cell.seconds > 1e-5 else 1}f}"
        return f"{took} {rate:6.1f} {ratio}{share:5.0%}"

    def text(self) -> str:
        """The section as Markdown, with its heading."""
        batches = sorted(self.columns)
        names = list(dict.fromkeys(name for m in batches for name in self.columns[m]))
        lines = [" " * 32 + "".join(f"{f'M={m}':>28}" for m in batches)]
        lines += [f"{name:32}" + "".join(self.cell(name, m) for m in batches) for name in names]
        body = "\n".join(line.rstrip() for line in lines)
        size = BEYOND_CACHE if self.cold else 8 << 20
        bound = "; ".join(f"M={m}: {self.bounds[m]}" for m in batches)
        bound = f"Measured with each column, reading {size >> 20} MiB and `vpdpbusd`: {bound}."
        return f"## {self.title}\n{bound}\n```\n{body}\n```\n"


def _data_path() -> Path:
    return RESULTS / f"cpu-{processor()}.json"


def _stored() -> dict[str, Any]:
    stored: dict[str, Any] = {}
    if _data_path().exists():
        stored = json.loads(_data_path().read_text())
    return stored


def _fill(section: Section, found: dict[str, Any]) -> None:
    for batch, cells in found.get("columns", {}).items():
        section.columns[int(batch)] = {name: Measured(**cell) for name, cell in cells.items()}
        section.bounds[int(batch)] = found["bounds"][batch]


def read_section(section: Section) -> None:
    """Fill ``section`` with what earlier runs on this processor measured."""
    _fill(section, _stored().get(section.title, {}))


def stored_sections() -> list[Section]:
    """All that earlier runs on this processor measured."""
    sections = []
    for title, found in _stored().items():
        form = re.fullmatch(r"Packed matmul, (\d+) x (\d+), (\d+) threads, (.*)", title)
        if form is not None:
            rows, cols, threads = (int(form[i]) for i in (1, 2, 3))
            section = Section((rows, cols), threads, form[4] != "hot")
            _fill(section, found)
            sections.append(section)
    return sections


def write_section(section: Section, command: str) -> Path:
    """Put ``section`` into this processor's files, in place of an earlier one of the same title."""
    stored = _stored()
    cells = {m: {n: asdict(c) for n, c in found.items()} for m, found in section.columns.items()}
    stored[section.title] = {"columns": cells, "bounds": section.bounds}
    _data_path().write_text(json.dumps(stored, indent=1) + "\n")
    head = f"# {processor()}\n\nPacked matmul: `{command}`\n\n{LEGEND}"
    return write_text(f"## {section.title}", section.text(), head)


def write_text(heading: str, text: str, head: str = "") -> Path:
    """Put ``text``, which begins with ``heading``, into the results in place of an earlier one.

    Tables of measurements come first, sorted by heading; what else the file holds keeps its order.
    """
    path = RESULTS / f"cpu-{processor()}.md"
    old = path.read_text() if path.exists() else head
    parts = re.split(r"(?m)^(?=## )", old)
    kept = [part for part in parts[1:] if not part.startswith(f"{heading}\n")]
    tables = [p for p in (*kept, text) if p.startswith("## Packed matmul, ")]
    others = [p for p in (text, *kept) if p not in tables]
    ordered = [parts[0], *sorted(tables), *others]
    path.write_text("\n".join(part.rstrip() + "\n" for part in ordered))
    return path
