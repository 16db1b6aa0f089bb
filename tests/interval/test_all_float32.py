"""Elementary functions over the float32 numbers: the float64 ends contain the function's value.

The rules evaluate in float64 and widen by a bound on that evaluation's error, which torch does not
promise. Here the bound meets every float32 number of a stride, with the value in extended
precision. All of them, some ten minutes a function:

    PYROBUST_SWEEP_STRIDE=1 python -m pytest -m slow tests/interval/test_all_float32.py
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from pyrobust import Interval
from pyrobust.interval.table import BY_NAME

STRIDE = int(os.environ.get("PYROBUST_SWEEP_STRIDE", "199"))
CHUNK = 1 << 21
EXTENDED = np.finfo(np.longdouble).nmant >= 63

one = np.longdouble(1)


def sigmoid(x):
    return one / (one + np.exp(-x))


def mish(x):
    e = np.exp(np.minimum(x, 60))
    n = e * (e + 2)
    return x * (n / (n + 2))


REFERENCES = {
    "exp": np.exp,
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "expm1": np.expm1,
    "atan": np.arctan,
    "silu": lambda x: x * sigmoid(x),
    "mish": mish,
    "softplus": lambda x: np.logaddexp(x, np.longdouble(0)),
    "log": np.log,
    "log1p": np.log1p,
    "log2": np.log2,
    "log10": np.log10,
    "sqrt": np.sqrt,
}
LEAST = {"log": 0.0, "log2": 0.0, "log10": 0.0, "sqrt": 0.0, "log1p": -1.0}


def outside(name, bits):
    """How many of the finite float32 numbers with these bits have a value outside their ends."""
    points = bits.view(np.float32)
    points = points[np.isfinite(points) & (points >= LEAST.get(name, -np.inf))]
    x = torch.from_numpy(points).double()
    box = BY_NAME[name](Interval(x, x))
    with np.errstate(all="ignore"):
        value = REFERENCES[name](points.astype(np.longdouble))
    slack = np.abs(value) * np.longdouble(2.0**-60)  # of the reference, 128 times below the bound
    slack = np.where(np.isfinite(slack), slack, 0) + np.longdouble(2.0) ** -1074
    low, high = (end.numpy().astype(np.longdouble) for end in (box.lower, box.upper))
    return int((~((low <= value + slack) & (value - slack <= high))).sum())


@pytest.mark.slow
@pytest.mark.skipif(not EXTENDED, reason="long double has no more bits than double")
@pytest.mark.parametrize("name", REFERENCES)
def test_the_value_lies_inside_at_every_number_of_the_stride(name):
    for begin in range(0, 1 << 32, CHUNK * STRIDE):
        end = min(1 << 32, begin + CHUNK * STRIDE)
        assert outside(name, np.arange(begin, end, STRIDE, dtype=np.uint32)) == 0


@pytest.mark.skipif(not EXTENDED, reason="long double has no more bits than double")
@pytest.mark.parametrize("name", REFERENCES)
def test_the_value_lies_inside_at_a_few_numbers(name):
    assert outside(name, np.arange(0, 1 << 32, 1_000_003, dtype=np.uint32)) == 0
