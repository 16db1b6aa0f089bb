"""The table of packed products: its cells, its text, and its place in ``bench/results``."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, field
from pathlib import Path

from . import limits
from .peer import Peer

RESULTS = Path(__file__).parent / "results"
LEGEND = """\
A cell: microseconds, GB/s of packed weights, for ours the fastest other product of the same width
(or dense) over it, and the share of the limit: bytes over the bandwidth measured in the same run
for weights of this size, or multiplications over those of `vpdpbusd` from registers, whichever is
longer. "hot" uses a weight again and again, "beyond cache" reads 128 MiB of other data in between.
Times are the least of interleaved rounds; one thread is timed by its own clock, since the machine
is shared.
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


@dataclass
class Section:
    """One shape, number of threads and state of the caches: seconds by kind and rows of x."""

    shape: tuple[int, int]
    threads: int
    cold: bool
    seconds: dict[int, dict[Peer, float]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The heading in the file."""
        rows, cols = self.shape
        state = "beyond cache" if self.cold else "hot"
        return f"Packed matmul, {rows} x {cols}, {self.threads} threads, {state}"

    def best_peer(self, kind: Peer, batch: int) -> float:
        """Seconds of the fastest other product of the width of ``kind``, or dense."""
        return min(
            seconds
            for other, seconds in self.seconds[batch].items()
            if not other.ours and other.bits in (kind.bits, 16, 32)
        )

    def limit(self, kind: Peer, batch: int) -> float:
        """Seconds that the machine needs at least, by memory and by 8-bit arithmetic."""
        size = limits.BEYOND_CACHE if self.cold else kind.nbytes
        reading = kind.nbytes / limits.bandwidth(size, self.threads)
        rate = self.threads * limits.int8_rate()
        work = 2 * batch * self.shape[0] * self.shape[1]
        return max(reading, work / rate if rate else 0.0)

    def cell(self, kind: Peer, batch: int) -> str:
        """One cell of the table; empty where the kind was left out as far too slow."""
        seconds = self.seconds[batch].get(kind)
        if seconds is None:
            return " " * 28
        ratio = f"{self.best_peer(kind, batch) / seconds:5.2f}x" if kind.ours else " " * 6
        rate, share = kind.nbytes / seconds / 1e9, self.limit(kind, batch) / seconds
        return f"{1e6 * seconds:9.0f} {rate:6.1f} {ratio}{share:5.0%}"

    def text(self) -> str:
        """The section as Markdown, with its heading."""
        kinds = list(next(iter(self.seconds.values())))
        lines = [" " * 32 + "".join(f"{f'M={m}':>28}" for m in self.seconds)]
        lines += [
            f"{kind.name:32}" + "".join(self.cell(kind, m) for m in self.seconds) for kind in kinds
        ]
        body = "\n".join(line.rstrip() for line in lines)
        size = limits.BEYOND_CACHE if self.cold else 8 << 20
        speed = limits.bandwidth(size, self.threads) / 1e9
        bound = f"Measured: {speed:.1f} GB/s read of {size >> 20} MiB, "
        bound += f"{self.threads * limits.int8_rate() / 1e9:.0f} GOP/s of `vpdpbusd`."
        return f"## {self.title}\n{bound}\n```\n{body}\n```\n"


def write_section(section: Section, command: str) -> Path:
    """Put ``section`` into this processor's file, in place of an earlier one of the same title."""
    path = RESULTS / f"cpu-{processor()}.md"
    head = f"# {processor()}\n\nPacked matmul: `{command}`\n\n{LEGEND}"
    old = path.read_text() if path.exists() else head
    parts = re.split(r"(?m)^(?=## )", old)
    kept = [part for part in parts[1:] if not part.startswith(f"## {section.title}\n")]
    tables = [part for part in kept if part.startswith("## Packed matmul, ")]
    others = [part for part in kept if part not in tables]
    tables = sorted([*(t.rstrip() + "\n" for t in tables), section.text()])
    path.write_text("\n".join([head, *tables, *(o.rstrip() + "\n" for o in others)]))
    return path
