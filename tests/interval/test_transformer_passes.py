"""Norms, products of two boxes, softmax and scaling in one native pass: exact containment."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from pyrobust import Interval, _native
from pyrobust.interval import arithmetic, box_products, norm_pass, normalization
from pyrobust.interval.pass_operator import pass_serves

SOUND = ["real", "deployed"]
UNITS = 2.0**-22


@pytest.fixture
def passes(watch_passes):
    """Names of the native passes whose ends were taken."""
    return watch_passes(
        "box_row_norm", "box_product", "box_softmax", "box_scale", "interval_constant"
    )


def assert_as_tight(fast, slow):
    """Not wider than the rule's ends by more than their roundings."""
    assert bool((fast.lower >= slow.lower - UNITS * slow.lower.abs() - 3e-38).all())
    assert bool((fast.upper <= slow.upper + UNITS * slow.upper.abs() + 3e-38).all())


def assert_equal(box, other):
    assert torch.equal(box.lower, other.lower)
    assert torch.equal(box.upper, other.upper)


def norms(count):
    weight, bias = torch.randn(count), torch.randn(count)
    weight[0] = 0.0
    return {
        "layer_norm": ((count,), weight, bias, 1e-6),
        "layer_norm without bias": ((count,), weight, None, 1e-12),
        "layer_norm alone": ((count,), None, None, 1e-5),
        "rms_norm": ((count,), weight, 1e-6),
    }


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("width", [0.0, 1e-3, 0.3, 10.0])
@pytest.mark.parametrize("count", [1, 2, 19, 64])
def test_norms_are_as_tight_as_their_rule(isa, rounding, width, count, passes):
    box = Interval.ball(torch.randn(3, count) * 2 + 0.3, width, rounding=rounding)
    for name, options in norms(count).items():
        rule = name.split()[0]
        assert_as_tight(
            norm_pass.RULES[rule](box, *options), normalization.RULES[rule](box, *options)
        )
    assert passes == ["box_row_norm"] * 4


@pytest.mark.parametrize("width", [0.0, 1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e10])
def test_attained_norms_lie_inside(isa, width, scale, passes):
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.prec = 300
    x = (torch.randn(2, 7) + 3) * scale
    weight, bias = torch.randn(7), torch.randn(7) * 1e-3
    box = Interval.ball(x, width * scale)
    result = F.layer_norm(box, (7,), weight, bias, 1e-12)
    for share in (torch.zeros(2, 7), torch.ones(2, 7), *(torch.rand(6, 2, 7).round())):
        corner = torch.where(share > 0.5, box.upper, box.lower)
        for r, row in enumerate(corner.tolist()):
            numbers = [mpmath.mpf(v) for v in row]
            mean = sum(numbers) / 7
            spread = mpmath.sqrt(sum((v - mean) ** 2 for v in numbers) / 7 + mpmath.mpf(1e-12))
            for i, v in enumerate(numbers):
                y = (v - mean) / spread * float(weight[i]) + float(bias[i])
                assert float(result.lower[r, i]) <= y <= float(result.upper[r, i])
    assert passes == ["box_row_norm"]


@pytest.mark.parametrize("width", [0.0, 1e-3, 1.0])
def test_evaluated_norms_lie_inside(isa, width, passes):
    """Both forms of the last line, and both of the variance."""
    x = torch.randn(4, 33) + 5
    weight, bias = torch.randn(33), torch.randn(33)
    box = Interval.ball(x, width, rounding="deployed")
    result = F.layer_norm(box, (33,), weight, bias, 1e-12)
    for _ in range(20):
        point = torch.lerp(box.lower, box.upper, torch.rand(x.shape).round())
        mean = point.mean(-1, keepdim=True)
        for variance in (
            (point - mean).square().mean(-1),
            point.square().mean(-1) - mean[:, 0] ** 2,
        ):
            inverse = (variance.clamp(min=0.0) + 1e-12).rsqrt()[:, None]
            scale = weight * inverse
            for value in (
                (point - mean) * inverse * weight + bias,
                point * scale + (bias - mean * scale),
            ):
                assert bool(result.contains(value).all())
    assert passes == ["box_row_norm"]


def test_groups_take_the_pass(isa, passes):
    x = torch.randn(2, 6, 3, 2)
    weight, bias = torch.randn(6), torch.randn(6)
    for rounding in SOUND:
        box = Interval.ball(x, 0.1, rounding=rounding)
        slow = normalization.RULES["group_norm"](box, 3, weight, bias)
        assert_as_tight(F.group_norm(box, 3, weight, bias), slow)
        assert bool(
            F.group_norm(box, 3, weight, bias).contains(F.group_norm(x, 3, weight, bias)).all()
        )
    assert passes == ["box_row_norm"] * 4


def corner_products(a, b):
    """The exact least and greatest sums of products of independent entries."""
    low, high = [], []
    for k in range(len(a)):
        corners = [Fraction(x) * Fraction(y) for x in a[k] for y in b[k]]
        low.append(min(corners))
        high.append(max(corners))
    return sum(low), sum(high)


@pytest.mark.parametrize("rounding", [*SOUND, "deployed-bfloat16"])
@pytest.mark.parametrize("width", [0.0, 1e-6, 0.1, 5.0])
def test_products_hold_exact_ones_and_are_as_tight_as_their_rule(isa, rounding, width, passes):
    a = Interval.ball(torch.randn(2, 9, 13), width, rounding=rounding)
    scaled = torch.randn(2, 10, 13) * 10.0 ** torch.randint(-8, 8, (2, 10, 13))
    b = Interval.ball(scaled, width, rounding=rounding)
    result = a @ b.mT
    assert_as_tight(result, box_products.matmul(a, b.mT))
    assert_equal(
        result, a @ Interval(*(e.mT.contiguous() for e in (b.lower, b.upper)), rounding=rounding)
    )
    for m, i, j in ((0, 0, 0), (1, 8, 9), (1, 3, 7), (0, 7, 8)):
        rows = list(zip(a.lower[m, i].tolist(), a.upper[m, i].tolist(), strict=True))
        columns = list(zip(b.lower[m, j].tolist(), b.upper[m, j].tolist(), strict=True))
        low, high = corner_products(rows, columns)
        assert float(result.lower[m, i, j]) <= low
        assert high <= float(result.upper[m, i, j])
    assert passes == ["box_product"] * 2


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("width", [0.0, 1e-3, 2.0])
@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_softmax_holds_exact_ones_and_is_as_tight_as_its_rule(isa, rounding, width, scale, passes):
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.prec = 300
    x = torch.randn(3, 11) * scale
    box = Interval.ball(x, width, rounding=rounding).masked_fill(torch.arange(11) == 4, -torch.inf)
    result = torch.softmax(box, -1)
    assert_as_tight(result, box_products.softmax(box, -1))
    for row in range(3):
        low = [mpmath.exp(v) for v in box.lower[row].tolist()]
        high = [mpmath.exp(v) for v in box.upper[row].tolist()]
        for i in range(11):
            least = low[i] / (low[i] + sum(high[:i] + high[i + 1 :]))
            most = high[i] / (high[i] + sum(low[:i] + low[i + 1 :]))
            assert float(result.lower[row, i]) <= least
            assert most <= float(result.upper[row, i])
    assert passes == ["box_softmax"]


def test_a_softmax_whose_numbers_are_out_of_reach_is_left_to_the_rule(passes):
    box = Interval(torch.tensor([-2000.0, -2500.0]), torch.tensor([0.0, -2400.0]))
    assert_equal(torch.softmax(box, -1), box_products.softmax(box, -1))
    assert passes == []


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize(
    "constant", [0.125, 0.3, -0.7, torch.tensor(-2.0), torch.randn(5), torch.randn(1, 5)]
)
def test_constants_scale_as_their_rule_does(isa, rounding, constant, passes):
    box = Interval.ball(torch.randn(4, 3, 5), 0.1, rounding=rounding)
    assert_equal(box * constant, arithmetic.mul(box, constant))
    assert_equal(constant * box, arithmetic.mul(box, constant))
    assert (
        passes == ["box_scale" if isinstance(constant, torch.Tensor) else "interval_constant"] * 2
    )


@pytest.mark.parametrize("x", [-1.2633348703384399, 0.119841739535331726])
def test_a_constant_that_float32_cannot_hold_is_multiplied_exactly(x):
    """The product of float64 may be the float that the exact one has just not reached."""
    box = Interval(torch.tensor([x]), torch.tensor([x]))
    for result in (box * 0.3, arithmetic.mul(box, 0.3)):
        exact = Fraction(float(box.lower)) * Fraction(0.3)
        assert float(result.lower) <= exact <= float(result.upper)


OPERATIONS = {
    "layer_norm": lambda x: F.layer_norm(x, (6,), torch.arange(6.0) - 2, torch.ones(6)),
    "group_norm": lambda x: F.group_norm(x.reshape(2, 4, 3), 2, torch.arange(4.0)),
    "product": lambda x: x.reshape(2, 2, 6) @ x.reshape(2, 2, 6).mT,
    "softmax": lambda x: torch.softmax(x, -1),
    "scale": lambda x: x * torch.arange(6.0),
}
RULES_OF = {
    "layer_norm": lambda x: normalization.RULES["layer_norm"](
        x, (6,), torch.arange(6.0) - 2, torch.ones(6)
    ),
    "group_norm": lambda x: normalization.RULES["group_norm"](
        x.reshape(2, 4, 3), 2, torch.arange(4.0)
    ),
    "product": lambda x: box_products.matmul(x.reshape(2, 2, 6), x.reshape(2, 2, 6).mT),
    "softmax": lambda x: box_products.softmax(x, -1),
    "scale": lambda x: arithmetic.mul(x, torch.arange(6.0)),
}


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_are_those_of_the_rule(name, rounding):
    x = torch.randn(4, 6)
    found = []
    for operation in (OPERATIONS[name], RULES_OF[name]):
        ends = [(x - 0.1).requires_grad_(), (x + 0.1).requires_grad_()]
        box = operation(Interval(*ends, rounding=rounding))
        total = (box.upper * box.upper.detach().cos()).sum() - box.lower.sum() * 0.5
        slopes = torch.autograd.grad(total, ends, create_graph=True)
        assert all(slope.requires_grad for slope in slopes) or name == "scale"
        found.append(slopes)
    for fast, slow in zip(*found, strict=True):
        assert torch.allclose(fast, slow, rtol=1e-5, atol=1e-6)


def test_gradients_reach_weights(passes):
    x, found = torch.randn(4, 6), []
    for rule in (norm_pass.RULES["layer_norm"], normalization.RULES["layer_norm"]):
        weight, bias = torch.ones(6, requires_grad=True), torch.zeros(6, requires_grad=True)
        box = rule(Interval(x - 0.1, x + 0.1), (6,), weight, bias)
        found.append(torch.autograd.grad(box.upper.sum() - box.lower.sum() * 2, (weight, bias)))
    for fast, slow in zip(*found, strict=True):
        assert torch.allclose(fast, slow)
    assert passes == ["box_row_norm"]


def test_what_a_pass_cannot_say_the_rule_says(passes):
    big = Interval.ball(torch.full((1, 4), 1e30), 1.0, rounding="deployed")
    with pytest.raises(OverflowError, match="layer_norm leaves the range"):
        F.layer_norm(big, (4,))
    small = Interval.ball(torch.randn(1, 4), 0.1, rounding="deployed")
    weight = torch.tensor([1.0, 1e-39, 1.0, 1.0])  # may be read as zero
    assert_equal(
        F.layer_norm(small, (4,), weight), normalization.RULES["layer_norm"](small, (4,), weight)
    )
    assert passes == []


def test_passes_serve_float32_with_a_promise():
    x = torch.randn(2, 3)
    assert pass_serves(Interval(x, x))
    assert not pass_serves(Interval(x, x, rounding="nearest"))
    assert not pass_serves(Interval(x.double(), x.double()))
    assert not pass_serves(Interval(x, x), x.bfloat16())


@pytest.mark.parametrize("name", OPERATIONS)
def test_threads_and_instruction_sets_give_the_same_bits(name):
    x = torch.randn(4, 6)
    before, threads = _native.isa(), torch.get_num_threads()
    results = []
    try:
        for kind in _native.supported_isas():
            for count in (1, 3):
                _native.set_isa(kind)
                torch.set_num_threads(count)
                results.append(OPERATIONS[name](Interval.ball(x, 0.1, rounding="deployed")))
    finally:
        _native.set_isa(before)
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_equal(result, results[0])
