"""Lines of every function: never crossed, touching, and valid for any slope."""

from fractions import Fraction

import mpmath
import pytest
import torch
import torch.nn.functional as F

from pyrobust.certify.relaxation.bends import BENDS
from pyrobust.certify.relaxation.lines import best_lines, lines_for

POWERS = {"pow": 3, "fourth power": 4, "power 1.5": 1.5, "power 0.3": 0.3, "power -2": -2,
          "power -1.5": -1.5}  # fmt: skip
NAMES = sorted({**BENDS, **POWERS})
OPEN = {"rsqrt", "reciprocal", "power -2", "power -1.5"}  # infinite at 0
LEAST = {
    **dict.fromkeys(("log", "log2", "log10", "sqrt", "power 1.5", "power 0.3", *OPEN), 0.0),
    "log1p": -1.0,
}


def bend_of(name):
    if name in POWERS:
        return BENDS["pow"](POWERS[name])
    if name in ("clamp", "clip"):
        return BENDS[name](-0.7, 1.3)
    if name == "prelu":
        return BENDS[name](torch.tensor([0.3]))
    return BENDS[name]()


def boxes(count, name):
    centre = 4 * torch.randn(count, dtype=torch.float64)
    radius = 10 ** (3 * torch.rand(count, dtype=torch.float64) - 2)
    if name in LEAST:
        centre = LEAST[name] + 0.01 + centre.abs() + radius
    return centre - radius, centre + radius


def grid(low, high, points=401):
    share = torch.linspace(0, 1, points, dtype=torch.float64)[:, None]
    return torch.minimum(low + share * (high - low), high)


def check(bend, low, high, lines):
    x = grid(low, high)
    value = bend.function(x)
    # the float64 evaluation of f itself (torch's GELU cancels for x < 0), and of the line here, are
    # off by some units; test_lines_enclose_exact_values allows nothing
    slack = 8 * 2.0**-52 * (value.abs() + x.abs() + 1e-300 + (lines.upper_slope * x).abs())
    assert bool((lines.lower_slope * x + lines.lower_shift <= value + slack).all())
    assert bool((lines.upper_slope * x + lines.upper_shift >= value - slack).all())


@pytest.mark.parametrize("name", NAMES)
def test_best_lines_enclose_and_touch(name):
    bend = bend_of(name)
    low, high = boxes(3000, name)
    lines = best_lines(bend, low, high, sound=True)
    check(bend, low, high, lines)
    x = grid(low, high)
    value = bend.function(x)
    gap_below = (value - lines.lower_slope * x - lines.lower_shift).amin(0)
    gap_above = (lines.upper_slope * x + lines.upper_shift - value).amin(0)
    steep = 1 + lines.lower_slope.abs() + lines.upper_slope.abs()
    steep = torch.maximum(steep, bend.slope(low).abs() + bend.slope(high).abs())
    scale = (4e-3 * (high - low) + 1e-6) * steep  # it may touch between two points of the grid
    assert bool((gap_below <= scale).all())
    assert bool((gap_above <= scale).all())


@pytest.mark.parametrize("name", NAMES)
def test_any_slope_has_valid_lines(name):
    bend = bend_of(name)
    low, high = boxes(2000, name)
    down, up = torch.randn(2, 2000, dtype=torch.float64)
    check(bend, low, high, lines_for(bend, low, high, down, up, sound=True))


@pytest.mark.parametrize("name", NAMES)
def test_points_and_infinite_boxes(name):
    bend = bend_of(name)
    point = torch.linspace(-6, 6, 97, dtype=torch.float64)
    point = point if name not in LEAST else point + 6.25 + LEAST[name]
    lines = best_lines(bend, point, point.clone(), sound=True)
    value = bend.function(point)
    for slope, shift in (
        (lines.lower_slope, lines.lower_shift),
        (lines.upper_slope, lines.upper_shift),
    ):
        torch.testing.assert_close(slope * point + shift, value, rtol=1e-9, atol=1e-8)
    least = LEAST.get(name, -torch.inf) + 0.5 * (name in OPEN)
    ends = torch.tensor([least]), torch.tensor([torch.inf])
    lines = best_lines(bend, ends[0].double(), ends[1].double(), sound=True)
    assert float(lines.lower_slope) == float(lines.upper_slope) == 0.0
    assert not bool(lines.lower_shift.isnan() | lines.upper_shift.isnan())


@pytest.mark.parametrize("name", [n for n in NAMES if bend_of(n).curved])
def test_slopes_are_the_derivative_and_curvature_bounds_the_second(name):
    bend = bend_of(name)
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    x = x if name not in LEAST else x + 8.1 + LEAST[name]
    x = x[(x[:, None] - torch.tensor([0.0, -3.0, 3.0]).double()).abs().amin(1) > 1e-3]
    x.requires_grad_(True)
    (first,) = torch.autograd.grad(bend.function(x).sum(), x, create_graph=True)
    torch.testing.assert_close(bend.slope(x), first, rtol=1e-9, atol=1e-12)
    (second,) = torch.autograd.grad(bend.slope(x).sum(), x)
    x = x.detach()
    assert bool((second.abs() <= bend.curvature_over(x, x) * (1 + 1e-9)).all())
    # and over boxes it bounds that of every point inside
    low, high = boxes(500, name)
    inside = grid(low, high, 41).requires_grad_(True)
    (second,) = torch.autograd.grad(bend.slope(inside).sum(), inside)
    assert bool((second.abs() <= bend.curvature_over(low, high) * (1 + 1e-9)).all())


MPMATH = {
    "gelu": lambda x: x * mpmath.ncdf(x),
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "mish": lambda x: x * mpmath.tanh(mpmath.log(1 + mpmath.exp(x))),
    "tanh": mpmath.tanh,
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "softplus": lambda x: mpmath.log(1 + mpmath.exp(x)),
    "exp": mpmath.exp,
    "log": mpmath.log,
    "sqrt": mpmath.sqrt,
    "pow": lambda x: x**3,
    "power 1.5": lambda x: x ** mpmath.mpf(1.5),
    "power -2": lambda x: 1 / x**2,
    "reciprocal": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / mpmath.sqrt(x),
}


@pytest.mark.parametrize("name", sorted(MPMATH))
def test_lines_enclose_exact_values(name):
    """40 digits: no allowance for rounding."""
    bend = bend_of(name)
    low, high = boxes(40, name)
    lines = best_lines(bend, low, high, sound=True)
    with mpmath.workdps(40):
        for i in range(40):
            slopes = [mpmath.mpf(float(v[i])) for v in (lines.lower_slope, lines.upper_slope)]
            shifts = [mpmath.mpf(float(v[i])) for v in (lines.lower_shift, lines.upper_shift)]
            for x in grid(low[i], high[i], 41)[:, 0].tolist():
                value = MPMATH[name](mpmath.mpf(x))
                assert slopes[0] * mpmath.mpf(x) + shifts[0] <= value
                assert slopes[1] * mpmath.mpf(x) + shifts[1] >= value


@pytest.mark.parametrize("name", ["reciprocal", "power -2", "pow"])
def test_powers_on_the_negative_side(name):
    bend = bend_of(name)
    low, high = boxes(500, "reciprocal")
    check(bend, -high, -low, best_lines(bend, -high, -low, sound=True))


def test_intercepts_have_the_gradient_of_the_extremum():
    low, high = torch.tensor([-2.0]).double(), torch.tensor([1.5]).double()
    slope = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    bend = BENDS["tanh"]()

    def both(k):
        lines = lines_for(bend, low, high, k, k, sound=False)
        return torch.cat([lines.lower_shift, lines.upper_shift])

    assert torch.autograd.gradcheck(both, (slope,), atol=1e-5)


def test_relu_lines_are_the_textbook_ones():
    low, high = torch.tensor([-2.0, -1.0, 1.0, -3.0]), torch.tensor([1.0, 3.0, 2.0, -1.0])
    lines = best_lines(BENDS["relu"](), low, high, sound=False)
    torch.testing.assert_close(lines.lower_slope, torch.tensor([0.0, 1.0, 1.0, 0.0]))
    torch.testing.assert_close(lines.upper_slope, torch.tensor([1 / 3, 3 / 4, 1.0, 0.0]))
    torch.testing.assert_close(lines.upper_shift, torch.tensor([2 / 3, 3 / 4, 0.0, 0.0]))
    torch.testing.assert_close(F.relu(high), lines.upper_slope * high + lines.upper_shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_chord_of_a_relu_lies_above_it_in_exact_arithmetic(dtype):
    generator = torch.Generator().manual_seed(0)
    low, high = torch.rand(2, 500, dtype=dtype, generator=generator)
    low = -low * 10.0 ** torch.randint(-6, 7, (500,), generator=generator)
    lines = best_lines(BENDS["relu"](), low.to(dtype), high, True)
    ends = zip(lines.upper_slope, lines.upper_shift, low.to(dtype), high, strict=True)
    for numbers in ends:
        slope, shift, left, right = (Fraction(number.item()) for number in numbers)
        assert slope * left + shift >= 0
        assert slope * right + shift >= right


def test_lines_of_softplus_hold_on_either_side_of_its_threshold():
    beta, threshold = 3.0, 1.0
    centre = torch.linspace(-1, 1, 60, dtype=torch.float64).repeat_interleave(3)
    radius = torch.tensor([0.01, 0.2, 1.0], dtype=torch.float64).repeat(60)
    low, high = centre - radius, centre + radius
    lines = best_lines(BENDS["softplus"](beta, threshold), low, high, True)
    x = grid(low, high)
    # torch's own values step down at the threshold; the smooth function is meant too
    for values in (F.softplus(x, beta, threshold), torch.log1p(torch.exp(beta * x)) / beta):
        assert bool((lines.lower_slope * x + lines.lower_shift <= values + 1e-12).all())
        assert bool((lines.upper_slope * x + lines.upper_shift >= values - 1e-12).all())
