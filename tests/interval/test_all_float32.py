"""Elementary functions over the float32 numbers: errors stay below what the rules widen by.

The rules evaluate in float64 and widen by a bound on that evaluation's error, which torch does not
promise; deployed mode widens by a bound on the error of torch's float32 function. Here both meet
every float32 number of a stride, with the value in extended precision. All numbers, some minutes a
function, with a line of the table of docs/guide/intervals.md for each:

    PYROBUST_SWEEP_STRIDE=1 python -m pytest -s -m slow tests/interval/test_all_float32.py
"""

from __future__ import annotations

import os
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyrobust import Interval
from pyrobust.interval.elementwise import CURVES
from pyrobust.interval.table import BY_NAME

from .extended import Worst, build

STRIDE = int(os.environ.get("PYROBUST_SWEEP_STRIDE", "199"))
CHUNK = 1 << 17
FINITE = 0x7F800000  # bits of infinity: those of finite numbers are below
SIGN = 0x80000000
LAST_NEGATIVE = {"log": SIGN, "log2": SIGN, "log10": SIGN, "log1p": SIGN + 0x3F800000}
NARROW = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    **{
        name: getattr(F, name)
        for name in (
            *("gelu", "silu", "mish", "hardswish", "hardsigmoid", "logsigmoid", "softsign"),
            "softplus",
        )
    },
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return build(tmp_path_factory.mktemp("extended"))


def sweep(reference, name, stride):
    """The largest errors at the finite float32 numbers of the stride, both signs, zero included."""
    curve, narrow, worst = CURVES[name], NARROW.get(name) or getattr(torch, name), Worst()
    for begin, end in ((0, FINITE), (SIGN, LAST_NEGATIVE.get(name, SIGN + FINITE))):
        for start in range(begin, end, CHUNK * stride):
            bits = np.arange(start, min(end, start + CHUNK * stride), stride, dtype=np.uint32)
            points = bits.view(np.float32)
            x = torch.from_numpy(points)
            wide = curve.function(x.double())
            reference.compare(name, curve, points, wide.numpy(), narrow(x).numpy(), worst)
    return worst


def test_every_curve_has_a_reference(reference):
    assert set(CURVES) <= set(reference.numbers)


@pytest.mark.slow
@pytest.mark.parametrize("name", CURVES)
def test_errors_at_every_number_of_the_stride(name, reference):
    worst, curve = sweep(reference, name, STRIDE), CURVES[name]
    widening = f"{curve.relative:g}" + (f" + {curve.steep:g} x^2" if curve.steep else "")
    print(
        f"\n| {name} | {widening} | {worst.real_units:.2f} | {worst.real:.2f} at {worst.real_at!r} "
        f"| {worst.deployed:.2f} at {worst.deployed_at!r} |",
        flush=True,
    )
    assert worst.real <= 1.0
    assert worst.deployed <= 1.0


@pytest.mark.parametrize("name", CURVES)
def test_errors_at_a_few_numbers(name, reference):
    worst = sweep(reference, name, 100_003)
    assert worst.real <= 1.0
    assert worst.deployed <= 1.0


@pytest.mark.parametrize("name", [*CURVES, "sqrt"])
def test_ends_contain_the_value_and_torchs_at_a_few_numbers(name, reference):
    """The rule as a whole, before its ends are refused where they overflow."""
    least = 0x800000 if name.startswith("log") else 0  # what flushes to zero has no logarithm
    bits = np.arange(least, FINITE, 1_000_003, dtype=np.uint32)
    points = bits.view(np.float32)
    if name not in LAST_NEGATIVE and name != "sqrt":
        points = np.concatenate([points, -points])
    call = BY_NAME[name] if name != "gelu_tanh" else partial(BY_NAME["gelu"], approximate="tanh")
    x = torch.from_numpy(points)
    narrow = (NARROW.get(name) or getattr(torch, name))(x)
    deployed = call(Interval(x, x, rounding="deployed"))
    assert bool(deployed.contains(narrow).all())
    real = call(Interval(x.double(), x.double()))
    assert bool(deployed.contains(real).all())
