"""Batch norm and residual sums in one native pass: exact containment, the rules' own answers."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from pyrobust import Interval
from pyrobust.interval.finite import infinite_ends
from pyrobust.interval.table import RULES

pytestmark = pytest.mark.emulated_tiles

SOUND = ["real", "deployed"]


@pytest.fixture
def passes(watch_passes):
    """Names of the native passes whose ends were taken."""
    return watch_passes("interval_add", "interval_channel_affine")


def spread(shape, low=-40, high=40):
    """Random signs and mantissas with exponents uniform in [low, high)."""
    return (torch.rand(shape) - 0.5) * torch.exp2(torch.randint(low, high, shape).float())


def box_of(x, width, rounding):
    return Interval(x - width.abs(), x + width.abs(), rounding=rounding)


def fractions(tensor):
    return [Fraction(value) for value in tensor.flatten().tolist()]


PAIRS = {
    "ordinary": lambda: (torch.randn(3, 5, 7), torch.randn(3, 5, 7)),
    "exponents": lambda: (spread((3, 5, 7)), spread((3, 5, 7))),
    "cancelling": lambda: (
        (x := spread((3, 5, 7))),
        -x * (1 + 2.0**-22 * torch.randint(-2, 3, (3, 5, 7))),
    ),
    "denormal": lambda: (spread((3, 5, 7), -148, -120), spread((3, 5, 7), -148, -120)),
    "halfway": lambda: (1 + torch.rand(3, 5, 7), torch.full((3, 5, 7), 2.0**-24)),
}


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("kind", PAIRS)
def test_a_sum_is_the_least_box_around_the_exact_one(isa, kind, rounding, passes):
    x, y = PAIRS[kind]()
    a, b = box_of(x, x * 1e-3, rounding), box_of(y, y * 1e-4, rounding)
    result = a + b
    assert passes == ["interval_add"]
    inner = torch.nextafter(result.lower, torch.tensor(torch.inf))
    for ends, exact_of in (
        ((result.lower, inner), zip(fractions(a.lower), fractions(b.lower), strict=True)),
        ((-result.upper, -torch.nextafter(result.upper, torch.tensor(-torch.inf))),
         zip(fractions(-a.upper), fractions(-b.upper), strict=True)),
    ):  # fmt: skip
        for end, next_end, (p, q) in zip(*map(fractions, ends), exact_of, strict=True):
            assert end <= p + q
            flushes = rounding == "deployed" and abs(p + q) < Fraction(2) ** -126
            assert flushes or next_end > p + q


@pytest.mark.parametrize("rounding", [*SOUND, "nearest"])
def test_a_sum_is_that_of_the_rule(isa, rounding, passes):
    x, y = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    a, b = box_of(x, x * 0.1, rounding), box_of(y, y * 0.1, rounding)
    wide = Interval(b.lower.transpose(1, 2).contiguous().transpose(1, 2), b.upper)
    wide.rounding = rounding
    for left, right in ((a, b), (F.relu(a), b), (a, F.relu(b)), (F.relu(a), F.relu(a))):
        fast, slow = left + right, RULES[torch.add](left, right)
        assert torch.equal(fast.lower, slow.lower)
        assert torch.equal(fast.upper, slow.upper)
    assert passes == ["interval_add"] * 4
    assert torch.equal((a + wide).lower, (a + b).lower)
    assert passes == ["interval_add"] * 5


def test_sums_take_the_weaker_promise_and_change_in_place():
    a = Interval(torch.zeros(2, 8), torch.ones(2, 8), rounding="deployed")
    b = Interval(torch.zeros(2, 8), torch.ones(2, 8), rounding="nearest")
    assert (a + b).rounding == "nearest"
    view = a[0]
    a += b
    assert a.rounding == "nearest"
    assert torch.equal(a.upper, torch.full((2, 8), 2.0))
    with pytest.raises(NotImplementedError, match="changed in place"):
        _ = view.lower


def test_overflow_of_a_pass_is_one_error_with_its_name():
    big = Interval(torch.full((1, 2, 9), 3e38), torch.full((1, 2, 9), 3.1e38))
    with pytest.raises(OverflowError, match="add leaves the range"):
        _ = big + big
    with pytest.raises(OverflowError, match="batch_norm leaves the range"):
        F.batch_norm(big, torch.zeros(2), torch.full((2,), 1e-8), eps=0.0)
    with infinite_ends():
        total = big + big
        normed = F.batch_norm(big, torch.zeros(2), torch.full((2,), 1e-8), eps=0.0)
    assert (total.upper == torch.inf).all()
    assert (normed.upper == torch.inf).all()
    assert not normed.lower.isnan().any()


@pytest.mark.parametrize("shape", [(1, 1, 3, 4), (2, 1)])
def test_a_deployed_batch_norm_refuses_what_overflows_on_the_way(isa, shape):
    x = torch.full(shape, 3e38)
    statistics = torch.full((1,), -3e38), torch.full((1,), 1e38)
    real = F.batch_norm(Interval(x, x), *statistics)
    assert bool(torch.isfinite(real.upper).all())
    with pytest.raises(OverflowError, match="batch_norm leaves the range"):
        F.batch_norm(Interval(x, x, rounding="deployed"), *statistics)


def channels(pixels):
    """Images ``(1, C, 1, pixels)`` near the means, and ``(mean, variance, weight, bias)``."""
    variance = torch.tensor([0.0, 1e-38, 1e-30, 1e-20, 1e-12, 1.0, 1e20]).repeat(6)
    mean = torch.tensor([0.0, 1.0, -1e6, 3e-39, 1e20, -0.1]).repeat_interleave(7)
    near = mean[:, None] * (1 + 2.0**-22 * torch.randn(42, pixels))
    weight, bias = torch.randn(42), torch.randn(42) * 10.0 ** torch.randint(-30, 8, (42,))
    return near[None, :, None], mean, variance, weight, bias


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("width", [0.0, 1e-40, 1e-3])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("pixels", [1, 19])
def test_attained_corners_of_a_batch_norm_lie_inside(isa, pixels, clip, width, rounding, passes):
    mpmath = pytest.importorskip("mpmath")
    eps = 1e-12
    x, *parameters = channels(pixels)
    x = x if pixels > 1 else x[:, :, 0, 0]
    box = Interval(x - width, x + width, rounding=rounding)
    box = F.relu(box) if clip else box
    with torch.no_grad():
        result = F.batch_norm(box, *parameters, eps=eps)
    assert passes == ["interval_channel_affine"]
    with mpmath.workdps(60):
        for i in range(42):
            mean, variance, weight, bias = (mpmath.mpf(float(t[i])) for t in parameters)
            slope = weight / mpmath.sqrt(variance + mpmath.mpf(eps))
            lower, upper = result.lower[0, i].flatten(), result.upper[0, i].flatten()
            for corner in (box.lower[0, i].flatten(), box.upper[0, i].flatten()):
                for p in range(0, pixels, 3):
                    exact = (mpmath.mpf(float(corner[p])) - mean) * slope + bias
                    assert mpmath.mpf(float(lower[p])) <= exact
                    assert exact <= mpmath.mpf(float(upper[p]))


SHAPES = [(3, 4, 5, 6), (5, 4), (2, 4, 3), (19, 37), (4, 300)]


def statistics_of(channels):
    """Mean, variance, weight of both signs and one zero, bias."""
    weight = torch.randn(channels)
    weight[0] = 0.0
    return torch.randn(channels), torch.rand(channels) + 0.1, weight, torch.randn(channels)


@pytest.mark.parametrize("rounding", [*SOUND, "nearest"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("clip", [False, True])
def test_a_batch_norm_is_as_tight_as_its_rule(isa, clip, shape, rounding, passes):
    x, parameters = torch.randn(shape), statistics_of(shape[1])
    box = Interval(x - 0.01, x + 0.01, rounding=rounding)
    box = F.relu(box) if clip else box
    fast = F.batch_norm(box, *parameters)
    slow = RULES[F.batch_norm](box, *parameters)
    assert passes == ["interval_channel_affine"]
    for a, b in ((fast.lower, slow.lower), (fast.upper, slow.upper)):
        torch.testing.assert_close(a, b, rtol=2.0**-22, atol=2.0**-20)  # "nearest": in float32
    assert torch.equal(F.batch_norm(box, *parameters[:2]).lower, F.batch_norm(
        box, *parameters[:2], torch.ones(shape[1]), torch.zeros(shape[1])).lower)  # fmt: skip


def test_statistics_of_any_type_and_layout_give_one_map(isa):
    x, parameters = torch.randn(6, 8), [t.bfloat16() for t in statistics_of(8)]
    box = Interval(x - 0.01, x + 0.01)
    expected = F.batch_norm(box, *(t.float() for t in parameters))
    strided = [torch.stack([t, t], 1)[:, 1] for t in parameters]
    for given in (parameters, [t.double() for t in parameters], strided, [
        parameters[0].float(), *parameters[1:]
    ]):  # fmt: skip
        result = F.batch_norm(box, *given)
        assert torch.equal(result.lower, expected.lower)
        assert torch.equal(result.upper, expected.upper)


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("rounding", ["real", "nearest"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("clip", [False, True])
def test_gradients_of_a_batch_norm_are_those_of_its_rule(isa, clip, shape, rounding, passes):
    x, parameters = torch.randn(shape), statistics_of(shape[1])
    parameters[2][0] = 1.0  # at a scale of zero there is a choice
    grads, second = [], []
    for rule in (F.batch_norm, RULES[F.batch_norm]):
        inputs = leaves(x - 0.1, x + 0.1, *parameters)
        box = Interval(*inputs[:2], rounding=rounding)
        result = rule(F.relu(box) if clip else box, *inputs[2:])
        assert result.rounding == rounding
        loss = (result.lower * torch.arange(x.numel()).reshape(shape)).sum() + result.upper.sum()
        grads.append(torch.autograd.grad(loss, inputs, retain_graph=True))
        again = torch.autograd.grad(loss, inputs, create_graph=True)
        torch.testing.assert_close(again, grads[-1], rtol=1e-5, atol=1e-3)
        squares = sum((g * g).sum() for g in again)
        second.append(torch.autograd.grad(squares, inputs, materialize_grads=True))
    assert passes == ["interval_channel_affine"]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-1)


def test_gradients_of_ends_or_parameters_alone(isa):
    x, parameters = torch.randn(3, 4, 9), statistics_of(4)
    inputs = leaves(x - 0.1, x + 0.1, *parameters)
    whole = F.batch_norm(Interval(*inputs[:2]), *inputs[2:])
    expected = torch.autograd.grad(whole.upper.sum(), inputs)
    for of in range(6):
        given = [t.detach() if i != of else t for i, t in enumerate(inputs)]
        result = F.batch_norm(Interval(*given[:2]), *given[2:])
        assert torch.equal(result.lower, whole.lower)
        (gradient,) = torch.autograd.grad(result.upper.sum(), inputs[of])
        assert torch.equal(gradient, expected[of])


@pytest.mark.parametrize("clips", [(False, False), (True, False), (False, True), (True, True)])
def test_gradients_of_a_sum_are_those_of_its_rule(isa, clips, passes):
    x, y = torch.randn(3, 7), torch.randn(3, 7)
    grads = []
    for rule in (torch.add, RULES[torch.add]):
        inputs = leaves(x - 0.1, x + 0.1, y - 0.2, y + 0.3)
        boxes = Interval(*inputs[:2]), Interval(*inputs[2:])
        total = rule(*(F.relu(b) if clip else b for b, clip in zip(boxes, clips, strict=True)))
        loss = (total.lower * torch.arange(7)).sum() + total.upper.square().sum()
        grads.append(torch.autograd.grad(loss, inputs))
        if rule is torch.add:
            assert torch.equal(torch.autograd.grad((rule(boxes[0], boxes[1].lower)).upper.sum(),
                                                   inputs[1])[0], torch.ones(3, 7))  # fmt: skip
    assert passes == ["interval_add"]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_sums_of_a_box_with_itself_and_of_constants_have_gradients():
    low, high, constant = *leaves(torch.zeros(2, 3), torch.ones(2, 3)), torch.ones(2, 3)
    box = Interval(low, high)
    (gradient,) = torch.autograd.grad((box + box).upper.sum(), high)
    assert torch.equal(gradient, torch.full((2, 3), 2.0))
    (gradient,) = torch.autograd.grad((box + Interval(constant, constant)).upper.sum(), high)
    assert torch.equal(gradient, torch.ones(2, 3))


def test_ends_that_the_backward_pass_needs_may_not_change_in_place():
    low, high = leaves(torch.zeros(2, 3), torch.ones(2, 3))
    inner = low * 1, high * 1
    result = F.batch_norm(Interval(*inner), torch.zeros(3), torch.ones(3))
    inner[1].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.upper.sum().backward()


def test_deployed_batch_norm_holds_torch_and_its_folded_form(isa):
    for seed in range(20):
        torch.manual_seed(seed)
        x, mean, variance, weight, bias = channels(16)
        box = Interval(x - 1e-3, x + 1e-3, rounding="deployed")
        result = F.batch_norm(box, mean, variance, weight, bias, eps=1e-12)
        scale = weight * (variance + 1e-12).rsqrt()
        point = torch.minimum(torch.maximum(x, box.lower), box.upper)
        folded = bias - mean * scale
        for y in (
            F.batch_norm(point, mean, variance, weight, bias, eps=1e-12),
            point * scale[:, None, None] + folded[:, None, None],
        ):
            assert bool(result.contains(y).all())


def test_what_a_batch_norm_refuses_stays_refused():
    box = Interval(torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4))
    with pytest.raises(ValueError, match="evaluation mode"):
        F.batch_norm(box, torch.zeros(3), torch.ones(3), training=True)
    with pytest.raises(ValueError, match=r"one a channel.*got \(4,\)"):
        F.batch_norm(box, torch.zeros(4), torch.ones(4))


@pytest.mark.parametrize("rounding", [*SOUND, "nearest"])
def test_compiled_batch_norms_run_the_pass_with_the_bits_of_eager_mode(rounding, passes):
    x, parameters = torch.randn(4, 6), [*statistics_of(6)]
    parameters[2][0] = 1.0

    def ends(lower, upper, *values):
        result = F.batch_norm(F.relu(Interval(lower, upper, rounding=rounding)), *values)
        return result.lower, result.upper

    inputs = leaves(x - 0.1, x + 0.1, *parameters)
    eager = ends(*inputs)
    compiled = torch.compile(ends, backend="aot_eager", fullgraph=True)(*inputs)
    assert passes == ["interval_channel_affine"] * 2
    for a, b in zip(compiled, eager, strict=True):
        assert torch.equal(a, b)
    factors = torch.randn(2, 4, 6).unbind()
    for a, b in zip(
        torch.autograd.grad(compiled, inputs, factors),
        torch.autograd.grad(eager, inputs, factors),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_compiled_batch_norm_refuses_what_overflows_on_the_way():
    x = torch.full((2, 1), 3e38)
    statistics = torch.full((1,), -3e38), torch.full((1,), 1e38)

    def ends(x):
        result = F.batch_norm(Interval(x, x, rounding="deployed"), *statistics)
        return result.lower, result.upper

    with pytest.raises(RuntimeError, match="must stay finite"):
        torch.compile(ends, backend="aot_eager", fullgraph=True)(x)


def test_slices_of_a_mapped_pass_are_those_of_a_loop():
    lower, upper = torch.randn(3, 4, 5), torch.randn(3, 4, 5) + 9
    maps = torch.rand(3, 4, 5, dtype=torch.float64)
    operator = torch.ops.pyrobust.interval_channel_affine
    for dims in ((0, 0, None), (1, None, None), (0, 0, 0)):
        given = [
            t if d is None else t.movedim(0, d)
            for t, d in zip((lower, upper[0] if dims[1] is None else upper,
                             maps[0] if dims[2] is None else maps), dims, strict=True)
        ]  # fmt: skip
        mapped = torch.vmap(lambda a, b, m: operator(a, b, m, "real", True), dims)(*given)
        for i in range(3):
            single = operator(
                *(t if d is None else t.select(d, i) for t, d in zip(given, dims, strict=True)),
                "real", True,
            )  # fmt: skip
            for a, b in zip(mapped, single, strict=True):
                assert torch.equal(a[i], b)
