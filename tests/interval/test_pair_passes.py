"""Sums, products and quotients of boxes in one native pass: the least boxes around them."""

from __future__ import annotations

import operator
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from pyrobust import Interval, _native
from pyrobust.interval import arithmetic
from pyrobust.interval.finite import infinite_ends
from pyrobust.interval.table import BY_NAME

from .random_graphs import denormals

SOUND = ["real", "deployed"]
ROUNDINGS = [*SOUND, "nearest"]
OPERATIONS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
}
each = pytest.mark.parametrize("name", OPERATIONS)
TINY = torch.finfo(torch.float32).tiny


@pytest.fixture
def passes(watch_passes):
    """Names of the native passes whose ends were taken."""
    return watch_passes("interval_pair", "box_scale")


def spread(shape, low=-40, high=40):
    """Random signs and mantissas with exponents uniform in [low, high)."""
    return (torch.rand(shape) - 0.5) * torch.exp2(torch.randint(low, high, shape).float())


KINDS = {
    "ordinary": lambda: (torch.randn(5, 67), torch.randn(5, 67)),
    "exponents": lambda: (spread((5, 67)), spread((5, 67))),
    "cancelling": lambda: ((x := spread((5, 67))), -x * (1 + 2.0**-22)),
    "denormal": lambda: (spread((5, 67), -148, -120), spread((5, 67), -148, -120)),
    "to denormals": lambda: (spread((5, 67), -80, -60), spread((5, 67), -72, -60)),
    "halfway": lambda: (1 + torch.rand(5, 67), torch.full((5, 67), 2.0**-24)),
    "short": lambda: (torch.randint(-8, 9, (5, 67)).float(), torch.randint(1, 5, (5, 67)).float()),
}


def box_of(x, width, rounding, *, apart=False):
    """A box around ``x``; ``apart`` from zero."""
    widths = (x * width).abs()
    lower, upper = x - widths, x + widths
    if apart:
        lower = torch.where(x == 0, 1.0, lower)
        upper = torch.where(x == 0, 1.0, upper)
    return Interval(lower, upper, rounding=rounding)


def operands(kind, name, rounding):
    x, y = KINDS[kind]()
    a, b = box_of(x, 0.01, rounding), box_of(y, 0.02, "real", apart=name == "div")
    if name == "div" and rounding == "deployed":  # nothing that flushing may read as zero
        far = b.lower.abs().minimum(b.upper.abs()) >= TINY
        b = Interval(torch.where(far, b.lower, 1.5), torch.where(far, b.upper, 1.5))
    return a, Interval(b.lower, b.upper, rounding=rounding)


def assert_equal(box, other):
    assert torch.equal(box.lower, other.lower)
    assert torch.equal(box.upper, other.upper)


def least_float_at_least(value):
    """The smallest float32 that is not below a fraction."""
    near = torch.tensor(float(value), dtype=torch.float64).float()
    below = torch.nextafter(
        torch.nextafter(near, torch.tensor(-torch.inf)), torch.tensor(-torch.inf)
    )
    while Fraction(float(below)) < value:
        below = torch.nextafter(below, torch.tensor(torch.inf))
    return float(below)


@each
@pytest.mark.parametrize("kind", KINDS)
def test_ends_are_the_floats_next_to_the_exact_corners(isa, name, kind, passes):
    a, b = operands(kind, name, "real")
    with infinite_ends():
        result = OPERATIONS[name](a, b)
    ends = [
        [Fraction(v) for v in end.flatten().tolist()]
        for end in (a.lower, a.upper, b.lower, b.upper)
    ]
    lower, upper = result.lower.flatten().tolist(), result.upper.flatten().tolist()
    for i in range(0, len(lower), 3):
        lx, hx, ly, hy = (end[i] for end in ends)
        corners = [OPERATIONS[name](u, v) for u in (lx, hx) for v in (ly, hy)]
        if max(abs(corner) for corner in corners) > 2**127:
            continue
        assert upper[i] == least_float_at_least(max(corners))
        assert lower[i] == -least_float_at_least(-min(corners))
    if name != "add":  # boxes of one shape have a pass of their own
        assert passes in (["interval_pair"], [])


@each
@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("kind", KINDS)
def test_ends_hold_evaluations_flushed_or_not(isa, name, kind, rounding):
    a, b = operands(kind, name, "deployed")
    with infinite_ends():
        result = OPERATIONS[name](a, b.upper if rounding == "real" else b)
    assert result.rounding == "deployed"
    for x in (a.lower, a.upper, (a.lower + a.upper) / 2):
        x = x.clamp(min=a.lower, max=a.upper)
        for flush in (False, True):
            with denormals(flush):
                value = OPERATIONS[name](x, b.upper)
            value = torch.where(value.abs() < TINY, 0.0, value) if flush else value
            inside = result.contains(value) | ~value.isfinite()
            assert bool(inside.all())


@each
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_ends_are_never_wider_than_the_rules(isa, name, kind, rounding):
    a, b = operands(kind, name, rounding)
    rule = arithmetic.RULES[name]
    tensor, number, row = b.upper, 1.5, b.upper[0]
    with infinite_ends():
        for other in (b, tensor, number, row, b[:, :1]):
            for x, y in ((a, other), (other, a)):
                if name == "div" and x is not a:
                    continue
                fast, slow = BY_NAME[name](x, y), rule(x, y)
                if name == "div":
                    assert bool((fast.lower >= slow.lower).all() & (fast.upper <= slow.upper).all())
                else:
                    assert_equal(fast, slow)


@each
def test_nearest_ends_are_torchs_own_at_points(isa, name):
    x, y = torch.randn(2, 1003)
    box = OPERATIONS[name](Interval(x, x, rounding="nearest"), y)
    assert torch.equal(box.lower, OPERATIONS[name](x, y))
    assert torch.equal(box.upper, OPERATIONS[name](x, y))


@each
@pytest.mark.parametrize("rounding", SOUND)
def test_smaller_boxes_have_smaller_images(isa, name, rounding):
    a, b = operands("exponents", name, rounding)
    inner = Interval(
        torch.lerp(a.lower, a.upper, 0.3).clamp(a.lower, a.upper), a.upper, rounding=rounding
    )
    large, small = OPERATIONS[name](a, b), OPERATIONS[name](inner, b)
    assert bool((small.lower >= large.lower).all())
    assert bool((small.upper <= large.upper).all())


def slopes_of(call, tensors, again):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    low, high = call(*leaves)
    total = (low * low.detach().cos()).sum() + (high * high.detach().sin()).sum() * 0.5
    first = torch.autograd.grad(total, leaves, create_graph=again)
    if not again:
        return first
    square = sum(slope.square().sum() for slope in first)
    if not square.requires_grad:
        return first
    return *first, *torch.autograd.grad(square, leaves, allow_unused=True)


@each
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", ["boxes", "tensor", "row", "points"])
def test_gradients_are_those_of_the_rule(isa, name, kind, again):
    x, y = torch.randn(4, 33), torch.rand(4, 33) + 0.5
    width = 0.0 if kind == "points" else 0.1
    other = (
        [y - width, y + width] if kind in ("boxes", "points") else [y if kind == "tensor" else y[0]]
    )

    def through(rule):
        def call(low, high, *ends):
            b = Interval(*ends) if len(ends) == 2 else ends[0]
            result = rule(Interval(low, high), b)
            return result.lower, result.upper

        return call

    tensors = [x - width, x + width, *other]
    fast = slopes_of(through(BY_NAME[name]), tensors, again)
    slow = slopes_of(through(arithmetic.RULES[name]), tensors, again)
    if kind == "points":  # ends that agree share a gradient in either way
        sums = [[sum(found[i : i + 2]) for i in (0, 2)] for found in (fast, slow)]
        fast, slow = sums
    for a, b in zip(fast, slow, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("shape", [(6, 70), (70,), (1, 6, 70)])
def test_masks_pass_to_a_softmax(isa, rounding, shape, passes):
    box = Interval.ball(torch.randn(6, 70), 0.1, rounding=rounding)
    mask = torch.where(torch.rand(shape) > 0.3, 0.0, -torch.inf)
    masked = box + mask
    assert_equal(masked, arithmetic.add(box, mask))
    assert bool((masked.upper.isneginf() == mask.expand(masked.shape).isneginf()).all())
    shares = torch.softmax(masked, -1)
    assert float(shares.upper[mask.expand(masked.shape).isneginf()].max()) < 1e-30


def test_what_leaves_the_range_is_refused_by_name():
    high = torch.tensor([1.0, 3e38])
    box = Interval(high, high)
    for name, call in OPERATIONS.items():
        other = torch.tensor([1.0, 1e-3]) if name == "div" else high * (-1 if name == "sub" else 1)
        with pytest.raises(
            OverflowError, match=f"{name} leaves the range of torch.float32 in 1 of 2"
        ):
            call(box, other)
    with pytest.raises(ValueError, match="the divisor must not contain zero; 1 elements"):
        box / Interval(torch.tensor([-1.0, 1.0]), torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="must not be NaN"):
        box + torch.tensor([torch.nan, 0.0])


def test_what_a_pass_said_of_a_box_is_not_believed_of_what_it_becomes():
    box = Interval(torch.ones(2), torch.ones(2)) * torch.full((2,), 2.0)
    assert box.finite_by_kernel
    with infinite_ends():
        box.mul_(torch.tensor([1.0, 3e38]))
    assert float(box.upper[1]) == torch.inf
    assert not box.finite_by_kernel


@each
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_compiled_code_has_the_bits_of_eager_mode(name, rounding):
    a, b = operands("ordinary", name, rounding)
    rule = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div}[name]

    def bound(low, high, y):
        box = rule(Interval(low, high, rounding=rounding), y)
        return box.lower, box.upper

    tensors = a.lower, a.upper, b.upper
    torch._dynamo.reset()  # one function, more closures than it keeps
    compiled = torch.compile(bound, backend="aot_eager", fullgraph=True)
    for one, other in zip(compiled(*tensors), bound(*tensors), strict=True):
        assert torch.equal(one, other)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    found = [
        torch.autograd.grad(sum(e.sum() for e in f(*leaves)), leaves) for f in (compiled, bound)
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_the_operators_are_sound_operators():
    x, y = torch.randn(2, 4, 5)
    ends = [x, x + 1, y.abs() + 1, y.abs() + 2]
    for name in OPERATIONS:
        leaves = [end.clone().requires_grad_() for end in ends]
        torch.library.opcheck(torch.ops.pyrobust.interval_pair, (*leaves, name, "real"))
        torch.library.opcheck(torch.ops.pyrobust.interval_pair_gradients, (x, y, *ends, name))
    mapped = torch.vmap(lambda a: torch.ops.pyrobust.interval_pair(a, *ends[1:], "add", "real"), 1)
    assert mapped(torch.stack([x, x - 1], 1))[0].shape == (2, 4, 5)
    with pytest.raises(ValueError, match="no native operation is called 'pow'"):
        torch.ops.pyrobust.interval_pair(*ends, "pow", "real")


@each
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_bits_depend_on_no_instruction_set_thread_or_length(isa, name, rounding):
    x, y = spread((2, 20003), -20, 20)
    box = Interval(x - 0.1, x + 0.1, rounding=rounding)
    divisor = y.sign() * (y.abs() + 1)
    got = OPERATIONS[name](box, divisor)
    threads, before = torch.get_num_threads(), _native.isa()
    _native.set_isa("portable")
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert_equal(got, OPERATIONS[name](box, divisor))
        for n in (1, 5, 13):
            assert_equal(OPERATIONS[name](box[:n], divisor[:n]), got[:n])
    finally:
        torch.set_num_threads(threads)
        _native.set_isa(before)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize("name", ["add", "mul"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_whole_numbers_are_taken_by_the_pass(name, dtype, rounding, passes):
    box = Interval.ball(torch.randn(5, 9), 0.1, rounding=rounding)
    whole = torch.randint(0, 2, (5, 9)).to(dtype)
    assert_equal(BY_NAME[name](box, whole), arithmetic.RULES[name](box, whole))
    assert len(passes) == 1
    large = torch.full((5, 9), 2**24 + 1)
    assert_equal(BY_NAME[name](box, large), arithmetic.RULES[name](box, large))
    assert_equal(BY_NAME[name](box, -large), arithmetic.RULES[name](box, -large))
    assert len(passes) == 1


# -- bends -----------------------------------------------------------------------------------

SLOPES = {
    "0.01": 0.01,
    "0.25": 0.25,
    "negative": -0.3,
    "zero": 0.0,
    "steep": 3.0,
    "one tensor": torch.tensor([0.2]),
    "channels": torch.tensor([0.1, -0.5, 2.0, 1e-39, 0.25]),
}


def bend(box, slope):
    return F.prelu(box, slope) if isinstance(slope, torch.Tensor) else F.leaky_relu(box, slope)


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("rounding", SOUND)
def test_bends_are_those_of_the_rule_and_exact_at_points(isa, slope, rounding, passes):
    slope = SLOPES[slope]
    x = torch.cat([torch.randn(3, 5, 40), spread((3, 5, 40), -148, -100)], -1)
    wide = Interval.ball(x, 0.5, rounding=rounding)
    for box in (wide, Interval(x, x, rounding=rounding)):
        given = slope
        if isinstance(slope, torch.Tensor) and slope.numel() > 1:
            given = slope[:, None]
        fast = bend(box, slope)
        slow = arithmetic.bent(box, arithmetic.ends_of(given, box, rounding))
        for mine, other in ((fast.lower, slow.lower), (-fast.upper, -slow.upper)):
            # rules step from a zero that a constant beyond float32 gives
            assert bool(((mine == other) | ((mine > other) & (other.abs() <= 2.0**-149))).all())
    assert passes == ["box_scale"] * 2
    if rounding == "real":
        result, narrow = bend(Interval(x, x), slope), bend(x, slope)
        assert bool(result.contains(narrow).all())
        positive = x >= 0
        assert torch.equal(result.lower[positive], x[positive])
        assert torch.equal(result.upper[positive], x[positive])
    else:
        with denormals(True):
            value = bend(x, slope)
        assert bool(bend(Interval(x, x, rounding=rounding), slope).contains(value).all())


@pytest.mark.parametrize("slope", [0.01, -0.3, torch.tensor([0.1, -0.5, 2.0])])
def test_gradients_of_bends_are_those_of_torch(slope):
    x = torch.randn(4, 3, 7)
    x = torch.where(x.abs() < 0.1, 0.5, x)
    low, high = (x.clone().requires_grad_() for _ in range(2))
    box = bend(Interval(low, high), slope)
    found = torch.autograd.grad(box.lower.sum() + box.upper.sum(), (low, high))
    leaf = x.clone().requires_grad_()
    (own,) = torch.autograd.grad(bend(leaf, slope).sum(), leaf)
    torch.testing.assert_close(sum(found), 2 * own)


@pytest.mark.parametrize("rounding", SOUND)
def test_bounds_that_float32_holds_clamp_without_rounding(rounding):
    x = torch.randn(100) * 4
    box = Interval.ball(x, 0.1, rounding=rounding)
    for call in (F.relu6, F.hardtanh, lambda b: b.clamp(-0.5, 0.25)):
        result = call(box)
        assert torch.equal(result.lower, call(box.lower))
        assert torch.equal(result.upper, call(box.upper))
    assert bool(box.clamp(max=0.3).contains(torch.full_like(x, 0.3).minimum(x)).all())
    held, not_held = box.clamp(max=0.25), box.clamp(max=0.3)
    assert float(held.upper.max()) == 0.25
    assert float(not_held.upper.max()) >= 0.3
