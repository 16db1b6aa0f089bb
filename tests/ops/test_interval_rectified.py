"""A ReLU before a layer, fused into it: the same ends as a layer on the clipped box."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyrobust import Interval
from pyrobust.ops.interval import (
    interval_conv2d,
    interval_linear,
    interval_packed_conv2d,
    interval_packed_linear,
)
from pyrobust.quantize import round_to_nearest

pytestmark = pytest.mark.emulated_tiles


def vectors(batch, dtype=torch.float32):
    x = torch.randn(batch, 70, dtype=dtype)
    return x - 0.1, x + 0.1


def images(batch, dtype=torch.float32):
    x = torch.randn(batch, 4, 7, 6, dtype=dtype)
    return x - 0.1, x + 0.1


def layer(kind):
    """The operator with its weights, and boxes that it takes."""
    bias = torch.randn(9)
    if kind == "linear":
        return vectors, lambda a, b, **o: interval_linear(a, b, torch.ones(9, 70), bias, **o)
    if kind == "conv2d":
        weight = torch.randn(9, 4, 3, 3)
        window = {"padding": 1, "stride": (1, 2)}
        return images, lambda a, b, **o: interval_conv2d(a, b, weight, bias, **window, **o)
    form = {"bits": 4, "group_size": 64}
    if kind == "packed_linear":
        packed = round_to_nearest(torch.randn(9, 70), **form)
        parts = (packed.codes, packed.scale, packed.zero, bias)
        return vectors, lambda a, b, **o: interval_packed_linear(
            a, b, *parts, in_features=70, **form, **o
        )
    packed = round_to_nearest(torch.randn(9, 36), **form)
    parts = (packed.codes, packed.scale, packed.zero, bias)
    return images, lambda a, b, **o: interval_packed_conv2d(
        a, b, *parts, in_channels=4, kernel_size=3, **form, **o
    )


KINDS = ["linear", "conv2d", "packed_linear", "packed_conv2d"]


@pytest.mark.parametrize("rounding", ["real", "deployed", "nearest"])
@pytest.mark.parametrize("batch", [1, 3, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_ends_are_those_of_the_clipped_box(isa, kind, batch, rounding):
    make, operator = layer(kind)
    lower, upper = make(batch)
    fused = operator(lower, upper, rounding=rounding, rectified=True)
    apart = operator(lower.relu(), upper.relu(), rounding=rounding)
    assert torch.equal(fused[0], apart[0])
    assert torch.equal(fused[1], apart[1])


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_that_is_nan_is_not_clipped_away(isa, kind):
    make, operator = layer(kind)
    lower, upper = make(1)
    lower[0, 0], upper[0, -1] = math.nan, math.inf
    ends = operator(lower, upper, rectified=True, allow_infinite=True)
    assert (ends[0] == -math.inf).any()
    assert (ends[1] == math.inf).any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_clipped_box(kind):
    make, operator = layer(kind)
    inputs = [end.requires_grad_() for end in make(3)]
    fused = operator(*inputs, rectified=True)
    apart = operator(*(end.relu() for end in inputs))
    cotangents = [torch.randn_like(end) for end in fused]
    for a, b in zip(
        torch.autograd.grad(fused, inputs, cotangents),
        torch.autograd.grad(apart, inputs, cotangents),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_many_small_images_share_panels(isa):
    x = torch.randn(37, 3, 5, 3)
    weight = torch.randn(70, 3, 3, 3)
    together = interval_conv2d(x - 0.1, x + 0.1, weight, stride=2)
    for i in (0, 17, 36):
        alone = interval_conv2d(x[i] - 0.1, x[i] + 0.1, weight, stride=2)
        assert torch.equal(together[0][i], alone[0])
        assert torch.equal(together[1][i], alone[1])


@torch.no_grad()
def test_a_rectified_box_reads_like_any_other():
    box = Interval(torch.tensor([[-2.0, -1.0, 1.0]]), torch.tensor([[-1.0, 1.0, 2.0]]))
    weight = torch.tensor([[1.0, -1.0, 1.0]])
    clipped = F.relu(box)
    image = F.linear(clipped, weight)  # reads it before its ends are made
    assert torch.equal(clipped.lower, torch.tensor([[0.0, 0.0, 1.0]]))
    assert torch.equal(clipped.upper, torch.tensor([[0.0, 1.0, 2.0]]))
    assert torch.equal(box.lower, torch.tensor([[-2.0, -1.0, 1.0]]))
    again = F.linear(clipped, weight)
    assert torch.equal(image.lower, again.lower)
    residual = clipped + box
    assert bool(residual.contains(torch.tensor([[-1.0, 0.0, 3.0]])).all())
    assert repr(F.relu(box)) == repr(clipped)


@torch.no_grad()
def test_a_box_rectified_in_place_makes_its_views_unusable():
    box = Interval(torch.full((2, 3), -1.0), torch.ones(2, 3))
    row = box[0]
    assert box.relu_() is box
    assert torch.equal(box.lower, torch.zeros(2, 3))
    with pytest.raises(NotImplementedError, match="changed in place"):
        F.linear(row, torch.ones(1, 3))


@pytest.mark.parametrize(
    "reshape",
    [
        lambda box: box.flatten(1),
        lambda box: torch.transpose(box, 1, 3).reshape(2, -1),
        lambda box: box.view(2, 1, -1).squeeze(1),
        nn.Flatten(),
    ],
)
@pytest.mark.parametrize("graded", [False, True])
def test_a_relu_waits_through_a_change_of_shape(reshape, graded):
    x, layer = torch.randn(2, 3, 4, 5), nn.Linear(60, 7)
    box = Interval((x - 0.1).requires_grad_(graded), x + 0.1)
    with torch.set_grad_enabled(graded):
        waiting = reshape(F.relu(box))
        assert waiting._rectified
        fused = layer(waiting)
        settled = F.relu(box)
        plain = layer(reshape(Interval(settled.lower, settled.upper)))
    assert torch.equal(fused.lower, plain.lower)
    assert torch.equal(fused.upper, plain.upper)
    assert (waiting.lower >= 0).all()
    if graded:
        ours, theirs = (
            torch.autograd.grad((ends.lower + 2 * ends.upper).sum(), box.lower, retain_graph=True)
            for ends in (fused, plain)
        )
        torch.testing.assert_close(ours[0], theirs[0])


def test_a_view_of_a_waiting_relu_is_unusable_once_its_memory_changed():
    hidden = F.relu(Interval(-torch.ones(2, 3), torch.ones(2, 3)))
    view = hidden.flatten()
    hidden += 1.0
    with pytest.raises(NotImplementedError, match="shares memory"):
        _ = view.lower


def test_deployed_ends_of_a_convolution_hold_zero_where_they_are_denormal(isa):
    x = torch.rand(1, 2, 4, 16)
    box = Interval(x, x + 0.1, rounding="deployed")
    result = F.conv2d(box, torch.full((3, 2, 1, 1), 2.0**-130))
    tiny = torch.finfo(torch.float32).tiny
    assert not ((result.lower > 0) & (result.lower < tiny)).any()
    assert not ((result.upper < 0) & (result.upper > -tiny)).any()
    assert bool(result.contains(torch.zeros(1, 3, 4, 16)).all())
