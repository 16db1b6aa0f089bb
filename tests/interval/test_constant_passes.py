"""Boxes and numbers in one native pass: both readings of a number, ends as near as can be."""

from __future__ import annotations

import operator
from fractions import Fraction

import pytest
import torch

from pyrobust import Interval, _native
from pyrobust.interval import arithmetic
from pyrobust.interval.errors import MissingRule
from pyrobust.interval.finite import infinite_ends
from pyrobust.interval.operands import readings_of
from pyrobust.interval.table import BY_NAME

from .random_graphs import denormals

SOUND = ["real", "deployed"]
ROUNDINGS = [*SOUND, "nearest"]
TINY = torch.finfo(torch.float32).tiny
CALLS = {
    "box + c": ("add", False),
    "box - c": ("sub", False),
    "c - box": ("sub", True),
    "box c": ("mul", False),
    "box / c": ("div", False),
    "c / box": ("div", True),
}
OPERATORS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
}
CONSTANTS = [0.5, 3, -1.25, 0.3, -0.7, 1e-3, 1e20, 1 / 3, -(2.0**-60), 2.0**60]
BY_RULE = [1e-40, 2**60 + 1, 16777217.0, 2.0**-149, 1e38, True]
each = pytest.mark.parametrize("call", CALLS)


@pytest.fixture
def passes(watch_passes):
    """Names of the native passes whose ends were taken."""
    return watch_passes("interval_constant")


def numbers(apart=False):
    """Ordinary numbers, tiny ones, ones of all exponents, whole ones; apart from zero."""
    exponents = torch.randint(-40, 40, (200,)).float()
    x = torch.cat(
        [
            torch.randn(200),
            torch.randn(200) * 2.0**-140,
            torch.randn(200) * torch.exp2(exponents),
            torch.randint(-8, 9, (200,)).float(),
        ]
    )
    return torch.where(x.abs() < TINY, 1.5, x) if apart else x


def boxes(call, rounding, width=0.01):
    x = numbers(apart=call == "c / box")
    return Interval(x - (x * width).abs(), x + (x * width).abs(), rounding=rounding)


def result_of(call, box, constant, table=OPERATORS):
    name, reversed = CALLS[call]
    with infinite_ends():
        return table[name](constant, box) if reversed else table[name](box, constant)


def readings(constant):
    return {Fraction(constant), Fraction(float(torch.tensor(float(constant))))}


@each
@pytest.mark.parametrize("constant", CONSTANTS)
def test_ends_contain_the_exact_corners_and_no_float_between(isa, call, constant, passes):
    box, (name, reversed) = boxes(call, "real"), CALLS[call]
    result = result_of(call, box, constant)
    assert passes == ["interval_constant"]
    step = name in ("mul", "div") and len(readings(constant)) > 1
    ends = [box.lower, box.upper, result.lower, result.upper]
    inner = [
        torch.nextafter(result.lower, torch.tensor(torch.inf)),
        torch.nextafter(result.upper, torch.tensor(-torch.inf)),
    ]
    for low, high, below, above, next_below, next_above in zip(
        *(end.tolist() for end in [*ends, *inner]), strict=True
    ):
        corners = [
            OPERATORS[name](c, Fraction(x)) if reversed else OPERATORS[name](Fraction(x), c)
            for x in (low, high)
            for c in readings(constant)
        ]
        assert below <= min(corners)
        assert above >= max(corners)
        assert step or next_below > min(corners)
        assert step or next_above < max(corners)


@each
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("constant", [*CONSTANTS, *BY_RULE[:-1]])
def test_ends_are_never_wider_than_the_rules(isa, call, rounding, constant):
    if call == "box / c" and rounding == "deployed" and abs(constant) < TINY:
        pytest.skip("flushing may read the divisor as zero")
    box = boxes(call, rounding)
    fast = result_of(call, box, constant, BY_NAME)
    slow = result_of(call, box, constant, arithmetic.RULES)
    assert bool((fast.lower >= slow.lower).all() & (fast.upper <= slow.upper).all())
    if CALLS[call][0] != "div":  # rules step from a zero that a constant beyond float32 gives
        near = torch.nextafter(slow.lower, torch.tensor(torch.inf))
        assert bool((fast.lower <= near).all())
        assert bool((fast.upper >= torch.nextafter(slow.upper, torch.tensor(-torch.inf))).all())


@each
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("constant", CONSTANTS)
def test_deployed_ends_hold_what_torch_returns(isa, call, constant, flush):
    box = boxes(call, "deployed")
    result = result_of(call, box, constant)
    for x in (box.lower, box.upper, torch.lerp(box.lower, box.upper, 0.3)):
        x = x.clamp(box.lower, box.upper)
        with denormals(flush):
            value = result_of(call, x, constant)
        value = torch.where(value.abs() < TINY, 0.0, value) if flush else value
        assert bool((result.contains(value) | ~value.isfinite()).all())


@each
@pytest.mark.parametrize("constant", [0.5, 0.3])
def test_nearest_ends_are_torchs_own_at_points(isa, call, constant):
    x = torch.randn(1003)
    x = torch.where(x.abs() < 0.01, 1.0, x)
    box = result_of(call, Interval(x, x, rounding="nearest"), constant)
    own = result_of(call, x, constant)
    # torch divides by a number as it multiplies by what that is the reciprocal of
    torch.testing.assert_close(box.lower, own, rtol=2.0**-22, atol=0.0)
    assert torch.equal(box.lower, box.upper)
    if CALLS[call][0] != "div":
        assert torch.equal(box.lower, own)


@each
@pytest.mark.parametrize("rounding", SOUND)
def test_smaller_boxes_have_smaller_images(isa, call, rounding):
    large = boxes(call, rounding)
    low = torch.lerp(large.lower, large.upper, 0.3).clamp(large.lower, large.upper)
    small = Interval(low, large.upper, rounding=rounding)
    for constant in (0.5, 0.3):
        outer, inner = (result_of(call, box, constant) for box in (large, small))
        assert bool((inner.lower >= outer.lower).all() & (inner.upper <= outer.upper).all())


@each
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("constant", [0.5, 0.3])
def test_bits_depend_on_no_instruction_set_thread_or_length(isa, call, rounding, constant):
    x = torch.randn(2, 20003)
    x = torch.where(x.abs() < 0.2, 1.0, x)
    box = Interval(x - 0.1, x + 0.1, rounding=rounding)
    got = result_of(call, box, constant)
    threads, before = torch.get_num_threads(), _native.isa()
    _native.set_isa("portable")
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        other = result_of(call, box, constant)
        parts = [result_of(call, box[:, :n], constant) for n in (1, 5, 13)]
    finally:
        torch.set_num_threads(threads)
        _native.set_isa(before)
    for end in ("lower", "upper"):
        assert torch.equal(getattr(got, end), getattr(other, end))
        for part in parts:
            assert torch.equal(getattr(part, end), getattr(got, end)[:, : part.shape[1]])


@pytest.mark.parametrize("constant", BY_RULE)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_other_numbers_go_by_the_rule(constant, rounding, passes):
    box = Interval(torch.ones(3), torch.full((3,), 2.0), rounding=rounding)
    if constant is True:
        with pytest.raises(MissingRule, match="operand of type bool"):
            _ = box + constant
    else:
        fast, slow = BY_NAME["add"](box, constant), arithmetic.add(box, constant)
        assert torch.equal(fast.lower, slow.lower)
        assert torch.equal(fast.upper, slow.upper)
    assert passes == []


def test_readings_are_the_number_and_the_float_next_to_it():
    for value in (0.3, -0.7, 1 / 3, 1e-30, 12345678.9):
        exact = float(torch.tensor(value, dtype=torch.float32))
        assert readings_of(value) == (min(value, exact), max(value, exact))
    assert readings_of(3) == (3.0, 3.0)
    assert readings_of(16777217.0) is None  # halfway
    assert readings_of(float("nan")) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [3.0, 0.3, -7, 4.0, 1 / 3, 1.0])
def test_deployed_quotients_hold_products_with_reciprocals(constant, dtype, isa):
    x = (torch.rand(20011) + 0.5).to(dtype)
    box = Interval(x, x, rounding="deployed")
    number = torch.tensor(constant, dtype=dtype)
    for result, values in (
        (constant / box, (constant / x, x.reciprocal() * number, number / x)),
        (box / constant, (x / constant, x * number.reciprocal(), x / number)),
    ):
        for value in values:
            assert bool(result.contains(value).all())
        width = (result.upper - result.lower).abs() / result.upper.abs()
        assert float(width.max()) <= (6 if dtype == torch.float32 else 10) * torch.finfo(dtype).eps


@each
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("constant", [0.5, -0.3])
def test_gradients_are_those_of_the_rule(isa, call, constant, again):
    x = torch.rand(4, 33) + 0.5
    found = []
    for table in (BY_NAME, arithmetic.RULES):
        low, high = (x - 0.1).requires_grad_(), (x + 0.1).requires_grad_()
        box = result_of(call, Interval(low, high), constant, table)
        total = (box.lower * box.lower.detach().cos() - box.upper * 0.5).sum()
        slopes = torch.autograd.grad(total, (low, high), create_graph=again)
        square = sum(slope.square().sum() for slope in slopes)
        if again and square.requires_grad:
            slopes = [*slopes, *torch.autograd.grad(square, (low, high), allow_unused=True)]
        found.append(slopes)
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "value", "constant"),
    [
        ("box + c", 3.4028e38, 2.0**125),
        ("c - box", -3.4028e38, 2.0**125),
        ("box c", 3e38, 0.3e1),
        ("box / c", 3e38, 0.3),
        ("c / box", 2.0**-120, 2.0**20),
    ],
)
def test_what_leaves_the_range_is_refused_by_name(call, value, constant):
    (name, reversed), box = CALLS[call], Interval(*[torch.tensor([1.0, value])] * 2)
    operands = (constant, box) if reversed else (box, constant)
    with pytest.raises(OverflowError, match=f"{name} leaves the range of torch.float32 in 1 of 2"):
        OPERATORS[name](*operands)


def test_divisors_hold_no_zero():
    box = Interval(torch.tensor([-1.0, 1.0]), torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="the divisor must not contain zero; 1 elements"):
        0.3 / box
    with pytest.raises(ValueError, match="the divisor must not contain zero"):
        box / 0.0


def test_infinite_ends_stay_infinite():
    with infinite_ends():
        box = torch.exp(Interval(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 100.0])))
        for result in (box + 0.3, box + 0.5, box - 0.3, box * 0.5, box * 0.3):
            assert result.upper[1].isinf()
            assert bool((result.lower <= result.upper).all())
            assert bool(result.lower.isfinite().all())


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("alpha", [2, 0.3])
def test_sums_with_alpha_are_those_of_the_rule(rounding, alpha):
    box, y = boxes("box + c", rounding), numbers()
    for name, first, second in (
        ("add", box, y),
        ("add", y, box),
        ("sub", box, box[:]),
        ("rsub", box, y),
    ):
        with infinite_ends():
            fast = BY_NAME[name](first, second, alpha=alpha)
            slow = arithmetic.RULES[name](first, second, alpha=alpha)
        assert bool((fast.lower >= slow.lower).all() & (fast.upper <= slow.upper).all())
    with pytest.raises(MissingRule, match="alpha= with a number"):
        torch.add(box, 0.5, alpha=alpha)


def test_the_operators_are_sound_operators():
    x = torch.rand(4, 5) + 1
    for name, reversed in CALLS.values():
        leaves = x.clone().requires_grad_(), (x + 1).requires_grad_()
        constant = 0.25, 0.3, name, reversed
        torch.library.opcheck(torch.ops.pyrobust.interval_constant, (*leaves, *constant, "real"))
        ends = x, x + 1
        torch.library.opcheck(
            torch.ops.pyrobust.interval_constant_gradients, (x, x, *ends, *constant)
        )
    with pytest.raises(ValueError, match="no native operation is called 'pow'"):
        torch.ops.pyrobust.interval_constant(x, x, 1.0, 1.0, "pow", False, "real")


@each
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_compiled_code_has_the_bits_of_eager_mode(call, rounding):
    def bound(low, high, constant):
        box, (name, reversed) = Interval(low, high, rounding=rounding), CALLS[call]
        box = OPERATORS[name](constant, box) if reversed else OPERATORS[name](box, constant)
        return box.lower, box.upper

    x = torch.rand(3, 40) + 0.5
    torch._dynamo.reset()
    compiled = torch.compile(bound, backend="aot_eager", fullgraph=True)
    for constant in (0.3, 0.7, 2):
        for one, other in zip(compiled(x, x + 1, constant), bound(x, x + 1, constant), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", ["clamp_max", "pow"])
def test_compiled_code_knows_what_float32_holds_of_numbers_that_vary(name, rounding):
    def bound(low, high, number):
        box = getattr(torch, name)(Interval(low, high, rounding=rounding), number)
        return box.lower, box.upper

    x = torch.rand(3, 40) + 0.5
    torch._dynamo.reset()
    compiled = torch.compile(bound, backend="aot_eager", fullgraph=True)
    for number in (0.3, 0.7, 1.5):
        for one, other in zip(compiled(x, x + 1, number), bound(x, x + 1, number), strict=True):
            assert torch.equal(one, other)


@each
def test_transforms_keep_to_torch_operations(call):
    x = torch.rand(3, 7) + 0.5

    def width(low, high):
        return result_of(call, Interval(low, high), 0.3).width().sum()

    slopes = torch.func.grad(width, argnums=(0, 1))(x, x + 1)
    leaves = x.clone().requires_grad_(), (x + 1).requires_grad_()
    for a, b in zip(slopes, torch.autograd.grad(width(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_other_dtypes_keep_to_the_rule(passes):
    x = torch.rand(5, dtype=torch.float64)
    assert bool((Interval(x, x) + 0.3).contains(x + 0.3).all())
    assert passes == []
