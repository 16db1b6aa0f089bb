"""Native passes of functions of one number: the same bits everywhere, the rules' own answers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from pyrobust import Interval, _native
from pyrobust.interval import curve_pass, curves
from pyrobust.interval.finite import infinite_ends

SOUND = ["real", "deployed"]
ROUNDINGS = [*SOUND, "nearest"]
FUNCTIONS = {
    **{name: getattr(F, name) for name in ("gelu", "silu", "mish", "hardswish", "hardsigmoid")},
    **{name: getattr(F, name) for name in ("softplus", "logsigmoid", "softsign", "elu", "selu")},
    **{name: getattr(torch, name) for name in ("sigmoid", "tanh", "exp", "expm1")},
    **{name: getattr(torch, name) for name in ("log", "log2", "log10", "log1p")},
    **{name: getattr(torch, name) for name in ("erf", "atan", "sqrt", "rsqrt", "square")},
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "celu": partial(F.celu, alpha=0.75),
    "elu 0": partial(F.elu, alpha=0.0),
}
VALLEYS = {
    "gelu": curves.GELU_TURN,
    "gelu_tanh": curves.GELU_TANH_TURN,
    "silu": curves.SILU_TURN,
    "mish": curves.MISH_TURN,
    "hardswish": curves.HARDSWISH_TURN,
    "square": 0.0,
}
each = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.fixture
def by_rule(monkeypatch):
    """Calls a function with the passes switched off."""

    def call(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(curve_pass, "pass_serves", lambda *given, **options: False)
            return function(*args)

    return call


def ends_for(name, count=1003):
    """Boxes of all sizes around numbers of all sizes, some without width, some across a turn."""
    generator = torch.Generator().manual_seed(len(name))
    middle, width = (
        torch.randn(2, count, generator=generator)
        * torch.exp2(torch.randint(-30, most, (2, count), generator=generator).float())
        for most in (5, 2)
    )
    width[:, ::5] = 0.0
    lower, upper = middle - width.abs(), middle + width.abs()
    if name in ("sqrt", "rsqrt") or (name.startswith("log") and name != "logsigmoid"):
        lower, upper = lower.abs() + 1e-30, (lower.abs() + 1e-30) + width.abs()
    return lower, upper


@each
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_bits_depend_on_no_instruction_set_thread_or_length(isa, name, rounding):
    if (name, rounding) == ("softplus", "nearest"):
        pytest.skip("torch's own function")
    function, (lower, upper) = FUNCTIONS[name], ends_for(name, 20003)
    got = function(Interval(lower, upper, rounding=rounding))
    threads = torch.get_num_threads()
    before = _native.isa()
    _native.set_isa("portable")
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        other = function(Interval(lower, upper, rounding=rounding))
        parts = [
            function(Interval(lower[:, :n], upper[:, :n], rounding=rounding)) for n in (1, 5, 13)
        ]
    finally:
        torch.set_num_threads(threads)
        _native.set_isa(before)
    for end in ("lower", "upper"):
        assert torch.equal(getattr(got, end), getattr(other, end))
        for part in parts:
            assert torch.equal(getattr(part, end), getattr(got, end)[:, : part.shape[1]])


def one_step(tensor, towards):
    return torch.nextafter(tensor, torch.full_like(tensor, towards))


@each
@pytest.mark.parametrize("rounding", SOUND)
def test_ends_are_those_of_the_rule_to_a_step(name, rounding, by_rule):
    function, box = FUNCTIONS[name], Interval(*ends_for(name), rounding=rounding)
    fast, slow = function(box), by_rule(function, box)
    assert bool((fast.lower >= one_step(slow.lower, -torch.inf)).all())
    assert bool((fast.upper <= one_step(slow.upper, torch.inf)).all())
    tiny = 2 * torch.finfo(torch.float32).tiny  # rules step to the smallest normal number
    assert bool((fast.lower <= one_step(slow.lower, torch.inf) + tiny).all())
    assert bool((fast.upper >= one_step(slow.upper, -torch.inf) - tiny).all())


@each
def test_ends_contain_the_image_in_float64(name, by_rule):
    lower, upper = ends_for(name)
    function, box = FUNCTIONS[name], Interval(lower, upper)
    fast, exact = function(box), by_rule(function, Interval(lower.double(), upper.double()))
    if name == "softplus":  # holds torch's own reading beyond the threshold as well
        assert bool((fast.lower <= exact.lower).all())
        return
    # the rule's float64 ends lie outside the image by their widening alone
    slack = 2.0**-40 * torch.maximum(exact.lower.abs(), exact.upper.abs())
    assert bool((fast.lower <= exact.lower + slack).all())
    assert bool((fast.upper >= exact.upper - slack).all())


@pytest.mark.parametrize("name", VALLEYS)
@pytest.mark.parametrize("rounding", SOUND)
def test_boxes_around_a_turn_reach_the_lowest_value_and_no_lower(isa, name, rounding, by_rule):
    turn = torch.tensor(VALLEYS[name])
    beside = torch.stack([one_step(turn, -torch.inf), turn, one_step(turn, torch.inf)])
    lower = torch.cat([beside, beside - 0.01, torch.tensor([-40.0, -3e4])])
    upper = torch.cat([beside, beside + 0.01, torch.tensor([40.0, 3e4])])
    box = Interval(lower, upper, rounding=rounding)
    fast, slow = FUNCTIONS[name](box), by_rule(FUNCTIONS[name], box)
    assert bool((fast.lower >= one_step(slow.lower, -torch.inf)).all())
    assert bool((fast.lower <= one_step(slow.lower, torch.inf)).all())


def gradients(function, ends, weights, rounding):
    low, high = (end.clone().requires_grad_() for end in ends)
    with infinite_ends():
        result = function(Interval(low, high, rounding=rounding))
        total = (result.lower * weights[0] + result.upper * weights[1]).sum()
    return torch.autograd.grad(total, (low, high))


@each
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_gradients_are_those_of_the_rule(isa, name, rounding, by_rule):
    ends, function = ends_for(name), FUNCTIONS[name]
    weights = torch.randn(2, *ends[0].shape)
    fast = gradients(function, ends, weights, rounding)
    slow = by_rule(gradients, function, [end.double() for end in ends], weights.double(), rounding)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["gelu", "tanh", "elu"])
def test_gradients_can_be_differentiated_again(name, by_rule):
    function, ends = FUNCTIONS[name], ends_for(name, 50)

    def curvature(dtype):
        low, high = (end.to(dtype).requires_grad_() for end in ends)
        box = function(Interval(low, high))
        first = torch.autograd.grad((box.upper * 3 - box.lower).sum(), low, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), (low, high), allow_unused=True)

    for a, b in zip(curvature(torch.float32), by_rule(curvature, torch.float64), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_one_differentiable_end_is_enough():
    low, high = torch.zeros(5), torch.ones(5, requires_grad=True)
    box = F.gelu(Interval(low, high))
    (got,) = torch.autograd.grad(box.upper.sum(), high, create_graph=True)
    assert bool((got > 1).all())
    assert torch.autograd.grad(got.sum(), high)[0] is not None


def test_layouts_dimensions_and_empty_boxes():
    x = torch.randn(2, 1, 2, 1, 2, 1, 2, 1, 2, 3)
    for lower in (x, x.transpose(0, 9), x[..., ::2], x[:0], x.sum()):
        box = F.silu(Interval(lower, lower + 1))
        flat = F.silu(Interval(lower.flatten(), lower.flatten() + 1))
        assert box.shape == lower.shape
        assert torch.equal(box.lower.flatten(), flat.lower)


def test_what_is_not_finite_is_refused_and_opened_outward():
    low, high = torch.tensor([0.0, 1.0, 89.0]), torch.tensor([1.0, 100.0, 89.5])
    with pytest.raises(OverflowError, match=r"exp leaves the range of torch.float32 in 2 of 3"):
        torch.exp(Interval(low, high))
    with pytest.raises(OverflowError, match="log leaves the range"):
        torch.log(Interval(torch.zeros(3), torch.ones(3)))
    with infinite_ends():
        box = torch.exp(Interval(low, high))
    assert box.upper.tolist()[1:] == [torch.inf, torch.inf]
    assert box.lower.tolist()[2] <= torch.finfo(torch.float32).max
    ends = torch.tensor([torch.nan, 0.0]), torch.tensor([0.0, torch.nan])
    opened = torch.ops.pyrobust.interval_curve(*ends, "gelu", [], [0.0, 0.0, 0.0], "real")
    assert opened[0].tolist()[0] == -torch.inf
    assert opened[1].tolist()[1] == torch.inf


def test_flushing_callers_and_other_roundings_change_no_bit():
    box = Interval(*ends_for("gelu"))
    before = F.gelu(box)
    flushing = torch.set_flush_denormal(True)
    try:
        after = F.gelu(box)
    finally:
        torch.set_flush_denormal(False)
    assert flushing
    assert torch.equal(before.lower.view(torch.int32), after.lower.view(torch.int32))


def test_the_operators_are_sound_operators():
    lower, upper = ends_for("gelu", 7)
    grads = torch.randn(2, *lower.shape)
    deployed = [16.0, 8.0, 0.0]
    for function in (("gelu", []), ("elu", [1.0, 0.5, 1.0])):
        torch.library.opcheck(
            torch.ops.pyrobust.interval_curve,
            (lower.requires_grad_(), upper.requires_grad_(), *function, deployed, "deployed"),
        )
        torch.library.opcheck(
            torch.ops.pyrobust.interval_curve_gradients,
            (*grads, lower.detach(), upper.detach(), *function),
        )
    lower, upper = lower.detach(), upper.detach()

    def bound(low, high):
        return torch.ops.pyrobust.interval_curve(low, high, "gelu", [], deployed, "real")

    mapped = torch.vmap(bound, (1, None))(lower, upper[:, 0] + 9)
    for i in range(7):
        for part, whole in zip(bound(lower[:, i], upper[:, 0] + 9), mapped, strict=True):
            assert torch.equal(part, whole[i])


def test_unknown_curves_and_wrong_numbers_are_refused():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="no native curve is called 'sine'"):
        curve_pass._native_ends(x, x, "sine", (), (0.0, 0.0, 0.0), "real")
    with pytest.raises(ValueError, match="elu must have 3 numbers; got 0"):
        curve_pass._native_ends(x, x, "elu", (), (0.0, 0.0, 0.0), "real")


@pytest.mark.parametrize("rounding", SOUND)
def test_compiled_code_takes_the_operator(rounding):
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def bound(low, high):
        box = F.gelu(Interval(low, high, rounding=rounding)).sigmoid()
        return box.lower, box.upper

    ends = ends_for("gelu", 40)
    compiled = torch.compile(bound, backend=backend, fullgraph=True)
    for a, b in zip(compiled(*ends), bound(*ends), strict=True):
        assert torch.equal(a, b)
    assert sum("interval_curve" in target for target in seen) == 2


def test_transforms_keep_to_torch_operations():
    low, high = ends_for("gelu", 9)

    def width(a, b):
        return F.gelu(Interval(a, b)).width().sum()

    slopes = torch.func.grad(width, argnums=(0, 1))(low, high)
    leaves = low.requires_grad_(), high.requires_grad_()
    for a, b in zip(slopes, torch.autograd.grad(width(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    mapped = torch.vmap(lambda a, b: F.gelu(Interval(a, b)).lower)(low.detach(), high.detach())
    assert mapped.shape == low.shape
