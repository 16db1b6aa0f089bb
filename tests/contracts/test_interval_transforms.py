"""Every rule of Interval under vmap, function transforms, forward mode and torch.compile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pyrobust import Interval

from .test_interval_rules import EACH, draw

ROUNDINGS = ["nearest", "real"]
TRACES_BOXES = tuple(int(v) for v in torch.__version__.split(".")[:2]) >= (2, 13)


def ends_of(row, rounding="real"):
    """The ends of a row's result as a function of the ends of the box."""

    def ends(lower, upper):
        result = row.call(Interval(lower, upper, rounding=rounding))
        return result.lower, result.upper

    return ends


def drawn(row, dtype=torch.float64):
    lower, upper = draw(row, 0.05)
    return lower.to(dtype), (upper + 0.01).to(dtype)


@EACH
def test_vmap_equals_a_loop(row):
    torch.manual_seed(0)
    boxes = [drawn(row, torch.float32) for _ in range(3)]
    stacked = [torch.stack(side) for side in zip(*boxes, strict=True)]
    mapped = torch.vmap(ends_of(row), randomness="same")(*stacked)
    looped = [torch.stack(side) for side in zip(*(ends_of(row)(*b) for b in boxes), strict=True)]
    # batched products take float64 instead of the kernels: both contain the image
    slack = 5e-4 if row.name == "multi_head_attention_forward" else 2e-4
    for got, expected in zip(mapped, looped, strict=True):
        torch.testing.assert_close(got, expected, rtol=3e-6, atol=slack)


@EACH
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_func_grad_equals_autograd(row, rounding):
    if not row.gradients:
        pytest.skip("not differentiable by intent")
    lower, upper = drawn(row)

    def width(low, high):
        ends = ends_of(row, rounding)(low, high)
        return (ends[1] * 3 - ends[0]).sum()

    got = torch.func.grad(width, argnums=(0, 1))(lower, upper)
    leaves = lower.requires_grad_(), upper.requires_grad_()
    expected = torch.autograd.grad(width(*leaves), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@EACH
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_forward_mode_equals_autograd(row, rounding):
    if not row.gradients:
        pytest.skip("not differentiable by intent")
    ends = ends_of(row, rounding)
    primals = drawn(row)
    tangents = tuple(torch.randn_like(p) for p in primals)
    _, forward = torch.func.jvp(ends, primals, tangents)
    leaves = tuple(p.requires_grad_() for p in primals)
    for side, tangent in enumerate(forward):
        cotangent = torch.randn_like(tangent)
        back = torch.autograd.grad(ends(*leaves)[side], leaves, cotangent, allow_unused=True)
        pairs = zip(back, tangents, strict=True)
        expected = sum(float((b * t).sum()) for b, t in pairs if b is not None)
        assert float((tangent * cotangent).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.slow
@pytest.mark.skipif(not TRACES_BOXES, reason="older torch does not trace __torch_function__")
@EACH
@pytest.mark.parametrize("rounding", ["nearest", "real", "deployed"])
def test_every_rule_compiles_whole(row, rounding):
    """The same bits as eager mode, and its gradients."""
    if (row.name, row.label) == ("matmul", "two boxes"):
        # `@` of two boxes is not traced: tests/interval/test_compiled.py
        row = replace(row, call=lambda x: torch.matmul(x, x.mT))
    leaves = [end.requires_grad_() for end in drawn(row, torch.float32)]
    eager = ends_of(row, rounding)(*leaves)
    torch._dynamo.reset()
    compiled = torch.compile(ends_of(row, rounding), backend="aot_eager", fullgraph=True)(*leaves)
    for got, expected in zip(compiled, eager, strict=True):
        if rounding == "nearest" and row.name == "interpolate":  # torch writes it out to compile it
            torch.testing.assert_close(got, expected)
        else:
            assert torch.equal(got, expected)
    # torch 2.13 compiles a wrong gradient of overlapping windows, without boxes as well
    if row.gradients and row.name != "unfold":
        cotangents = [torch.randn_like(end) for end in eager]
        expected = torch.autograd.grad(eager, leaves, cotangents)
        for a, b in zip(torch.autograd.grad(compiled, leaves, cotangents), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@EACH
def test_float64_boxes_contain_the_image(row):
    lower, upper = drawn(row)
    low, high = ends_of(row)(lower, upper)
    assert low.dtype == torch.float64
    for share in (torch.zeros(()), torch.ones(()), torch.rand(row.shape), torch.rand(row.shape)):
        value = row.call(torch.lerp(lower, upper, share.double().expand(row.shape)))
        slack = 1e-12 * (1 + value.abs())
        assert bool(((low - slack <= value) & (value <= high + slack)).all())


@pytest.mark.skipif(not TRACES_BOXES, reason="older torch does not trace __torch_function__")
def test_norms_compile_whole():
    torch._dynamo.reset()

    def ends(lower, upper):
        box = torch.nn.functional.layer_norm(Interval(lower, upper), (6,))
        return box.lower, box.upper

    lower, upper = torch.zeros(2, 6), torch.ones(2, 6)
    compiled = torch.compile(ends, backend="eager", fullgraph=True)(lower, upper)
    torch.testing.assert_close(compiled, ends(lower, upper))
