"""Batch norm and residual sums in one native pass: exact containment, the rules' own answers."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from pyrobust import Interval, _native
from pyrobust.interval.finite import infinite_ends

pytestmark = pytest.mark.emulated_tiles

SOUND = ["real", "deployed"]


@pytest.fixture
def passes(monkeypatch):
    """Names of the native passes whose ends were taken."""
    taken = []

    def watched(name, kernel):
        def run(*args):
            finite = kernel(*args)
            if finite:
                taken.append(name)
            return finite

        return run

    for name in ("interval_add", "interval_channel_affine"):
        monkeypatch.setattr(_native, name, watched(name, getattr(_native, name)))
    return taken


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
            near_denormal = abs(p + q) < Fraction(2) ** -124
            assert flushes or near_denormal or next_end > p + q


@pytest.mark.parametrize("rounding", [*SOUND, "nearest"])
def test_a_sum_is_that_of_the_rule(isa, rounding, passes):
    x, y = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    a, b = box_of(x, x * 0.1, rounding), box_of(y, y * 0.1, rounding)
    wide = Interval(b.lower.transpose(1, 2).contiguous().transpose(1, 2), b.upper)
    wide.rounding = rounding
    for left, right in ((a, b), (F.relu(a), b), (a, F.relu(b)), (F.relu(a), F.relu(a))):
        fast = left + right
        lower = left.lower.clone().requires_grad_()
        slow = Interval(lower, left.upper, rounding=rounding) + right
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


def test_a_deployed_batch_norm_refuses_what_overflows_on_the_way(isa):
    x = torch.full((1, 1, 3, 4), 3e38)
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
def test_attained_corners_of_a_batch_norm_lie_inside(isa, clip, width, rounding, passes):
    mpmath = pytest.importorskip("mpmath")
    eps, pixels = 1e-12, 19
    x, *parameters = channels(pixels)
    box = Interval(x - width, x + width, rounding=rounding)
    box = F.relu(box) if clip else box
    with torch.no_grad():
        result = F.batch_norm(box, *parameters, eps=eps)
    assert passes == ["interval_channel_affine"]
    with mpmath.workdps(60):
        for i in range(42):
            mean, variance, weight, bias = (mpmath.mpf(float(t[i])) for t in parameters)
            slope = weight / mpmath.sqrt(variance + mpmath.mpf(eps))
            for corner in (box.lower[0, i, 0], box.upper[0, i, 0]):
                for p in range(0, pixels, 3):
                    exact = (mpmath.mpf(float(corner[p])) - mean) * slope + bias
                    assert mpmath.mpf(float(result.lower[0, i, 0, p])) <= exact
                    assert exact <= mpmath.mpf(float(result.upper[0, i, 0, p]))


@pytest.mark.parametrize("rounding", SOUND)
def test_a_batch_norm_is_as_tight_as_its_rule(isa, rounding, passes):
    x = torch.randn(3, 4, 5, 6)
    parameters = torch.randn(4), torch.rand(4) + 0.1, torch.randn(4), torch.randn(4)
    box = Interval(x - 0.01, x + 0.01, rounding=rounding)
    fast = F.batch_norm(box, *parameters)
    graded = [p.clone().requires_grad_(i > 1) for i, p in enumerate(parameters)]
    slow = F.batch_norm(box, *graded)
    assert passes == ["interval_channel_affine"]
    for a, b in ((fast.lower, slow.lower), (fast.upper, slow.upper)):
        torch.testing.assert_close(a, b, rtol=2.0**-22, atol=2.0**-24)
    assert slow.lower.requires_grad
    assert torch.equal(F.batch_norm(box, *parameters[:2]).lower.sign(), F.batch_norm(
        box, *parameters[:2], torch.ones(4), torch.zeros(4)).lower.sign())  # fmt: skip


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
