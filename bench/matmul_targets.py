"""What packed products are meant to reach, beside what was measured: the verdict on each cell.

    python -m bench.matmul_targets

reads what ``test_matmul.py`` stored for this processor, prints the tables of targets and writes
them into its results; columns may come from several runs. A target is the time of the fastest
other product of the same width (or dense) over ours. The machine sets a bound to that ratio: the
other product's time over the least in which memory and 8-bit arithmetic let anyone finish. A
target above that bound is beyond this machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .matmul_table import Measured, Section, stored_sections, write_text

COMMAND = "python -m bench.matmul_targets"
ROWS = (1, 4, 16, 64, 256, 1024)
# Ratios by rows of x that must be reached, and those that would lead; 8-bit activations.
TARGETS = {
    "8 bits": ((1.0, 1.0, 1.0, 1.1, 1.15, 1.3), (1.0, 1.03, 1.1, 1.35, 1.35, 1.55)),
    "4 bits, two-level": ((1.07, 1.4, 1.9, 1.7, 2.0, 2.1), (1.12, 1.5, 2.4, 2.5, 2.5, 2.7)),
    "4 bits": ((1.07, 1.4, 1.8, 1.6, 1.45, 1.55), (1.12, 1.5, 2.2, 2.2, 1.8, 1.9)),
    "3 bits": ((1.8, 2.2, 1.7, 1.9, 2.1, 3.7), (1.9, 3.0, 2.3, 2.7, 2.6, 4.7)),
    "2 bits": ((1.8, 1.65, 2.2, 2.2, 2.2, 3.6), (2.0, 2.3, 3.0, 2.9, 2.8, 4.6)),
    "1.58 bits": ((1.7, 1.35, 3.2, 5.7, 6.2, 7.4), (1.9, 1.8, 4.4, 6.7, 7.8, 9.3)),
    "1 bits": ((3.2, 4.0, 10.0, 20.0, 20.0, 20.0), (4.5, 6.0, 15.0, 30.0, 30.0, 30.0)),
}
HOT_SHARE, COLD_SHARE = 0.93, 0.77  # of the bandwidth, for one row of x at 4 and 8 bits
CALL_SHAPE, CALL_SECONDS = (256, 256), 6e-6  # one row of x: little else than the call from Python
FLOAT_PEERS = ("torch int4pack", "bitsandbytes NF4")  # and every name that ends in ", float"
DENSE_HALF = ("torch bfloat16", "torch bfloat16 packed")
PARTS = 2  # 8-bit products that one of bfloat16 takes

LEGEND = f"""\
`{COMMAND}`, from the tables above. A cell: best other product's time over ours, of the ratio that
must be reached; the share of the machine's limit that ours runs at, and the largest ratio that this
limit allows: the other product's time over it. The limit is the one of the tables, which counts
reading codes and scales or multiplying, but neither unpacking and scaling nor the call.
"""


@dataclass(frozen=True)
class Verdict:
    """One target beside what was measured; ``largest`` is the ratio at the machine's limit."""

    name: str
    must: float
    ratio: float
    largest: float
    share: float
    reason: str

    @property
    def word(self) -> str:
        """Met, missed, or beyond this machine."""
        if round(self.ratio, 2) >= round(self.must, 2):
            return "met"
        return "beyond this machine" if self.largest < self.must else "missed"

    @property
    def line(self) -> str:
        """The verdict as a line of a list."""
        return f"- {self.name}: {self.ratio:.2f} of {self.must:.2f}, {self.word}. {self.reason}"


def _best(cells: dict[str, Measured], names: Iterable[str]) -> tuple[str, Measured] | None:
    found = [(name, cells[name]) for name in names if name in cells]
    return min(found, key=lambda pair: pair[1].seconds, default=None)


def _against(
    name: str, must: float, ours: Measured, peer: tuple[str, Measured], work: int = 1
) -> Verdict:
    """``ours`` against ``peer``; ``work``: 8-bit products that one multiplication takes."""
    other, theirs = peer
    limit = work * ours.limit
    share, largest = limit / ours.seconds, theirs.seconds / limit
    reason = (
        f"Ours {1e6 * ours.seconds:.0f} us, {share:.0%} of the limit; {other} "
        f"{1e6 * theirs.seconds:.0f} us, {1 / largest:.0%}, which allows {largest:.2f} at most."
    )
    return Verdict(name, must, theirs.seconds / ours.seconds, largest, share, reason)


def width_verdicts(section: Section) -> dict[tuple[str, int], Verdict]:
    """The ratio to the best other product, by row of ``TARGETS`` and rows of x."""
    verdicts = {}
    for name, (must, _) in TARGETS.items():
        for batch, ratio in zip(ROWS, must, strict=True):
            cells = section.columns.get(batch, {})
            ours = cells.get(f"pyrobust {name}, int8")
            if ours is None:
                continue
            names = [n for n, c in cells.items() if not c.ours and c.bits in (ours.bits, 16, 32)]
            peer = _best(cells, names)
            if peer is not None:
                title = f"{name}, M={batch}"
                verdicts[name, batch] = _against(title, ratio, ours, peer)
    return verdicts


def bandwidth_verdicts(section: Section) -> Iterator[Verdict]:
    """The share of the bandwidth that one row of x reads weights at, at 4 and 8 bits."""
    for name in ("4 bits", "4 bits, two-level", "8 bits"):
        ours = section.columns.get(1, {}).get(f"pyrobust {name}, int8")
        if ours is not None:
            must, share = COLD_SHARE if section.cold else HOT_SHARE, ours.limit / ours.seconds
            state = "beyond cache" if section.cold else "hot"
            speed = f"{ours.nbytes / ours.seconds / 1e9:.0f} GB/s of weights"
            speed += f", {ours.nbytes / ours.limit / 1e9:.0f} by reading alone."
            yield Verdict(f"{name}, M=1, share of the bandwidth, {state}", must, share, 1, 0, speed)


def float_verdicts(section: Section) -> Iterator[Verdict]:
    """bfloat16 activations at 4 bits: against 8-bit ones, and against other products."""
    for batch, cells in sorted(section.columns.items()):
        ours, rounded = cells.get("pyrobust 4 bits, bfloat16"), cells.get("pyrobust 4 bits, int8")
        if ours is None or rounded is None:
            continue
        label = f"4 bits, bfloat16 x, M={batch}"
        if batch <= 2:
            peer = ("ours with 8-bit activations", rounded)
            yield _against(f"{label}, against 8-bit x", 1 / 1.05, ours, peer)
        names = [n for n, c in cells.items() if n in FLOAT_PEERS or _is_float(n, c)]
        peer = _best(cells, names)
        must = {1: 2.3, 16: 3.0}.get(batch)
        if must is not None and peer is not None:
            work = 1 if batch == 1 else PARTS
            yield _against(f"{label}, against 4 bits with float x", must, ours, peer, work)
        dense = _best(cells, DENSE_HALF)
        if batch >= 64 and dense is not None:
            yield _against(f"{label}, against dense bfloat16", 1.1, ours, dense, PARTS)


def _is_float(name: str, cell: Measured) -> bool:
    return not cell.ours and cell.bits == 4 and name.endswith(", float")


def call_lines(section: Section) -> Iterator[str]:
    """What a product so small that only the call counts takes, beside the fastest other one."""
    cells = section.columns.get(1, {})
    names = [name for name, cell in cells.items() if not cell.ours]
    peer = _best(cells, names)
    other = "" if peer is None else f"; {peer[0]} {1e6 * peer[1].seconds:.1f} us"
    for name, cell in cells.items():
        if cell.ours and not name.endswith(", float"):
            word = "met" if cell.seconds <= CALL_SECONDS else "missed"
            took, must = f"{1e6 * cell.seconds:.1f} us", f"{1e6 * CALL_SECONDS:.0f} us"
            yield f"- {name}, M=1: {took} of at most {must}, {word}{other}."


def order_verdicts(section: Section) -> Iterator[Verdict]:
    """1 to 4 bits against our own 8 bits."""
    for batch, cells in sorted(section.columns.items()):
        wide = cells.get("pyrobust 8 bits, int8")
        for name in list(TARGETS)[1:]:
            ours = cells.get(f"pyrobust {name}, int8")
            if wide is not None and ours is not None:
                label = f"{name}, M={batch}, against our 8 bits"
                yield _against(label, 1.0, ours, ("ours at 8 bits", wide))


def grid(verdicts: dict[tuple[str, int], Verdict]) -> str:
    """The verdicts by width and rows of x, as a Markdown table."""
    lines = ["| bits | " + " | ".join(f"M={m}" for m in ROWS) + " |", "| --- " * 7 + "|"]
    for name in TARGETS:
        cells = [_grid_cell(verdicts.get((name, m))) for m in ROWS]
        lines.append(f"| {name.removesuffix(' bits')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _grid_cell(verdict: Verdict | None) -> str:
    if verdict is None:
        return "not measured"
    return (
        f"{verdict.ratio:.2f} of {verdict.must:.2f}, {verdict.word}; {verdict.share:.0%}, "
        f"at most {verdict.largest:.2f}"
    )


def text(section: Section) -> str:
    """The tables of one shape, number of threads and state of the caches."""
    if section.shape == CALL_SHAPE:
        return "\n".join(call_lines(section))
    parts = []
    if not section.cold:
        verdicts = width_verdicts(section)
        counts = _counts(list(verdicts.values()))
        missed = [v.line for v in verdicts.values() if v.word != "met"]
        parts += [f"{counts}\n", grid(verdicts), "\nNot met:" if missed else "", *missed]
        parts += ["\nOther targets:"]
        parts += [v.line for v in float_verdicts(section)]
        slower = [v for v in order_verdicts(section) if v.word != "met"]
        parts += [v.line for v in slower]
        parts += [] if slower else ["- No width is slower than our own 8 bits."]
    parts += [v.line for v in bandwidth_verdicts(section)]
    return "\n".join(part for part in parts if part)


def _counts(verdicts: list[Verdict]) -> str:
    words = [v.word for v in verdicts]
    told = [f"{words.count(w)} {w}" for w in ("met", "missed", "beyond this machine")]
    return f"{len(words)} of {len(TARGETS) * len(ROWS)} cells measured: {', '.join(told)}."


def write_targets() -> str:
    """Put the targets of everything stored into the results file; returns the text."""
    sections = stored_sections()
    if not sections:
        raise SystemExit("nothing of this processor is stored: run bench/test_matmul.py first")
    parts = [f"### {s.title.removeprefix('Packed matmul, ')}\n\n{text(s)}\n" for s in sections]
    whole = f"## Targets of packed matmul\n{LEGEND}\n" + "\n".join(parts)
    write_text("## Targets of packed matmul", whole)
    return whole


if __name__ == "__main__":
    print(write_targets())
