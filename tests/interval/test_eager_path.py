"""Layers in plain eager inference are one native call: same ends as the operators, same errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pyrobust import Interval, _native, pack
from pyrobust.nn import PackedLinear
from pyrobust.ops import packed_linear
from pyrobust.quantize import round_to_codebook, round_to_two_level

ROUNDINGS = ["nearest", "real", "deployed"]


def network(kind: str) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(70, 40), nn.ReLU(), nn.Linear(40, 9)).eval()
    if kind == "linear":
        return model
    if kind == "two-level":
        weight = round_to_two_level(model[0].weight, bits=4, group_size=8)
        return nn.Sequential(PackedLinear.from_qtensor(weight, model[0].bias), nn.ReLU())
    if kind == "codebook":
        weight = round_to_codebook(model[0].weight, group_size=8)
        return nn.Sequential(PackedLinear.from_qtensor(weight), nn.ReLU())
    activations = "int8" if kind == "int8" else None
    bits = 4 if kind == "int8" else float(kind)
    return nn.Sequential(*pack(model, bits=bits, group_size=64, activations=activations))


KINDS = ["linear", "1", "1.58", "2", "3", "4", "8", "int8", "two-level", "codebook"]


@pytest.fixture
def native_calls(monkeypatch):
    calls = []
    for name in ("box_linear", "box_packed_linear"):
        kernel = getattr(_native, name)
        monkeypatch.setattr(
            _native, name, lambda *a, k=kernel: calls.append(result := k(*a)) or result
        )
    return calls


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("shape", [(70,), (1, 70), (2, 3, 70), (0, 70)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_are_those_of_the_operators(kind, shape, rounding, native_calls):
    model, x = network(kind), torch.randn(shape)
    box = Interval(x - 0.1, x + 0.1, rounding=rounding)
    with torch.no_grad():
        fast = model(box)
        ends = fast.lower, fast.upper
        assert native_calls
        assert all(call is not None for call in native_calls)
    plain = [p.requires_grad_(True) for p in model.parameters()]  # makes autograd look
    if not plain:
        box.requires_grad_()
    slow = model(box)
    assert slow.requires_grad
    torch.testing.assert_close(ends[0], slow.lower.detach(), rtol=0, atol=0)
    torch.testing.assert_close(ends[1], slow.upper.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("isa", _native.supported_isas())
@pytest.mark.parametrize("batch", [1, 3, 9])
def test_deployed_ends_hold_the_zero_that_flushing_makes_of_denormals(isa, batch):
    before = _native.isa()
    _native.set_isa(isa)
    try:
        layer = nn.Linear(2, 33, bias=False)
        nn.init.constant_(layer.weight, 2.0**-120)
        for sign in (1.0, -1.0):
            ends = torch.full((batch, 2), sign * 2.0**-8)
            with torch.no_grad():
                box = layer(Interval(ends, ends, rounding="deployed"))
            assert not bool(((box.lower > 0) & (box.lower < 2.0**-126)).any())
            assert not bool(((box.upper < 0) & (box.upper > -(2.0**-126))).any())
            assert bool(box.contains(torch.zeros(batch, 33)).all())
    finally:
        _native.set_isa(before)


@pytest.mark.parametrize("isa", _native.supported_isas())
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("kind", ["linear", "4"])
def test_the_layer_that_overflows_is_named_with_its_place(kind, batch, isa):
    before = _native.isa()
    _native.set_isa(isa)
    try:
        model = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 3), nn.Linear(3, 2))
        nn.init.constant_(model[2].weight, 3e38)
        nn.init.constant_(model[0].weight, 10.0)
        if kind == "4":
            model = pack(model, bits=4, group_size=64)
        with (
            torch.no_grad(),
            pytest.raises(OverflowError, match=r"in 2, a (Packed)?Linear, of (Packed)?Seq"),
        ):
            model(Interval(torch.ones(batch, 8), torch.ones(batch, 8)))
    finally:
        _native.set_isa(before)


@pytest.mark.parametrize("isa", _native.supported_isas())
@pytest.mark.parametrize("batch", [1, 4, 11])
def test_kernels_tell_one_infinite_end_among_many(isa, batch):
    before = _native.isa()
    _native.set_isa(isa)
    try:
        x, weight = torch.ones(batch, 5), torch.ones(37, 5)
        for row in (0, 17, 36):
            large = weight.clone()
            large[row] = 3e38
            for matrix, expected in ((weight, True), (large, False), (-large, False)):
                low, high, finite = _native.eager_interval_linear(
                    x, x, matrix, None, "real", False, 1, False, False
                )
                assert finite is expected
                assert bool(low.isfinite().all() & high.isfinite().all()) is expected
    finally:
        _native.set_isa(before)


def test_modes_and_overriding_weights_are_asked():
    class Counting(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.calls += func is packed_linear
            return func(*args, **(kwargs or {}))

    packed = pack(nn.Sequential(nn.Linear(64, 4)), bits=4, group_size=32)
    with Counting() as mode, torch.no_grad():
        packed(Interval(torch.zeros(1, 64), torch.ones(1, 64)))
    assert mode.calls == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_are_looked_at_in_one_call(dtype):
    one = torch.ones(2, 3, dtype=dtype)
    assert _native.box_is_finite(-one, one) is True
    for low, high in ((one, -one), (one, one * math.inf), (one * math.nan, one)):
        assert _native.box_is_finite(low, high) is False
    for low, high in ((one, one.half()), (one, one[0]), (one.long(), one.long()), (one, None)):
        assert _native.box_is_finite(low, high) is None
    assert _native.box_is_finite(one.mT, one.mT) is None  # not dense
    assert _native.box_is_finite(one, torch._neg_view(-one)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_boxes_that_end_in_denormals_are_changed(dtype):
    tiny = torch.finfo(dtype).tiny
    one = torch.ones(5, dtype=dtype)
    for low, high, found in (
        (-one, one, False),
        (one * 0, one, False),
        (one * tiny, one, False),
        (-one * tiny / 2, one * tiny / 2, False),  # these ends contain zero
        (one * tiny / 2, one, True),
        (-one, -one * tiny / 2, True),
    ):
        assert _native.box_ends_in_denormals(low, high) is found
        box = Interval(low, high, rounding="deployed")
        assert bool(box.contains(torch.zeros(5, dtype=dtype)).all()) is (
            found or bool((low <= 0).all() and (high >= 0).all())
        )
        if not found:
            assert torch.equal(box.lower, low)
            assert torch.equal(box.upper, high)
    assert _native.box_ends_in_denormals(one.expand(3, 5).T, one.expand(3, 5).T) is None
    strided = torch.full((3, 5), tiny / 2, dtype=dtype).T
    assert bool((Interval(strided, strided + 1, rounding="deployed").lower == 0).all())
