"""Coordinate descent on codes and fitted scales: exact losses, and no single move that helps."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyrobust
from pyrobust.quantize import GPTQ, HessianAccumulator, LearnedRounding
from pyrobust.quantize.code_descent import descend_codes, fit_scales
from pyrobust.quantize.quadratic_loss import QuadraticLoss
from pyrobust.quantize.rounding_grid import search_grid


def moments(x, parts=1):
    accumulator = HessianAccumulator(x.shape[-1], groups=parts, dtype=torch.float64)
    accumulator.add(x)
    return accumulator.hessian()


def squared_error(x, y, weight):
    """``x`` is ``(parts, n, cols)``, ``y`` ``(parts, n, rows)``."""
    out = x @ weight.reshape(len(x), -1, weight.shape[1]).transpose(1, 2)
    return (out - y).square().sum(2).mean(1).sum()


@pytest.fixture(params=[1, 2], ids=["one part", "two parts"])
def problem(request):
    """A weight, inputs and targets that are not the outputs of that weight, and their loss."""
    parts = request.param
    x = (torch.randn(parts, 64, 5) @ torch.randn(parts, 5, 12)).double()
    x = x + 0.1 * torch.randn(parts, 64, 12)
    weight = torch.randn(8, 12).double()
    y = x @ weight.reshape(parts, -1, 12).transpose(1, 2) + 0.1 * torch.randn(parts, 64, 8 // parts)
    at = weight.clone().requires_grad_()
    squared_error(x, y, at).backward()
    return x, y, QuadraticLoss(weight, at.grad, moments(x if parts > 1 else x[0], parts))


def test_the_quadratic_is_the_squared_error(problem):
    x, y, loss = problem
    other = torch.randn(8, 12).double()
    direct = squared_error(x, y, other) - squared_error(x, y, loss.base)
    torch.testing.assert_close(torch.tensor(loss.value(other)).double(), direct)
    at = other.clone().requires_grad_()
    squared_error(x, y, at).backward()
    torch.testing.assert_close(loss.gradient(other), at.grad)
    best = loss.minimizer()
    assert float(loss.gradient(best).norm()) < 1e-2 * float(at.grad.norm())
    assert loss.value(best) < loss.value(loss.base)


def test_damping_is_the_distance_from_the_base(problem):
    _, _, loss = problem
    damped = QuadraticLoss(loss.base, loss.slope, 2 * loss.moments, damp=0.1)
    other = torch.randn(8, 12).double()
    mean = loss.moments.diagonal(dim1=1, dim2=2).mean(1).repeat_interleave(8 // len(loss.moments))
    extra = 0.1 * ((other - loss.base).square().sum(1) * mean).sum()
    assert damped.value(other) == pytest.approx(loss.value(other) + float(extra))


@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("power", [1.0, 0.6])
def test_no_single_move_helps_after_the_descent(problem, group_dim, symmetric, power):
    _, _, loss = problem
    form = {"bits": 3, "group_size": 5, "group_dim": group_dim, "symmetric": symmetric}
    grid = search_grid(loss.base, **form, power=power)
    start = grid.nearest(loss.base.float()).double()
    steps = descend_codes(loss, grid, start, sweeps=100)
    value = loss.value(grid.values(steps))
    assert value < loss.value(grid.values(start))
    assert torch.equal(steps, steps.round())
    assert bool((steps >= grid.low).all() and (steps <= grid.high).all())
    for index in range(steps.numel()):
        for direction in (-1, 1):
            moved = steps.clone()
            moved.view(-1)[index] += direction
            if bool((moved >= grid.low).all() and (moved <= grid.high).all()):
                assert loss.value(grid.values(moved)) >= value - 1e-4 * abs(value)


def test_bounds_hold_in_the_descent(problem):
    _, _, loss = problem
    grid = search_grid(loss.base, bits=3, group_size=12)
    floor = torch.floor(grid.steps(loss.base)).clamp(-4, 3)
    high = (floor + 1).clamp(max=3)
    steps = descend_codes(loss, grid, floor, low=floor, high=high)
    assert set((steps - floor).unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("group_dim", [0, 1])
def test_fitted_scales_are_those_of_least_loss(problem, group_dim):
    _, _, loss = problem
    grid = search_grid(loss.base, bits=3, group_size=5, group_dim=group_dim)
    grid = type(grid)(
        grid.scale.double(), None, grid.bits, grid.shape, grid.group_size, grid.group_dim
    )
    steps = grid.nearest(loss.base)
    scale = fit_scales(loss, grid, steps, rounds=1000)
    value = loss.value(grid.values(steps, scale))
    assert value < loss.value(grid.values(steps))
    at = scale.clone().requires_grad_()
    (grid.values(steps, at) * loss.gradient(grid.values(steps, scale))).sum().backward()
    inside = (scale > 0.5001 * grid.scale) & (scale < 1.9999 * grid.scale)
    assert int(inside.sum()) > 0.8 * scale.numel()
    assert float(at.grad[inside].norm()) < 1e-2 * float(loss.gradient(loss.base).norm())
    assert bool((scale >= 0.5 * grid.scale).all() and (scale <= 2 * grid.scale).all())


def correlated(rows, columns):
    return torch.randn(rows, 6) @ torch.randn(6, columns) + 0.2 * torch.randn(rows, columns)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"group_dim": 0}])
def test_started_from_gptq_it_loses_less_than_gptq(options):
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    x = correlated(256, 24)
    form = {"bits": 2, "group_size": 12, "calibration": [x], **options}
    plain = pyrobust.pack(model, quantizer=GPTQ(), **form)
    better = pyrobust.pack(model, quantizer=LearnedRounding(start="gptq", iterations=0), **form)
    with torch.no_grad():
        y, plain, better = (F.mse_loss(m(x), model(x)) for m in (model, plain, better))
    assert y == 0
    assert better < 0.9 * plain


def test_convolutions_with_groups_start_from_gptq():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.ReLU()).eval()
    x = correlated(32, 4 * 25).reshape(32, 4, 5, 5)
    form = {"bits": 2, "group_size": 18, "calibration": [x]}
    plain = pyrobust.pack(model, quantizer=GPTQ(), **form)
    better = pyrobust.pack(
        model, quantizer=LearnedRounding(start="gptq", iterations=3, batch_size=4), **form
    )
    with torch.no_grad():
        assert F.mse_loss(better(x), model(x)) < F.mse_loss(plain(x), model(x))


def test_scales_take_two_bytes():
    model = nn.Sequential(nn.Linear(24, 16)).eval()
    form = {"bits": 2, "group_size": 12, "calibration": [correlated(64, 24)]}
    for start in ("nearest", "gptq"):
        quantizer = LearnedRounding(start=start, iterations=2)
        assert pyrobust.pack(model, quantizer=quantizer, **form)[0].scale.dtype == torch.float16


@pytest.mark.parametrize("option", [{"loss": "l1"}, {"weight_fraction": 0.5}])
def test_gptq_starts_layers_under_squared_error_only(option):
    with pytest.raises(ValueError, match="start 'gptq' needs loss 'mse'"):
        LearnedRounding(start="gptq", **option)
