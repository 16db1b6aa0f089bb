"""Curves against mpmath: turning points to the last bit, errors of the float64 evaluation."""

from __future__ import annotations

import pytest
import torch

from pyrobust import Interval
from pyrobust.interval import curves
from pyrobust.interval.table import BY_NAME

mpmath = pytest.importorskip("mpmath")


def gelu(x):
    return x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2


def gelu_tanh(x):
    inner = mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf(0.044715) * x**3)
    return x * (1 + mpmath.tanh(inner)) / 2


def silu(x):
    return x / (1 + mpmath.exp(-x))


def mish(x):
    return x * mpmath.tanh(mpmath.log1p(mpmath.exp(x)))


CURVES = {
    "gelu": gelu,
    "silu": silu,
    "mish": mish,
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "tanh": mpmath.tanh,
    "softplus": lambda x: mpmath.log1p(mpmath.exp(x)),
    "logsigmoid": lambda x: -mpmath.log1p(mpmath.exp(-x)),
    "elu": lambda x: x if x > 0 else mpmath.expm1(x),
    "exp": mpmath.exp,
    "expm1": mpmath.expm1,
    "erf": mpmath.erf,
    "atan": mpmath.atan,
    "hardswish": lambda x: x * min(max(x + 3, 0), 6) / 6,
    "softsign": lambda x: x / (1 + abs(x)),
}


@pytest.mark.parametrize(
    ("function", "turn", "start"),
    [
        (gelu, curves.GELU_TURN, -0.75),
        (gelu_tanh, curves.GELU_TANH_TURN, -0.75),
        (silu, curves.SILU_TURN, -1.28),
        (mish, curves.MISH_TURN, -1.19),
    ],
)
def test_turning_points_to_the_last_bit(function, turn, start):
    with mpmath.workdps(60):
        root = mpmath.findroot(lambda x: mpmath.diff(function, x), start)
        assert float(root) == turn


def samples(dtype):
    generator = torch.Generator().manual_seed(0)
    wide = 40 * torch.rand(250, generator=generator, dtype=torch.float64) - 20
    small = torch.randn(100, generator=generator, dtype=torch.float64)
    tiny = small * 10.0 ** torch.randint(-12, 0, (100,), generator=generator)
    far = torch.tensor([-120.0, -60.0, -37.0, 40.0, 85.0, 0.0], dtype=torch.float64)
    turns = torch.tensor([curves.GELU_TURN, curves.SILU_TURN], dtype=torch.float64)
    return torch.cat([wide, small, tiny, far, turns]).to(dtype)


# Where float64 evaluations were furthest off among all float32 numbers (docs/guide/intervals.md;
# torch 2.13, AVX-512).
WORST = {
    "gelu": -22.639616012573242,
    "erf": 6.768906587240053e-06,
    "exp": 3.471153974533081,
    "tanh": 0.06260446459054947,
    "sigmoid": -36.81633377075195,
    "gelu_tanh": -19.180574417114258,
    "silu": -36.73743438720703,
}


@pytest.mark.parametrize("name", WORST)
def test_the_worst_numbers_of_the_sweep_stay_below_the_widening(name):
    curve, x = curves.CURVES[name], WORST[name]
    value = curve.function(torch.full((64,), x, dtype=torch.float64))
    with mpmath.workdps(400):
        exact = (CURVES | {"gelu_tanh": gelu_tanh})[name](mpmath.mpf(x))
        error = max(abs(mpmath.mpf(v) - exact) for v in value.tolist()) / abs(exact)
        assert error * 2**53 < 0.7 * (curve.relative + curve.steep * x * x)


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_contain_the_exact_value(name, dtype):
    points = samples(dtype)
    result = BY_NAME[name](Interval(points, points))
    bound = 2.0**-22 if dtype == torch.float32 else 2.0**-38
    with mpmath.workdps(60):
        for x, low, high in zip(
            points.tolist(), result.lower.tolist(), result.upper.tolist(), strict=True
        ):
            exact = CURVES[name](mpmath.mpf(x))
            assert mpmath.mpf(low) <= exact <= mpmath.mpf(high), (x, low, high)
            if name != "softplus":  # holds torch's own reading beyond the threshold as well
                assert high - low <= bound * abs(float(exact)) + 3e-38, (x, low, high)


@pytest.mark.parametrize("name", ["gelu", "silu", "mish", "hardswish"])
def test_a_box_around_the_turning_point_reaches_the_lowest_value(name):
    turn = getattr(curves, f"{name.upper()}_TURN")
    box = Interval(torch.tensor([turn - 0.5]), torch.tensor([turn + 0.5]))
    result = BY_NAME[name](box)
    with mpmath.workdps(60):
        least = CURVES[name](mpmath.mpf(turn))
        assert mpmath.mpf(float(result.lower)) <= least
        assert float(least) - float(result.lower) < 1e-7


@pytest.mark.parametrize("name", ["sigmoid", "silu", "gelu"])
def test_float64_tails_do_not_vanish(name):
    points = torch.tensor([-36.0, -45.0, -300.0, -700.0, -720.0], dtype=torch.float64)
    result = BY_NAME[name](Interval(points, points))
    with mpmath.workdps(60):
        for x, low, high in zip(
            points.tolist(), result.lower.tolist(), result.upper.tolist(), strict=True
        ):
            assert mpmath.mpf(low) <= CURVES[name](mpmath.mpf(x)) <= mpmath.mpf(high), x


def test_numbers_beside_float64_boxes_are_not_rounded_to_float32():
    x, chosen = torch.rand(4, dtype=torch.float64), torch.tensor([True, False, True, False])
    box = Interval.ball(x, 0.1)
    for rule in (
        lambda v: torch.where(chosen, v, 0.1),
        lambda v: torch.where(chosen, 0.1, v),
        lambda v: v.masked_fill(chosen, 0.1),
    ):
        assert bool(rule(box).contains(rule(x)).all())
