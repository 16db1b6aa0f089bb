"""Infinite ends are refused where they are given and where they arise; masks of -inf pass."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyrobust import Interval
from pyrobust import nn as rnn
from pyrobust.interval.type import wrap

pytestmark = pytest.mark.emulated_tiles

INF = math.inf
ROUNDINGS = ["nearest", "real", "deployed"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ends", [(-INF, 0.0), (0.0, INF), (INF, INF), (-INF, INF)])
def test_given_ends_are_refused(ends, dtype):
    lower, upper = (torch.tensor([0.0, end], dtype=dtype) for end in ends)
    with pytest.raises(ValueError, match="must be finite; 1 of 2 elements are infinite"):
        Interval(lower, upper)


@pytest.mark.parametrize(("x", "eps"), [(INF, 0.1), (0.0, INF), (3e38, 1e38)])
def test_balls_that_reach_infinity_are_refused(x, eps):
    with pytest.raises(ValueError, match="must be finite; 1 of 1"):
        Interval.ball(torch.tensor([x]), eps)


def test_a_clamped_ball_may_have_any_radius():
    ball = Interval.ball(torch.tensor([0.5]), INF, clamp=(0, 1))
    assert (float(ball.lower), float(ball.upper)) == (0, 1)


def test_hulls_of_infinite_candidates_are_refused():
    with pytest.raises(ValueError, match="must be finite"):
        Interval.hull(torch.tensor([[0.0, INF]]), dim=1)


def test_the_widest_finite_box_is_accepted():
    most = torch.finfo(torch.float32).max
    assert Interval(torch.tensor([-most]), torch.tensor([most])).shape == (1,)


BIG = 3e38
OVERFLOWS = {
    "add": lambda x: x + x,
    "sub": lambda x: -x - x,
    "mul": lambda x: x * 10.0,
    "div": lambda x: x / 0.1,
    "square": lambda x: x.square(),
    "pow": lambda x: x**3,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "sum": lambda x: x.sum(),
    "cumsum": lambda x: x.cumsum(1),
    "matmul": lambda x: x @ x.mT,
    "conv1d": lambda x: F.conv1d(x[:, None], torch.ones(1, 1, 2)),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x[None, None], torch.ones(1, 1, 2, 2)),
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(2), torch.full((2,), 1e-8), eps=0.0),
    "layer_norm": lambda x: F.layer_norm(x, (2,), torch.full((2,), 2e38), torch.full((2,), 3e38)),
}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", OVERFLOWS)
def test_operations_that_overflow_are_named(name, rounding):
    lower = torch.tensor([[BIG, BIG], [BIG, BIG]])
    lower[:, 1] -= 1e35
    with pytest.raises(OverflowError, match=rf"{name} leaves the range of torch.float32"):
        OVERFLOWS[name](Interval(lower, lower + 1e33, rounding=rounding))


def test_conversions_that_overflow_are_named():
    x = Interval.ball(torch.tensor([1e300], dtype=torch.float64), 0.0)
    for convert in (lambda x: x.float(), lambda x: x.to(torch.float32)):
        with pytest.raises(OverflowError, match=r"leaves the range of torch\.float32"):
            convert(x)


@pytest.mark.parametrize("call", [torch.rsqrt, torch.reciprocal, lambda x: 1 / x])
def test_divisors_of_zero_are_refused(call):
    with pytest.raises(ValueError, match="2 elements break this"):
        call(Interval(torch.zeros(2), torch.ones(2)))


@pytest.mark.parametrize("name", ["log", "log2", "log10", "log1p"])
def test_logarithms_of_zero_are_refused(name):
    least = -torch.ones(2) if name == "log1p" else torch.zeros(2)
    with pytest.raises(OverflowError, match=rf"{name} leaves the range of torch.float32 in 2 of 2"):
        getattr(torch, name)(Interval(least, torch.ones(2)))


LAYERS = {
    "linear": nn.Linear(4, 4),
    "conv2d": nn.Conv2d(4, 4, 1),
    "packed_linear": rnn.PackedLinear(4, 4, bits=8, group_size=4),
    "packed_conv2d": rnn.PackedConv2d(4, 4, 1, bits=8, group_size=4),
}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_overflow_are_named_with_their_place(name, graded, rounding, isa):
    layer = LAYERS[name].eval()
    x = torch.full((2, 4, 1, 1) if "conv" in name else (2, 4), BIG)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Tanh())
    layer.bias.data.fill_(BIG)  # so that some output certainly overflows
    with torch.set_grad_enabled(graded):
        box = Interval(-x, x, rounding=rounding)
        with pytest.raises(OverflowError, match=rf"{name} leaves the range"):
            layer(box)
        with pytest.raises(OverflowError, match=r"\(in 0, a \w+, of (Packed)?Sequential\)"):
            model(box)


@pytest.mark.parametrize("value", [INF, -INF, math.nan])
def test_weights_that_are_not_finite_do_not_pass(value):
    model = nn.Linear(2, 2)
    model.weight.data[0, 0] = value
    with pytest.raises(OverflowError, match="1 of 2 elements"):
        model(Interval(torch.zeros(2), torch.ones(2))).lower  # noqa: B018


def test_operands_that_are_not_finite_are_refused():
    x = Interval(torch.ones(2), torch.ones(2) + 1)
    with pytest.raises(ValueError, match=r"operand of torch\.mul must be finite"):
        x * torch.tensor([1.0, INF])
    with pytest.raises(ValueError, match=r"operand of torch\.add must not be NaN"):
        x + math.nan
    with pytest.raises(ValueError, match=r"batch_norm must be finite"):
        F.batch_norm(x[None], torch.tensor([0.0, INF]), torch.ones(2))


def test_masks_of_minus_infinity_pass_to_the_softmax():
    scores = Interval.ball(torch.randn(2, 3, 3), 0.1)
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
    bias = torch.zeros(3, 3).masked_fill(mask, -INF)
    for masked in (
        scores.masked_fill(mask, -INF),
        scores + bias,
        torch.where(mask, -INF, scores),
        torch.maximum(scores, torch.full((3, 3), -100.0)) + bias,
    ):
        weights = (masked.reshape(2, 3, 3).mT.mT * 0.5).softmax(-1)
        assert bool(torch.isfinite(weights.lower).all())
        assert float(weights.upper[:, mask].max()) < 2e-38


@pytest.mark.skipif(
    tuple(int(v) for v in torch.__version__.split(".")[:2]) < (2, 13),
    reason="older torch does not trace objects with __torch_function__",
)
def test_compiled_code_refuses_infinite_ends():
    def ends(function):
        def image(lower, upper):
            box = function(Interval(lower, upper))
            return box.lower, box.upper

        torch._dynamo.reset()
        return torch.compile(image, backend="aot_eager", fullgraph=True)

    x = torch.tensor([[0.0], [50.0]])
    exponential, layer = ends(torch.exp), nn.Linear(1, 1)
    assert bool(torch.isfinite(exponential(x, x + 1)[1]).all())
    with pytest.raises(RuntimeError, match=r"must stay finite; torch\.exp leaves"):
        exponential(2 * x, 2 * x + 1)
    for low, high in ((x, x * INF), (x, x - 1), (x * math.nan, x)):
        with pytest.raises(RuntimeError, match="must be finite, and lower at most upper"):
            exponential(low, high)
    nn.init.constant_(layer.weight, 3e38)
    with pytest.raises(RuntimeError, match=r"linear leaves their range"):
        ends(layer)(x, x + 1)
    mask = torch.tensor([[-INF], [0.0]])
    masked = ends(lambda box: torch.add(box, mask).softmax(0))(x, x + 1)
    assert bool(torch.isfinite(masked[1]).all())


@pytest.mark.skipif(
    tuple(int(v) for v in torch.__version__.split(".")[:2]) < (2, 13),
    reason="older torch does not trace objects with __torch_function__",
)
@pytest.mark.parametrize("maps", [1, 2])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_vmap_refuses_infinite_ends(backend, maps):
    def image(low):
        return torch.exp(Interval(low, low + 1)).upper

    for _ in range(maps):
        image = torch.vmap(image)
    torch._dynamo.reset()
    compiled = torch.compile(image, backend=backend, fullgraph=True)
    x = torch.tensor([[0.0], [50.0]]).reshape(2, *[1] * maps)
    torch.testing.assert_close(compiled(x), image(x))
    with pytest.raises(RuntimeError, match=r"must stay finite; torch\.exp leaves"):
        compiled(2 * x)
    with pytest.raises(RuntimeError, match="must be finite, and lower at most upper"):
        compiled(x * math.nan)


def test_in_vmap_all_slices_are_looked_at():
    def ends(function):
        def image(lower, upper):
            box = function(Interval(lower, upper))
            return box.lower, box.upper

        return torch.vmap(image)

    x = torch.tensor([[0.0], [100.0]])
    with pytest.raises(OverflowError, match=r"torch\.exp leaves the range .* in 1 of 2 elements"):
        ends(torch.exp)(x, x + 1)
    with pytest.raises(ValueError, match="must be finite; 1 of 2 elements are infinite"):
        ends(torch.exp)(-x, -x + torch.tensor([[0.0], [INF]]))
    with pytest.raises(ValueError, match="must not be NaN"):
        ends(torch.exp)(x * math.nan, x)
    with pytest.raises(ValueError, match="lower > upper in 2 of 2 elements"):
        ends(torch.exp)(x, x - 1)
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, 3e38)
    with pytest.raises(OverflowError, match=r"linear leaves the range .* \(in Linear\)"):
        ends(layer)(x, x + 1)


def test_ends_that_nobody_looked_at_can_be_asked_for():
    box = Interval.ball(torch.zeros(2, 3), 0.1)
    assert box.check_finite() is box
    overflowed = wrap(box.lower, torch.tensor([0.1, INF, 0.1]).expand(2, 3), "real")
    with pytest.raises(OverflowError, match="the ends must be finite; 2 of 6 elements are not"):
        overflowed.check_finite()
    with pytest.raises(OverflowError, match="1 of 3 elements are not"):
        torch.vmap(lambda a, b: wrap(a, b, "real").check_finite().lower)(
            torch.zeros(3), torch.tensor([0.0, INF, 0.0])
        )
