"""Gradients of float32 boxes: the fused passes against the definition in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyrobust import Interval
from pyrobust.ops import _interval_conv
from pyrobust.ops.interval import interval_conv2d, interval_linear

WINDOWS = [
    ((5, 4, 7, 6), (6, 4, 3, 3), {"padding": 1, "stride": 2}),
    ((5, 4, 6, 9), (6, 2, 4, 2), {"padding": "same", "groups": 2}),
    ((3, 2, 8, 5), (3, 2, 3, 2), {"dilation": (2, 1), "padding": (1, 0)}),
]


def clipped(lower, upper, rectified):
    return (lower.relu(), upper.relu()) if rectified else (lower, upper)


def reference_linear(lower, upper, weight, bias, rectified):
    lower, upper = clipped(lower, upper, rectified)
    middle = F.linear((lower + upper) / 2, weight, bias)
    reach = F.linear((upper - lower) / 2, weight.abs())
    return middle - reach, middle + reach


def reference_conv(lower, upper, weight, bias, rectified, options):
    lower, upper = clipped(lower, upper, rectified)
    middle = F.conv2d((lower + upper) / 2, weight, bias, **options)
    reach = F.conv2d((upper - lower) / 2, weight.abs(), None, **options)
    return middle - reach, middle + reach


def problem(shape, weight):
    x = torch.randn(shape)
    tensors = x - 0.3, x + 0.3, torch.randn(weight), torch.randn(weight[0])
    tensors[2].view(-1)[0] = 0.0  # |w| has no slope there: sign(0) = 0
    return tensors


def compare(ours, theirs, tensors, *, create_graph=False):
    inputs = [t.clone().requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    ends, wanted = ours(*inputs), theirs(*exact)
    cotangents = [torch.randn_like(end) for end in ends]
    got = torch.autograd.grad(ends, inputs, cotangents, create_graph=create_graph)
    due = torch.autograd.grad(
        wanted, exact, [c.double() for c in cotangents], create_graph=create_graph
    )
    for a, b in zip(got, due, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    if create_graph:
        second = torch.autograd.grad(sum(g.square().sum() for g in got), inputs[:3])
        second_due = torch.autograd.grad(sum(g.square().sum() for g in due), exact[:3])
        for a, b in zip(second, second_due, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("rectified", [False, True])
def test_linear(rectified, create_graph):
    for shape in ((7,), (5, 7), (2, 3, 7)):
        compare(
            lambda *t: interval_linear(*t, rounding="nearest", rectified=rectified),
            lambda *t: reference_linear(*t, rectified),
            problem(shape, (4, 7)),
            create_graph=create_graph,
        )


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("block", [1, 400, 1 << 21])
@pytest.mark.parametrize("window", WINDOWS)
def test_convolution_in_blocks_of_images(monkeypatch, window, block, rectified, create_graph):
    monkeypatch.setattr(_interval_conv, "_BLOCK", block)
    images, weight, options = window
    compare(
        lambda *t: interval_conv2d(*t, rounding="nearest", rectified=rectified, **options),
        lambda *t: reference_conv(*t, rectified, options),
        problem(images, weight),
        create_graph=create_graph,
    )


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_only_what_is_wanted(frozen):
    images, weight, options = WINDOWS[0]
    for operator, tensors in (
        (lambda *t: interval_conv2d(*t, **options), problem(images, weight)),
        (interval_linear, problem((5, 7), (4, 7))),
    ):
        everything = [t.clone().requires_grad_() for t in tensors]
        some = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(tensors)]
        for inputs in (everything, some):
            lower, upper = operator(*inputs)
            (lower.sum() + 2 * upper.sum()).backward()
        for i, (a, b) in enumerate(zip(everything, some, strict=True)):
            if i == frozen:
                assert b.grad is None
            else:
                torch.testing.assert_close(a.grad, b.grad)


def test_no_images_have_no_gradient():
    lower = torch.zeros(0, 2, 5, 5, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, requires_grad=True)
    ends = interval_conv2d(lower, lower.detach(), weight)
    (ends[0].sum() + ends[1].sum()).backward()
    assert lower.grad.shape == lower.shape
    assert (weight.grad == 0).all()


def test_a_relu_that_waits_keeps_the_mode_it_was_asked_for_in():
    weight = torch.randn(4, 7)
    x = torch.randn(5, 7)

    def gradient(use):
        low = (x - 0.3).requires_grad_()
        use(Interval(low, x + 0.3)).sum().backward()
        return low.grad

    def layer(box):
        box = F.linear(box, weight)
        return box.lower + box.upper

    def read_without_gradients(box):
        box = torch.relu(box)
        with torch.no_grad():
            assert not torch.isnan(box.lower).any()
        return layer(box)

    eager = gradient(lambda box: layer(Interval(box.lower.relu(), box.upper.relu())))
    torch.testing.assert_close(gradient(lambda box: layer(torch.relu(box))), eager)
    torch.testing.assert_close(gradient(read_without_gradients), eager)
    twice = gradient(lambda box: layer(torch.relu(torch.relu(box))))
    torch.testing.assert_close(twice, eager)

    box = Interval((x - 0.3).requires_grad_(), x + 0.3)
    with torch.no_grad():
        constant = torch.relu(box)
    assert not constant.requires_grad
    assert not layer(constant).requires_grad
