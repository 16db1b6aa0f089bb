"""The report of a GPU, run through on the CPU: its rows, targets and table, not its times."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """The report's modules with small sizes and a clock that runs each call once."""
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_ceilings
    import gpu_interval
    import gpu_matmul
    import gpu_sampling
    import gpu_timing

    def once(calls, *, graph=True):
        for call in calls:
            call()
        return 1e-3

    monkeypatch.setattr(gpu_timing, "_ROTATED_BYTES", 1)
    for module in (gpu_ceilings, gpu_interval, gpu_matmul, gpu_sampling):
        monkeypatch.setattr(module, "seconds_of", once)
    monkeypatch.setattr(gpu_ceilings, "_BYTES", 1 << 12)
    monkeypatch.setattr(gpu_ceilings, "_SIZE", 16)
    monkeypatch.setattr(gpu_matmul, "_SIZE", 64)
    monkeypatch.setattr(gpu_matmul, "_MANY", {8: (0.5, 0.9)})
    monkeypatch.setattr(gpu_matmul, "_SWITCH_ROWS", (2,))
    monkeypatch.setattr(gpu_sampling, "_SHAPES", ((1, 3, 20),))
    monkeypatch.setattr(gpu_sampling, "_COMPILED", (3, 20))
    monkeypatch.setattr(gpu_sampling, "_VOTES", ((20, 3),))
    monkeypatch.setattr(gpu_interval, "_SIZES", (128,))
    monkeypatch.setattr(gpu_interval, "_MUST", {1: (1.5, 1.9), 9: (1.5, 1.9)})
    monkeypatch.setattr(gpu_interval, "_IMAGES", (2, 3, 9))
    monkeypatch.setattr(gpu_interval, "_SWITCH", (3,))
    monkeypatch.setattr(gpu_interval, "_CHUNKS", (64, 128))
    monkeypatch.setattr(gpu_interval, "_CHUNKED_INPUTS", 9)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    return gpu_timing, (gpu_ceilings, gpu_matmul, gpu_sampling, gpu_interval)


def test_every_part_yields_rows_with_targets(bench, emulated_cuda):
    timing, parts = bench
    rows = [row for part in parts for row in part.measure(timing.Clock(600))]
    units = {row.unit for row in rows if row.must is not None}
    assert units == {
        "x torch bf16",
        "of the floor",
        "TFLOP/s",
        "x the peer",
        "of fill_",
        "1e12/s",
        "x torch eager add",
        "x torch.compile",
        "x two bf16 products",
        "x unsound",
        "x torch float32 IBP",
    }
    assert not [row for row in rows if row.part == "interval" and math.isnan(row.value)]
    for unit in ("x two bf16 convolutions", "x the fused kernel"):
        assert [row for row in rows if row.unit == unit]
    text = timing.table(rows)
    assert text.count("\n## ") == 4
    assert "4 bits W, 128^2, M = 9" in text


def test_peers_that_are_not_installed_are_named(bench, emulated_cuda):
    timing, (_, matmul, *_) = bench
    rows = [row for row in matmul.measure(timing.Clock(600)) if "NOT INSTALLED" in row.what]
    assert {name for row in rows for name in matmul.PEERS if name in row.what} >= {
        "humming", "Marlin", "bitsandbytes", "gemlite"
    }  # fmt: skip
    assert all(row.verdict() == "not measured" for row in rows)


def test_the_best_peer_of_a_cell_has_a_row(bench, emulated_cuda, monkeypatch):
    timing, (_, matmul, *_) = bench

    def fast(bits, weight):
        return lambda x: x @ weight.T

    monkeypatch.setattr(matmul, "PEERS", {"fast one": fast, "slow one": fast})
    times = iter([1e-3, 2e-3, 4e-3, 2e-3] * 2)
    monkeypatch.setattr(matmul, "_PEER_ROWS", (2,))
    monkeypatch.setattr(matmul, "seconds_of", lambda calls, **_: next(times))
    rows = [row for row in matmul._peers(timing.Clock(600)) if row.unit == "x the best peer"]
    (row,) = rows
    assert row.what == "4 bits, M = 2, against the best peer"
    assert row.detail == "fast one"
    assert row.value == 0.5
    assert row.verdict() == "NO"


def test_a_cell_of_intervals_that_fails_is_a_row(bench, emulated_cuda, monkeypatch):
    timing, (*_, interval) = bench

    def broken(*_):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(interval, "_convolution_rows", broken)
    rows = list(interval.measure(timing.Clock(600)))
    (failed,) = [row for row in rows if math.isnan(row.value)]
    assert failed.what == "convolution"
    assert "no kernel image" in failed.detail
    assert failed.verdict() == "not measured"
    assert rows[-1] is not failed


def test_cells_without_time_are_rows_that_say_so(bench, emulated_cuda):
    timing, (_, *parts) = bench
    for part in parts:
        rows = [row for row in part.measure(timing.Clock(-1)) if row.detail == "no time left"]
        assert rows
        assert all(row.verdict() == "not measured" for row in rows)
        assert "not measured | no time left" in timing.table(rows)
    whats = {row.what for row in parts[0].measure(timing.Clock(-1))}
    full = {row.what for row in parts[0].measure(timing.Clock(600))}
    assert {what for what in full if "against" not in what} <= whats


def test_verdicts(bench):
    row = bench[0].Row
    values = {"NO": 0.8, "yes": 0.9, "lead": 0.95}
    for verdict, value in values.items():
        assert row("p", "w", value, "u", 0.85, 0.95).verdict() == verdict
    for verdict, value in {"NO": 1.6, "yes": 1.4, "lead": 1.05}.items():
        assert row("p", "w", value, "u", 1.5, 1.1, below=True).verdict() == verdict
    assert row("p", "w", math.nan, "u", 1.0).verdict() == "not measured"
    assert row("p", "w", 3.0, "u").verdict() == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so():
    run = subprocess.run([sys.executable, BENCH / "gpu.py"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "gpu.py: no CUDA device here, nothing measured.\n"
