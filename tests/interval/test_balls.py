"""Balls made in one native call: the ends of torch operations, and to those is left the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyrobust import Interval, _native
from pyrobust.interval.type import ROUNDINGS


class Watching(TorchFunctionMode):
    """Wants to see every operation, so that none may be left out."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def native(monkeypatch):
    """What each native call gave."""
    given = []
    kernel = _native.ball

    def recording(*arguments):
        given.append(kernel(*arguments))
        return given[-1]

    monkeypatch.setattr(_native, "ball", recording)
    return given


@pytest.fixture(params=_native.supported_isas())
def isa(request):
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


def numbers(count: int, exponents: int) -> Tensor:
    scale = 2.0 ** torch.randint(-exponents, exponents + 1, (count,))
    return torch.randn(count) * scale


def by_torch(*arguments, **options) -> Interval:
    with Watching() as mode:
        box = Interval.ball(*arguments, **options)
    assert mode.calls > 0
    return box


def assert_same(one: Interval, two: Interval) -> None:
    assert one.rounding == two.rounding
    for found, expected in ((one.lower, two.lower), (one.upper, two.upper)):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_ends_are_those_of_torch_operations(rounding, isa, native):
    for exponents in (0, 20, 60, 120):
        x = numbers(1003, exponents)
        x[:6] = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1.1754944e-38, 2.0**100])
        for eps in (0, 1, 2, 0.1, 2 / 255, 1e-30, 1e-42, 1e30, 2.0**-140):
            assert_same(
                Interval.ball(x, eps, rounding=rounding), by_torch(x, eps, rounding=rounding)
            )
    assert all(box is not None for box in native)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("clamp", [(0, 1), (0.1, 0.3), (-1e-40, 1e-40), (-3.0, 1e30)])
def test_clamped_ones_too(rounding, clamp, isa, native):
    x = torch.rand(40, 25)
    for eps in (1, 1.5, 1e300):
        options = {"clamp": clamp, "rounding": rounding}
        assert_same(Interval.ball(x, eps, **options), by_torch(x, eps, **options))
    assert all(box is not None for box in native)


@pytest.mark.parametrize("shape", [(3, 2, 5), (1, 0, 4), (200, 300)])
def test_any_shape_and_number_of_threads(shape, native):
    x = torch.randn(shape)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            box = Interval.ball(x, 0.3)
        finally:
            torch.set_num_threads(before)
        assert box.shape == shape
        assert_same(box, by_torch(x, 0.3))
    assert native[0] is not None


def test_what_is_not_plain_is_left_to_torch(native):
    x = torch.rand(6)
    for other in (x.double(), x.reshape(2, 3).T, torch._neg_view(-x), x[0]):
        assert_same(Interval.ball(other, 0.1), by_torch(other, 0.1))
    for eps in (torch.tensor(0.1), torch.rand(6)):
        assert_same(Interval.ball(x, eps), by_torch(x, eps))
    assert native == [None] * 6

    class Mine(Interval):
        pass

    assert type(Mine.ball(x, 0.1)) is Mine


def test_gradients_flow_from_the_centre():
    x = torch.rand(6, requires_grad=True)
    box = Interval.ball(x, 0.1)
    (box.lower.sum() + 2 * box.upper.sum()).backward()
    assert torch.equal(x.grad, torch.full((6,), 3.0))
    with torch.no_grad():
        assert not Interval.ball(x, 0.1).requires_grad


def test_transforms_see_the_operations():
    x = torch.rand(3, 4)
    lower = torch.func.vmap(lambda row: Interval.ball(row, 0.1).lower)(x)
    assert torch.equal(lower, Interval.ball(x, 0.1).lower)


def test_a_flushing_caller_gets_ends_that_it_can_read():
    x = torch.zeros(4)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        box = Interval.ball(x, 1e-40)
        assert bool((box.lower < 0).all() & (box.upper > 0).all())
    finally:
        torch.set_flush_denormal(False)
