"""Gradients with radii in bfloat16: within the stated bound of float64, where asked for alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyrobust import Interval, pack
from pyrobust.ops import _interval_conv
from pyrobust.ops.interval import interval_conv2d, interval_linear, radius_precision

from .test_interval_gradients import reference_conv, reference_linear
from .test_interval_radius_precision import used

pytestmark = pytest.mark.emulated_tiles

OF_RADIUS = 3.1 / 256  # of the sum of magnitudes: two operands and the result
OF_CENTRE = 2.0**-17  # sums in float32
WINDOWS = [
    ((3, 8, 9, 9), (16, 8, 3, 3), {"padding": 1}),
    ((2, 8, 9, 10), (16, 4, 4, 2), {"padding": "same", "groups": 2}),
    ((9, 8, 11, 9), (12, 8, 3, 2), {"dilation": (2, 1), "padding": (1, 0), "stride": 2}),
]


def random(shape):
    return torch.randn(shape)


def between_neighbours(shape):
    """Numbers that bfloat16 cannot come closer to than 2^-8, all cut to 1 in size."""
    return (1 + 2.0**-8 * (1 - 2.0**-12)) * torch.randn(shape).sign()


def box(values, shape):
    x, width = values(shape), values(shape).abs()
    return (x - width / 2).contiguous(), (x + width / 2).contiguous()


def gradients(operator, tensors, cotangents, precision, wanted=(True, True, True, True)):
    inputs = [t.clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
    with radius_precision("float32", gradients=precision):
        ends = operator(*inputs)
    torch.autograd.backward(ends, cotangents)  # outside of the block
    return [t.grad for t in inputs]


def magnitudes(layer, lower, upper, weight, to_lower, to_upper):
    """Sums of magnitudes of the radius's and the centre's part, for the ends and the weight."""
    sums = []
    for x, out in (
        ((upper - lower) / 2, (to_upper - to_lower).abs()),
        (((upper + lower) / 2).abs(), (to_upper + to_lower).abs()),
    ):
        x, size = x.double().requires_grad_(), weight.double().abs().requires_grad_()
        sums.append(torch.autograd.grad(layer(x, size), (x, size), out.double()))
    return [(radius, centre) for radius, centre in zip(*sums, strict=True)]


def check(operator, reference, layer, tensors, cotangents):
    """All four gradients against float64; returns the largest error as a share of the bound."""
    exact = [t.double().requires_grad_() for t in tensors]
    due = torch.autograd.grad(reference(*exact), exact, [c.double() for c in cotangents])
    got = gradients(operator, tensors, cotangents, "bfloat16")
    plain = gradients(operator, tensors, cotangents, "float32")
    assert torch.equal(got[3], plain[3])  # a bias has no radius
    (x_radius, x_centre), (w_radius, w_centre) = magnitudes(layer, *tensors[:3], *cotangents)
    worst = 0.0
    for i, radius, centre in ((0, x_radius, x_centre), (1, x_radius, x_centre), (2, w_radius, 0)):
        scale = 0.5 if i < 2 else 1.0
        centre = centre if i < 2 else w_centre
        allowed = scale * (OF_RADIUS * radius + OF_CENTRE * (centre + radius))
        error = (got[i].double() - due[i]).abs()
        assert bool((error <= allowed).all())
        worst = max(worst, float((error / allowed).max()))
        if used():
            assert not torch.equal(got[i], plain[i])
        else:
            assert torch.equal(got[i], plain[i])
    return worst


@pytest.mark.parametrize("values", [random, between_neighbours])
@pytest.mark.parametrize("shape", [(5, 130, 105), (64, 33, 40), (128, 600, 64)])
def test_linear(isa, shape, values):
    batch, terms, rows = shape
    tensors = *box(values, (batch, terms)), values((rows, terms)), torch.randn(rows)
    cotangents = [0.5 * values((batch, rows)).abs(), torch.zeros(batch, rows)]
    worst = check(
        lambda *t: interval_linear(*t, rounding="nearest"),
        lambda *t: reference_linear(*t, False),
        F.linear,
        tensors,
        cotangents,
    )
    if used() and values is between_neighbours:
        assert worst > 0.6  # both operands are as far off as can be, and to the same side


@pytest.mark.parametrize("block", [400, 1 << 21])
@pytest.mark.parametrize("window", WINDOWS)
def test_convolution(monkeypatch, isa, window, block):
    monkeypatch.setattr(_interval_conv, "_BLOCK", block)
    images, weight, options = window
    tensors = *box(random, images), torch.randn(weight), torch.randn(weight[0])
    shape = interval_conv2d(*tensors, **options)[0].shape
    cotangents = [torch.randn(shape), torch.randn(shape)]

    def layer(x, size):
        return F.conv2d(x, size, None, **options)

    check(
        lambda *t: interval_conv2d(*t, rounding="nearest", **options),
        lambda *t: reference_conv(*t, False, options),
        layer,
        tensors,
        cotangents,
    )


ALL = (True, True, True, True)
SOME = [tuple(i != frozen for i in range(4)) for frozen in range(4)]
SOME += [(False, False, True, False), (True, True, False, False)]


@pytest.mark.parametrize("wanted", SOME, ids=str)
def test_only_what_is_wanted(wanted):
    images, weight, options = WINDOWS[0]
    problems = (
        (interval_linear, (*box(random, (20, 80)), torch.randn(60, 80), torch.randn(60))),
        (
            lambda *t: interval_conv2d(*t, rectified=True, **options),
            (*box(random, images), torch.randn(weight), torch.randn(weight[0])),
        ),
    )
    for operator, tensors in problems:
        out = operator(*tensors)[0]
        cotangents = [torch.randn_like(out), torch.randn_like(out)]
        everything = gradients(operator, tensors, cotangents, "bfloat16", ALL)
        some = gradients(operator, tensors, cotangents, "bfloat16", wanted)
        for a, b, asked in zip(everything, some, wanted, strict=True):
            assert (b is not None) == asked
            if asked:  # another order of a sum may end at a neighbour
                torch.testing.assert_close(a, b, rtol=0.0, atol=2.0**-7 * float(a.abs().max()))


@pytest.mark.parametrize("layer", [torch.nn.Linear(192, 96), torch.nn.Conv2d(8, 24, 3, padding=1)])
def test_packed_layers(layer):
    x = torch.randn((16, 192) if isinstance(layer, torch.nn.Linear) else (4, 8, 12, 12))
    packed = pack(torch.nn.Sequential(layer), bits=4, group_size=32)
    results = []
    for precision in ("float32", "bfloat16"):
        lower = (x - 0.1).requires_grad_()
        with radius_precision("float32", gradients=precision):
            image = packed(Interval(lower, x + 0.1))
        (image.upper.square().sum() - image.lower.sum()).backward()
        results.append(lower.grad)
    assert torch.equal(*results) != used()
    torch.testing.assert_close(*results, rtol=0.0, atol=0.02 * float(results[0].abs().max()))


def test_small_products_and_recorded_backward_passes_keep_float32():
    small = *box(random, (4, 16)), torch.randn(8, 16), torch.randn(8)
    cotangents = [torch.randn(4, 8), torch.randn(4, 8)]
    one = gradients(interval_linear, small, cotangents, "bfloat16")
    for a, b in zip(one, gradients(interval_linear, small, cotangents, "float32"), strict=True):
        assert torch.equal(a, b)

    large = *box(random, (64, 96)), torch.randn(80, 96), torch.randn(80)
    results = []
    for precision in ("float32", "bfloat16"):
        inputs = [t.clone().requires_grad_() for t in large]
        with radius_precision("float32", gradients=precision):
            ends = interval_linear(*inputs)
        results.append(torch.autograd.grad(ends[1].square().sum(), inputs, create_graph=True))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_bounds_do_not_depend_on_it_and_blocks_nest():
    tensors = *box(random, (64, 96)), torch.randn(80, 96), torch.randn(80)
    cotangents = [torch.randn(64, 80), torch.randn(64, 80)]
    plain = gradients(interval_linear, tensors, cotangents, "float32")
    with radius_precision("float32", gradients="bfloat16"):
        assert torch.equal(interval_linear(*tensors)[0], interval_linear(*tensors)[0])
        with radius_precision("bfloat16"):
            inside = gradients(interval_linear, tensors, cotangents, "float32")
        inputs = [t.clone().requires_grad_() for t in tensors]
        ends = interval_linear(*inputs)
    ends_outside = interval_linear(*tensors)
    assert torch.equal(ends[0].detach(), ends_outside[0])
    torch.autograd.backward(ends, cotangents)
    after = gradients(interval_linear, tensors, cotangents, "float32")
    for i, a in enumerate(plain):
        assert torch.equal(a, inside[i])
        assert torch.equal(a, after[i])
    assert torch.equal(inputs[2].grad, plain[2]) != used()


def test_another_name_is_refused():
    with pytest.raises(ValueError, match=r"radius_precision: gradients must be one of .*half"):
        radius_precision("bfloat16", gradients="half").__enter__()
