"""Packed matmul against torch and other low-bit products, interleaved, in one run.

    python -m pytest bench/test_matmul.py --benchmark-only -q -s

One test per shape, number of threads and rows M; the table is printed and written to
``bench/results/cpu-<processor>.md``, where its columns replace earlier ones of the same shape,
threads and rows (``matmul_table.py`` tells what a cell holds), with the verdict on each target
(``matmul_targets.py``, which can also be run alone). ``PYROBUST_BENCH_SHAPES`` (as
4096x4096,11008x4096), ``PYROBUST_BENCH_ROWS`` (as 1,16), ``PYROBUST_BENCH_THREADS`` (as 1,2) and
``PYROBUST_BENCH_BITS`` (as 4,8) choose, so that a long table can be measured piece by piece; a part
of the widths is printed only. 256x256 with one row shows what the call from Python costs.
"""

from __future__ import annotations

import os
import time

import pytest
import torch

from pyrobust import _native
from pyrobust._machine_limits import BEYOND_CACHE, buffer
from pyrobust.ops import packed_linear
from pyrobust.quantize import BITS, QTensor, round_to_codebook, round_to_two_level

from .matmul_table import Section, read_section, write_section
from .matmul_targets import write_targets
from .peer import Call, Peer
from .peers import dense_peers, packed_peers, prepacked_peers

COMMAND = "python -m pytest bench/test_matmul.py --benchmark-only -q -s"
GROUP = 128
LEVELS = {1: 2, 1.58: 3, 2: 4, 3: 8, 4: 16, 8: 256}
OTHER_GROUPS = {
    "groups of 32": (32, 1),
    "groups of 48": (48, 1),
    "groups along outputs": (GROUP, 0),
}
ALL_ROWS = (1, 2, 4, 16, 64, 256, 1024)
CHECKED_ROWS = 16  # of a result that must be near the product of its weight
COLD_ROWS = 16  # from there on arithmetic counts, not memory
COLD_ELEMENTS = 1 << 20  # of a smaller weight the call counts
ROUNDS = 3
ROUND_SECONDS = 0.03  # of one kind in one round
TWIN_ROWS = 256  # of weights whose products come before those timed beyond cache
TOO_SLOW = 4.0  # a peer this much slower than the best is left out at more rows


def chosen(name: str, default: str) -> list[str]:
    return os.environ.get(f"PYROBUST_BENCH_{name}", default).split(",")


SHAPES = chosen("SHAPES", "4096x4096,11008x4096,4096x11008")
BATCHES = [int(m) for m in chosen("ROWS", ",".join(map(str, ALL_ROWS)))]
THREADS = [int(t) for t in chosen("THREADS", f"1,{min(2, os.cpu_count() or 1)}")]
WIDTHS = [bits for bits in BITS if str(bits) in chosen("BITS", ",".join(map(str, BITS)))]


def packed_weight(
    bits: float, rows: int, cols: int, group: int = GROUP, group_dim: int = 1
) -> QTensor:
    codes = torch.randint(0, LEVELS[bits], (rows, cols), dtype=torch.uint8)
    shape = (rows, -(-cols // group)) if group_dim == 1 else (-(-rows // group), cols)
    zero = None
    if bits not in (1, 1.58):
        zero = torch.randint(0, LEVELS[bits], shape, dtype=torch.uint8)
    scale = (torch.rand(shape) + 0.5).half() / 64
    return QTensor.from_codes(codes, scale, zero, bits=bits, group_size=group, group_dim=group_dim)


def ours(name: str, packed: QTensor, mode: str) -> Peer:
    options = {
        "in_features": packed.shape[1],
        "bits": packed.bits,
        "group_size": packed.group_size,
        "group_dim": packed.group_dim,
        "activations": "int8" if mode == "int8" else None,
        "extras": packed.extras,
    }
    parts = (packed.codes, packed.scale, packed.zero)

    def prepare(x):
        own = x.bfloat16() if mode == "bfloat16" else x
        return lambda: packed_linear(own, *parts, **options)

    label = f"pyrobust {name}, {mode}"
    return Peer(label, packed.bits, prepare, packed.dequantize(), packed.nbytes)


def all_kinds(rows: int, cols: int) -> list[Peer]:
    weight = torch.randn(rows, cols)
    every = [*dense_peers(weight), *prepacked_peers(weight)]
    for bits in WIDTHS:
        packed = packed_weight(bits, rows, cols)
        every += packed_peers(packed)
        every += [ours(f"{bits} bits", packed, mode) for mode in ("int8", "bfloat16", "float")]
    if 4 in WIDTHS:
        two_level = round_to_two_level(weight, bits=4, group_size=GROUP)
        every.append(ours("4 bits, two-level", two_level, "int8"))
        every.append(ours("NF4", round_to_codebook(weight, group_size=GROUP), "int8"))
        for name, form in OTHER_GROUPS.items():
            every.append(ours(f"4 bits, {name}", packed_weight(4, rows, cols, *form), "int8"))
    return every


class Run:
    """The kinds of one shape and number of threads, and what was measured of them."""

    def __init__(self, shape: str, threads: int) -> None:
        rows, cols = (int(size) for size in shape.split("x"))
        torch.set_num_threads(threads)
        self.kinds = all_kinds(rows, cols)
        self.twins = all_kinds(TWIN_ROWS, cols)
        self.hot = Section((rows, cols), threads, cold=False)
        self.cold = Section((rows, cols), threads, cold=True)
        for section in (self.hot, self.cold):
            read_section(section)
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        self.cold_rows = COLD_ROWS if rows * cols >= COLD_ELEMENTS else 0

    def measure(self, batch: int, rounds) -> None:
        x = torch.randn(batch, self.hot.shape[1])
        calls = {kind: kind.prepare(x) for kind in self.kinds if not self._hopeless(kind, batch)}
        for kind, call in calls.items():  # a peer that computes something else is none
            result = torch.as_tensor(call())[:CHECKED_ROWS].float()
            expected = x[:CHECKED_ROWS] @ kind.weight.t()
            assert (result - expected).norm() < 0.05 * expected.norm(), kind.name
        twins = {kind.name: kind.prepare(x) for kind in self.twins}
        hot = dict.fromkeys(calls, float("inf"))
        cold = dict.fromkeys(calls, float("inf"))

        def round_of_all():
            for kind, call in calls.items():
                hot[kind] = min(hot[kind], self._repeated(call))
            for kind, call in calls.items():
                if batch <= self.cold_rows:
                    twin = twins[kind.name]
                    cold[kind] = min(cold[kind], *(self._cold(call, twin) for _ in range(3)))

        rounds(round_of_all)
        self.hot.add(batch, hot)
        if batch <= self.cold_rows:
            self.cold.add(batch, cold)

    def _hopeless(self, kind: Peer, batch: int) -> bool:
        """Whether the column before this one says so."""
        fewer = [rows for rows in self.hot.columns if rows < batch]
        if kind.ours or not fewer:
            return False
        before = self.hot.columns[max(fewer)].get(kind.name)
        best = self.hot.best_peer(kind.bits, max(fewer))
        return before is None or (max(fewer) > 1 and before.seconds > TOO_SLOW * best)

    def _timed(self, call: Call) -> float:
        start = self.clock()
        call()
        return self.clock() - start

    def _repeated(self, call: Call) -> float:
        call()
        best, begin = self._timed(call), time.perf_counter()
        while time.perf_counter() - begin < ROUND_SECONDS:
            best = min(best, self._timed(call))
        return best

    def _cold(self, call: Call, twin: Call) -> float:
        # So much else is read that nothing of a weight is left in a cache; then a product with
        # another weight brings back x and what the call runs, as the layer before does in a model.
        _native.read_words(buffer()[: BEYOND_CACHE // 16], self.hot.threads)
        twin()
        return self._timed(call)


@pytest.fixture(scope="module", params=[(s, t) for s in SHAPES for t in THREADS], ids=str)
def run(request):
    before = torch.get_num_threads()
    measured = Run(*request.param)
    yield measured
    torch.set_num_threads(before)
    print(f"\n{_native.isa()}")
    for section in (measured.hot, measured.cold):
        if section.columns:
            print(section.text())
    if list(BITS) == WIDTHS:
        write_targets()


@pytest.mark.parametrize("batch", BATCHES)
def test_linear(benchmark, run, batch):
    with torch.inference_mode():
        run.measure(batch, lambda f: benchmark.pedantic(f, rounds=ROUNDS))
    for section in (run.hot, run.cold):
        if batch in section.columns and list(BITS) == WIDTHS:
            write_section(section, COMMAND)
    cells = run.hot.columns[batch]
    benchmark.extra_info |= {name: 1e6 * cell.seconds for name, cell in cells.items()}
