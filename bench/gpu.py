"""All that a GPU has to show, in one command and under ten minutes.

    python bench/gpu.py [--budget SECONDS] [--part NAME ...] [--out FOLDER]

Prints every ratio with its target and writes ``bench/results/<gpu>.md``. Times are medians of
replays of a CUDA graph, weights rotated beyond the cache. Parts that find no time are listed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpu_timing import Clock, Row, table

# Module of each part, with a function measure(clock) that yields rows, and its share of the time.
PARTS = {
    "ceilings": ("gpu_ceilings", 1),
    "matmul": ("gpu_matmul", 6),
    "sampling": ("gpu_sampling", 2),
    "interval": ("gpu_interval", 3),
}


def main() -> int:
    """Measure, print and write; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=560.0, help="seconds for everything")
    parser.add_argument("--part", action="append", choices=sorted(PARTS), help="default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py: no CUDA device here, nothing measured.", file=sys.stderr)
        return 2
    torch.set_default_device("cuda")
    parts = options.part or list(PARTS)
    clock = Clock(options.budget)
    rows: list[Row] = []
    notes: list[str] = []
    for index, part in enumerate(parts):
        # A share of what is left, so that a slow part starves no other.
        still = sum(PARTS[later][1] for later in parts[index:])
        share = Clock(clock.left() * PARTS[part][1] / still)
        rows += _measured(part, share, notes)
    name = torch.cuda.get_device_name()
    text = _heading(name, parts, options.budget) + table(rows)
    text += "".join(f"\n- {note}" for note in notes) + "\n"
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name.lower().replace(' ', '-')}.md"
    path.write_text(text)
    print(text)
    print(f"written to {path}")
    return 0


def _measured(part: str, clock: Clock, notes: list[str]) -> list[Row]:
    """The rows of one part; an error ends the part, not the report."""
    rows: list[Row] = []
    try:
        for row in importlib.import_module(PARTS[part][0]).measure(clock):
            rows.append(row)
            print(f"{row.part}: {row.what}: {row.value:.3g} {row.unit} {row.verdict()}", flush=True)
    except Exception as error:
        traceback.print_exc()
        notes.append(f"{part} ended by {type(error).__name__}: {str(error)[:200]}")
    if clock.left() < 0:
        notes.append(f"{part} ran out of its time after {len(rows)} rows")
    return rows


def _heading(name: str, parts: list[str], budget: float) -> str:
    import pyrobust

    return (
        f"# {name}\n\n`python bench/gpu.py` ({', '.join(parts)}; at most {budget:.0f} s), "
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, {pyrobust.info().cuda}.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
