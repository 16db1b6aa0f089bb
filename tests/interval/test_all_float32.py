"""Elementary functions over the float32 numbers: errors stay below what the rules widen by.

The rules evaluate in float64 and widen by a bound on that evaluation's error, which torch does not
promise; deployed mode widens by a bound on the error of torch's float32 function. Here both meet
every float32 number of a stride, with the value in extended precision; so do the evaluations of the
native passes, whose bounds stand in csrc/interval/curve_functions.h. All numbers, some minutes a
function, with a line of the table of docs/guide/intervals.md for each:

    PYROBUST_SWEEP_STRIDE=1 python -m pytest -s -m slow tests/interval/test_all_float32.py
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyrobust import Interval, _native
from pyrobust.interval.curves import CURVES, SELU, Curve, celu_curve, elu_curve
from pyrobust.interval.finite import infinite_ends
from pyrobust.interval.table import BY_NAME
from pyrobust.interval.type import wrap

from .extended import Worst, build

STRIDE = int(os.environ.get("PYROBUST_SWEEP_STRIDE", "199"))
CHUNK = 1 << 17
FINITE = 0x7F800000  # bits of infinity: those of finite numbers are below
SIGN = 0x80000000
LAST_NEGATIVE = {
    **dict.fromkeys(("log", "log2", "log10", "sqrt", "rsqrt"), SIGN),
    **dict.fromkeys(("pow 1.5", "pow 2.5", "pow 0.25", "pow -1.5"), SIGN),
    "log1p": SIGN + 0x3F800000,
}
NARROW = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "celu": partial(F.celu, alpha=0.75),
    **{f"pow {p}": partial(torch.pow, exponent=p) for p in (3, 4, 1.5, 2.5, 0.25, -1.5)},
    **{
        name: getattr(F, name)
        for name in (
            *("gelu", "silu", "mish", "hardswish", "hardsigmoid", "logsigmoid", "softsign"),
            *("softplus", "elu", "selu"),
        )
    },
}
# What the other rules widen by, in the same terms. (Roots must be off by less than a unit in the
# last place, two of 2^-53: torch's, by MKL, are not correctly rounded.)
SWEPT = {
    **{name: curve for name, curve in CURVES.items() if name != "square"},  # which is exact
    "elu": elu_curve(1.0),
    "celu": celu_curve(0.75),
    "selu": SELU,
    **{
        name: Curve(function, deployed=16.0)
        for name, function in NARROW.items()
        if name.startswith("pow")
    },
}
# Exponents whose rules are products, quotients and roots: what torch's float32 function returns
COMPOSED = (-2.0, -1.0, -0.5, 0.5, 2.0)
# Least numbers, as bits, whose powers are bounded: on the way they must not flush to zero
NORMAL = 0x800000
LEAST = {"pow -2": 65 * NORMAL, "pow -1.5": 47 * NORMAL, "rsqrt": NORMAL}
LEAST.update(dict.fromkeys(("pow -1", "pow -0.5", "log", "log2", "log10", "log1p"), NORMAL))


NATIVE = {name: curve.native for name, curve in SWEPT.items() if curve.native is not None}
# As exponents of two; csrc/interval/curve_functions.h has them in this order.
NATIVE_ERRORS = {"": -46, "gelu": -43, "gelu_tanh": -41}
FUNCTIONS = Path(__file__).parents[2] / "csrc" / "interval" / "curve_functions.h"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return build(tmp_path_factory.mktemp("extended"))


def numbers_of(name, stride):
    """The finite float32 numbers of the stride, both signs, zero included, in chunks."""
    for begin, end in ((0, FINITE), (SIGN, LAST_NEGATIVE.get(name, SIGN + FINITE))):
        for start in range(begin, end, CHUNK * stride):
            bits = np.arange(start, min(end, start + CHUNK * stride), stride, dtype=np.uint32)
            yield bits.view(np.float32)


def sweep_native(reference, name, stride):
    """The largest error of the native evaluation, and where."""
    error, worst = 2.0 ** NATIVE_ERRORS.get(name, NATIVE_ERRORS[""]), Worst()
    bound = Curve(torch.exp, relative=error * 2.0**53)
    for every in numbers_of(name, stride):
        points = every[every < 700] if name in ("exp", "expm1") else every  # infinite as floats
        values = torch.empty(len(points), dtype=torch.float64)
        _native.interval_curve_values(torch.from_numpy(points), *NATIVE[name], values)
        least = 2.0**-180  # float32 ends notice none of it
        reference.compare(name, bound, points, values.numpy(), points, worst, least=least)
    return worst


def sweep(reference, name, stride):
    """The largest errors at the finite float32 numbers of the stride, both signs, zero included."""
    curve, narrow, worst = SWEPT[name], NARROW.get(name) or getattr(torch, name), Worst()
    for points in numbers_of(name, stride):
        x = torch.from_numpy(points)
        wide = curve.function(x.double())
        reference.compare(name, curve, points, wide.numpy(), narrow(x).numpy(), worst)
    return worst


def test_every_curve_has_a_reference(reference):
    assert set(SWEPT) == set(reference.numbers)


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEPT)
def test_errors_at_every_number_of_the_stride(name, reference):
    worst, curve = sweep(reference, name, STRIDE), SWEPT[name]
    widening = f"{curve.relative:g}" + (f" + {curve.steep:g} x^2" if curve.steep else "")
    print(
        f"\n| {name} | {widening} | {worst.real_units:.2f} | {worst.real:.2f} at {worst.real_at!r} "
        f"| {worst.deployed:.2f} at {worst.deployed_at!r} |",
        flush=True,
    )
    assert worst.real <= 1.0
    assert worst.deployed <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", NATIVE)
def test_native_errors_at_every_number_of_the_stride(name, reference):
    worst = sweep_native(reference, name, STRIDE)
    print(
        f"\n| {name} | {worst.real_units:.1f} | {worst.real:.2f} at {worst.real_at!r} |", flush=True
    )
    assert worst.real <= 1.0


@pytest.mark.parametrize("name", NATIVE)
def test_native_errors_at_a_few_numbers(isa, name, reference):
    assert 0.0 < sweep_native(reference, name, 100_003).real <= 1.0


def test_native_errors_are_those_of_the_header():
    found = re.findall(r"kError = 0x1p(-\d+);", FUNCTIONS.read_text())
    assert [int(exponent) for exponent in found] == list(NATIVE_ERRORS.values())


def assert_contains_torchs_powers(exponent, stride):
    """Ends of the rule, before they are refused where they overflow, around every number."""
    least = LEAST.get(f"pow {exponent:g}", 0)
    signs = (0,) if exponent in (-0.5, 0.5) else (0, SIGN)
    for begin, end in ((sign + least, sign + FINITE) for sign in signs):
        for start in range(begin, end, CHUNK * stride):
            bits = np.arange(start, min(end, start + CHUNK * stride), stride, dtype=np.uint32)
            x = torch.from_numpy(bits.view(np.float32))
            with infinite_ends():
                box = BY_NAME["pow"](wrap(x, x, "deployed"), exponent)
            assert bool(box.contains(x**exponent).all()), (exponent, start)


@pytest.mark.slow
@pytest.mark.parametrize("exponent", COMPOSED)
def test_composed_powers_contain_torchs_at_every_number_of_the_stride(exponent):
    assert_contains_torchs_powers(exponent, STRIDE)


@pytest.mark.parametrize("exponent", COMPOSED)
def test_composed_powers_contain_torchs_at_a_few_numbers(exponent):
    assert_contains_torchs_powers(exponent, 100_003)


@pytest.mark.parametrize("name", SWEPT)
def test_errors_at_a_few_numbers(name, reference):
    worst = sweep(reference, name, 100_003)
    assert worst.real <= 1.0
    assert worst.deployed <= 1.0


@pytest.mark.parametrize("name", SWEPT)
def test_ends_contain_the_value_and_torchs_at_a_few_numbers(name, reference):
    """The rule as a whole, before its ends are refused where they overflow."""
    least = LEAST.get(name, 0)
    bits = np.arange(least, FINITE, 1_000_003, dtype=np.uint32)
    points = bits.view(np.float32)
    if name not in LAST_NEGATIVE:
        points = np.concatenate([points, -points])
    x, function = torch.from_numpy(points), NARROW.get(name) or getattr(torch, name)
    call = BY_NAME.get(name, function)  # rules are looked up below the check for overflow
    if name.startswith("pow"):
        call = partial(BY_NAME["pow"], exponent=float(name.split()[1]))
    elif isinstance(function, partial):
        call = partial(BY_NAME[name.split("_")[0]], **function.keywords)
    deployed = call(Interval(x, x, rounding="deployed"))
    assert bool(deployed.contains(function(x)).all())
    real = call(Interval(x.double(), x.double()))
    # where float64 overflows, its lower ends are the least that there are
    assert bool((deployed.contains(real) | real.upper.isinf()).all())
