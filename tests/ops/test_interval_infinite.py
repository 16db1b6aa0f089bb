"""Interval functions refuse what is not finite, or give [-inf, inf] where they are told to."""

from __future__ import annotations

import math

import pytest
import torch

from pyrobust import ops
from pyrobust.quantize import round_to_nearest

pytestmark = pytest.mark.emulated_tiles

INF = math.inf
BIG = 3e38
KINDS = ["linear", "conv2d", "packed_linear", "packed_conv2d"]
ROUNDINGS = ["nearest", "real", "deployed"]


def layer(kind, dtype=torch.float32):
    """The function of a kind as one of both ends, the shape of its boxes, and its name."""
    weight = torch.ones(3, 4)
    packed = round_to_nearest(weight, bits=8, group_size=4)
    parts = packed.codes, packed.scale, packed.zero
    form = {"bits": 8, "group_size": 4}
    functions = {
        "linear": lambda a, b, **o: ops.interval_linear(a, b, weight.to(dtype), **o),
        "conv2d": lambda a, b, **o: ops.interval_conv2d(
            a, b, weight.to(dtype).reshape(3, 4, 1, 1), **o
        ),
        "packed_linear": lambda a, b, **o: ops.interval_packed_linear(
            a, b, *parts, in_features=4, **form, **o
        ),
        "packed_conv2d": lambda a, b, **o: ops.interval_packed_conv2d(
            a, b, *parts, in_channels=4, kernel_size=1, **form, **o
        ),
    }
    return functions[kind], ((2, 4, 2, 2) if "conv" in kind else (2, 4)), f"interval_{kind}"


def boxes(shape, low, high, dtype=torch.float32):
    lower, upper = torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
    lower[(0,) * len(shape)], upper[(0,) * len(shape)] = low, high
    return lower, upper


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_ends_that_are_not_finite_are_named(kind, rounding, dtype, isa):
    function, shape, name = layer(kind, dtype)
    for low, high, says in (
        (0.0, INF, "upper must be finite; 1 of"),
        (-INF, 0.0, "lower must be finite; 1 of"),
        (0.0, math.nan, "upper must not be NaN"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: {says}"):
            function(*boxes(shape, low, high, dtype), rounding=rounding)


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_results_that_overflow_are_named(kind, rounding, graded, isa):
    function, shape, name = layer(kind)
    ends = [torch.full(shape, BIG).requires_grad_(graded) for _ in range(2)]
    says = rf"^{name}: the ends must stay finite; they leave the range of torch.float32 in \d+ of"
    with pytest.raises(OverflowError, match=says):
        function(*ends, rounding=rounding)
    low, high = function(*ends, rounding=rounding, allow_infinite=True)
    assert not (low.isfinite() & high.isfinite()).any()
    if rounding != "nearest":
        assert (low == -INF).all()
        assert (high == INF).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_infinite_argument_is_named_before_an_overflow(kind):
    function, shape, name = layer(kind)
    lower, upper = boxes(shape, 0.0, INF)
    lower, upper = lower + 0 * BIG, upper * BIG
    with pytest.raises(ValueError, match=f"{name}: upper must be finite"):
        function(lower, upper)


def test_weights_and_biases_that_are_not_finite_are_named():
    x, weight = torch.ones(2, 4), torch.ones(3, 4)
    weight[1, 2] = INF
    with pytest.raises(ValueError, match="interval_linear: weight must be finite; 1 of 12"):
        ops.interval_linear(x, x, weight)
    with pytest.raises(ValueError, match="interval_linear: bias must not be NaN"):
        ops.interval_linear(x, x, torch.ones(3, 4), torch.tensor([0.0, math.nan, 0.0]))


@pytest.mark.parametrize("kind", KINDS)
def test_under_vmap_all_slices_are_looked_at(kind):
    function, shape, name = layer(kind)
    lower, upper = torch.zeros(3, *shape), torch.ones(3, *shape)
    torch.vmap(function)(lower, upper)
    upper[1] = BIG
    with pytest.raises(OverflowError, match=rf"^{name}: the ends must stay finite"):
        torch.vmap(function)(lower, upper)
    low, _ = torch.vmap(lambda a, b: function(a, b, allow_infinite=True))(lower, upper)
    assert low[0].isfinite().all()
    assert (low[1] == -INF).all()


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_code_raises_where_ends_are_infinite(kind):
    function, shape, name = layer(kind)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    lower, upper = torch.zeros(shape), torch.ones(shape)
    for got, expected in zip(compiled(lower, upper), function(lower, upper), strict=True):
        assert torch.equal(got, expected)
    with pytest.raises(RuntimeError, match=f"{name}: the ends must stay finite"):
        compiled(lower, upper * BIG)
    low, _ = torch.compile(function, backend="aot_eager", fullgraph=True)(
        lower, upper * BIG, allow_infinite=True
    )
    assert (low == -INF).all()


def test_numbers_that_nobody_can_read_are_not_looked_at():
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight = torch.ones(3, 4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 4)
        low, high = ops.interval_linear(x, x, weight)
    assert low.shape == high.shape == (2, 3)
