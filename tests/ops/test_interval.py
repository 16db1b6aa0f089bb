"""interval_linear against exact rational arithmetic, autograd and torch's operator checks."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

import pyrobust
from pyrobust.ops.interval import interval_linear

pytestmark = pytest.mark.emulated_tiles

SOUND = ["real", "deployed"]


def exact_image(lower, upper, weight, bias):
    """The exact ends of each output as rationals, attained at a corner of the box."""
    low = [[Fraction(v) for v in row] for row in lower.tolist()]
    high = [[Fraction(v) for v in row] for row in upper.tolist()]
    matrix = [[Fraction(v) for v in row] for row in weight.tolist()]
    shift = [Fraction(0)] * len(matrix) if bias is None else [Fraction(v) for v in bias.tolist()]
    for b, (lo, hi) in enumerate(zip(low, high, strict=True)):
        for n, row in enumerate(matrix):
            least = shift[n] + sum(
                w * (x if w >= 0 else y) for w, x, y in zip(row, lo, hi, strict=True)
            )
            most = shift[n] + sum(
                w * (y if w >= 0 else x) for w, x, y in zip(row, lo, hi, strict=True)
            )
            yield b, n, least, most


def violations(ends, lower, upper, weight, bias):
    """How many exact ends lie outside the computed ones."""
    out_low, out_high = ends[0].tolist(), ends[1].tolist()
    inf = float("inf")
    count = 0
    for b, n, least, most in exact_image(lower, upper, weight, bias):
        low, high = out_low[b][n], out_high[b][n]
        assert low < inf
        assert high > -inf
        assert low == low
        assert high == high
        count += (low != -inf and Fraction(low) > least) + (high != inf and Fraction(high) < most)
    return count


def random_problem(batch, terms, rows, eps, dtype=torch.float32):
    x = torch.rand(batch, terms, dtype=dtype)
    weight = torch.randn(rows, terms, dtype=dtype) / max(terms, 1) ** 0.5
    return x - eps, x + eps, weight, torch.randn(rows, dtype=dtype)


def test_image_of_the_unit_square_under_a_difference():
    lower, upper = interval_linear(torch.zeros(2), torch.ones(2), torch.tensor([[1.0, -1.0]]))
    assert lower.shape == upper.shape == (1,)
    assert -1.0001 < float(lower) <= -1
    assert 1 <= float(upper) < 1.0001


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 1, 5), (2, 7, 4), (5, 64, 3), (1, 300, 4), (9, 33, 17)])
def test_ends_contain_the_exact_image(isa, shape, rounding, dtype):
    problem = random_problem(*shape, eps=2 / 255, dtype=dtype)
    assert violations(interval_linear(*problem, rounding=rounding), *problem) == 0


def test_nearest_mode_is_unsound_where_the_sound_modes_hold(isa):
    # verse.systems' construction: biases of 2^25 swallow the interval.
    lower, upper = torch.full((1, 1), -0.1), torch.full((1, 1), 0.1)
    weight, bias = torch.ones(3, 1), torch.full((3,), 2.0**25)
    assert (
        violations(
            interval_linear(lower, upper, weight, bias, rounding="nearest"),
            lower,
            upper,
            weight,
            bias,
        )
        > 0
    )
    for rounding in SOUND:
        ends = interval_linear(lower, upper, weight, bias, rounding=rounding)
        assert violations(ends, lower, upper, weight, bias) == 0


@pytest.mark.parametrize("rounding", SOUND)
def test_overflow_and_infinite_ends_give_the_whole_line(isa, rounding):
    inf, big = float("inf"), 3.0e38
    weight = torch.tensor([[1.0, 1.0], [2.0, -2.0], [0.0, 1.0]])
    for low, high in [
        ([big, big], [big, big]),
        ([-inf, 0.0], [inf, 1.0]),
        ([float("nan"), 0.0], [1.0, 1.0]),
    ]:
        lower, upper = interval_linear(
            torch.tensor([low]),
            torch.tensor([high]),
            weight,
            rounding=rounding,
            allow_infinite=True,
        )
        assert not lower.isnan().any()
        assert not upper.isnan().any()
        assert lower[0, 0] == -inf
        assert upper[0, 0] == inf


@pytest.mark.parametrize("rounding", ["real", "deployed", "nearest"])
def test_gradients_are_those_of_centre_and_radius(rounding):
    lower, upper, weight, bias = random_problem(3, 5, 4, eps=0.1, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (lower, upper, weight, bias)]

    def reference(low, high, w, b):
        centre, radius = (low + high) / 2, (high - low) / 2
        middle, reach = centre @ w.T + b, radius @ w.abs().T
        return middle - reach, middle + reach

    cotangents = [torch.randn(3, 4, dtype=torch.float64) for _ in range(2)]
    ours = torch.autograd.grad(interval_linear(*inputs, rounding=rounding), inputs, cotangents)
    theirs = torch.autograd.grad(reference(*inputs), inputs, cotangents)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_operator_contract():
    lower, upper, weight, bias = random_problem(3, 5, 4, eps=0.1)
    leaves = tuple(t.requires_grad_() for t in (lower, upper, weight, bias))
    torch.library.opcheck(torch.ops.pyrobust.interval_linear, (*leaves, "real"))
    torch.library.opcheck(torch.ops.pyrobust.interval_linear, (*leaves[:3], None, "deployed"))


def test_compiles_whole_and_agrees_with_eager():
    lower, upper, weight, bias = random_problem(3, 5, 4, eps=0.1)
    compiled = torch.compile(interval_linear, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        compiled(lower, upper, weight, bias),
        interval_linear(lower, upper, weight, bias),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_vmap_over_boxes_and_over_weights():
    lower, upper, weight, bias = random_problem(3, 5, 4, eps=0.1)
    mapped = torch.vmap(interval_linear, in_dims=(0, 0, None, None))(lower, upper, weight, bias)
    assert torch.equal(mapped[0], interval_linear(lower, upper, weight, bias)[0])
    weights = torch.randn(6, 4, 5)
    mapped = torch.vmap(interval_linear, in_dims=(None, None, 0, None))(lower, upper, weights, bias)
    assert torch.equal(mapped[1][2], interval_linear(lower, upper, weights[2], bias)[1])


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)])
def test_leading_shapes_and_strides(isa, leading):
    x = torch.rand(*leading, 6)
    weight = torch.randn(6, 4).T
    lower, upper = interval_linear(x, x, weight)
    assert lower.shape == (*leading, 4)
    assert ((lower <= x @ weight.T + 1e-5) & (x @ weight.T - 1e-5 <= upper)).all()


def test_no_inputs_gives_the_bias():
    lower, upper = interval_linear(
        torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(3, 0), torch.ones(3)
    )
    assert (lower <= 1).all()
    assert (upper >= 1).all()
    assert (upper - lower < 1e-6).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"rounding": "up"},
            ValueError,
            "rounding must be one of real, deployed, nearest, deployed-tf32, .*; got 'up'",
        ),
        (
            {"lower": torch.zeros(3, 5).half()},
            TypeError,
            "lower must have dtype float32 or float64",
        ),
        ({"upper": torch.zeros(3, 4)}, ValueError, "upper must have the shape of lower"),
        ({"weight": torch.zeros(4, 6)}, ValueError, "lower must have last size 6"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \(4,\)"),
        ({"weight": torch.zeros(4, 5).double()}, TypeError, "weight must have the dtype of lower"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {
        "lower": torch.zeros(3, 5),
        "upper": torch.ones(3, 5),
        "weight": torch.zeros(4, 5),
        "bias": None,
        "rounding": "real",
    } | change
    with pytest.raises(error, match=message):
        interval_linear(**arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_of_halves_bound_boxes_of_floats(dtype):
    """Halves are exact in float32: the bounds are those of the weights as they are stored."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(12, 4)
    ).to(dtype)
    x = torch.rand(2, 2, 4, 4)
    ends = model(pyrobust.Interval.ball(x, 0.01))
    wide = [p.detach().float().requires_grad_() for p in model.parameters()]
    hidden = pyrobust.Interval.ball(x, 0.01)
    hidden = torch.nn.functional.conv2d(hidden, wide[0], wide[1]).relu().flatten(1)
    expected = torch.nn.functional.linear(hidden, wide[2], wide[3])
    assert torch.equal(ends.lower, expected.lower)
    assert torch.equal(ends.upper, expected.upper)
    ends.upper.sum().backward()
    expected.upper.sum().backward()
    for own, other in zip(model.parameters(), wide, strict=True):
        assert own.grad.dtype == dtype
        torch.testing.assert_close(own.grad, other.grad.to(dtype))


def test_bfloat16_stays_where_cuda_kernels_read_it(monkeypatch):
    from pyrobust.ops import _interval_checks

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(_interval_checks, "has_cuda_module", lambda: True)
    box, bias = torch.zeros(1, 3).as_subclass(OnGpu), torch.ones(2).bfloat16()
    weight = torch.nn.Parameter(torch.ones(2, 3).bfloat16())
    with torch.no_grad():
        kept, shift = _interval_checks.in_dtype_of(box, box, weight, bias)
        assert kept is weight
        assert shift.dtype == torch.float32
        for other in (weight.half(), torch.ones(2, 3)):
            assert _interval_checks.in_dtype_of(box, box, other, None)[0].dtype == torch.float32
        plain = torch.zeros(1, 3)
        assert _interval_checks.in_dtype_of(plain, plain, weight, None)[0].dtype == torch.float32
    trained, _ = _interval_checks.in_dtype_of(box, box, weight, bias)
    assert trained.dtype == torch.float32
    assert trained.requires_grad


@pytest.mark.parametrize("rounding", ["nearest", "real", "deployed"])
@pytest.mark.parametrize("terms", [0, 511, 1600])
def test_many_inputs_meet_the_terms_in_passes_that_change_no_bit(terms, rounding, isa):
    weight, bias = torch.randn(13, terms), torch.randn(13)
    x = torch.randn(1060, terms)  # so many inputs that a pass has 512 terms
    low, high = interval_linear(x - 0.1, x + 0.1, weight, bias, rounding=rounding)
    for rows in (slice(0, 9), slice(1040, 1060)):  # all terms in one pass
        ends = x[rows] - 0.1, x[rows] + 0.1
        few = interval_linear(*ends, weight, bias, rounding=rounding)
        assert torch.equal(low[rows], few[0])
        assert torch.equal(high[rows], few[1])
