"""Initialisation, ramp, regulariser and loss of interval training."""

import math

import pytest
import torch
from torch import nn

from pyrobust import Interval
from pyrobust.train import (
    FastRegularizer,
    GaussianCrossEntropy,
    IBPLoss,
    SmoothEpsSchedule,
    TightnessMonitor,
    fit,
    ibp_init_,
)
from pyrobust.train.tight_ibp import _moments_of


def test_the_ramp_is_continuous_in_value_and_slope():
    ramp = SmoothEpsSchedule(10, 30, eps=0.4)
    assert ramp(0) == ramp(10) == 0.0
    assert ramp(30) == ramp(99) == 0.4
    h, mid = 1e-6, 15.0
    assert ramp(mid + h) == pytest.approx(ramp(mid - h), abs=1e-6)
    left, right = (ramp(mid) - ramp(mid - h)) / h, (ramp(mid + h) - ramp(mid)) / h
    assert left == pytest.approx(right, rel=1e-3)
    assert ramp(12) / ramp(11) == pytest.approx(16)
    with pytest.raises(ValueError, match="end - start"):
        SmoothEpsSchedule(1, 1, eps=0.1)


def test_the_start_keeps_the_last_layer_and_vectors():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(64, 9))
    before = {name: p.clone() for name, p in model.named_parameters()}
    ibp_init_(model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"0.weight"}
    assert float(model[0].weight.detach().std()) == pytest.approx(
        math.sqrt(2 * math.pi) / 27, rel=0.1
    )


def test_the_loss_bounds_the_loss_of_points_and_is_exact_at_radius_zero():
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3))
    x, y = torch.rand(6, 5), torch.arange(6) % 3
    loss = IBPLoss(SmoothEpsSchedule(0.0, 1.0, eps=0.1), regularizer=None, clamp=None)
    plain = nn.functional.cross_entropy(model(x), y)
    torch.testing.assert_close(loss(model, x, y, 0.0), plain)
    worst = loss(model, x, y, 1.0)
    for _ in range(50):
        moved = x + 0.1 * torch.randn_like(x).sign()
        assert float(nn.functional.cross_entropy(model(moved), y)) <= float(worst) + 1e-6
    worst.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_regulariser_follows_its_formula():
    entering = Interval(torch.zeros(1, 2), torch.full((1, 2), 2.0))
    box = Interval(torch.tensor([[1.0, 3.0, -9.0, -5.0]]), torch.tensor([[9.0, 11.0, -1.0, -1.0]]))
    # radii 4, 4, 4, 2: mean 3.5; active centres 5, 7, dead ones -5, -3: means 6 and 4, variances 1.
    expected = (0.5 - 1 / 3.5) / 0.5 + max(0.0, 0.5 - 4 / 6) / 0.5
    assert float(FastRegularizer()(entering, [box])) == pytest.approx(expected, rel=1e-5)
    strict = FastRegularizer(tol=0.9)
    expected = (0.9 - 1 / 3.5) / 0.9 + (0.9 - 4 / 6) / 0.9
    assert float(strict(entering, [box])) == pytest.approx(expected, rel=1e-5)


def test_a_single_active_unit_gives_finite_slopes():
    centre = torch.tensor([[3.0, -2.0, -3.0]], requires_grad=True)
    box = Interval(centre - 1, centre + 1)
    FastRegularizer()(Interval(torch.zeros(1, 2), torch.ones(1, 2)), [box]).backward()
    assert bool(torch.isfinite(centre.grad).all())


def test_the_moments_have_their_own_gradient():
    centre, radius = torch.randn(2, 3, 4, 4, dtype=torch.float64), 0.3
    for layout in (torch.contiguous_format, torch.channels_last):
        ends = [(centre + r).to(memory_format=layout).requires_grad_() for r in (-radius, radius)]
        assert torch.autograd.gradcheck(_moments_of, ends)
    means = _moments_of(*ends)[1:3]
    torch.testing.assert_close(means[0], centre[centre > radius].mean())
    torch.testing.assert_close(means[1], centre[centre < -radius].mean())


def test_a_layer_without_dead_units_is_left_out():
    ends = [torch.tensor([[1.0, 2.0, 3.0]]) + r for r in (-0.5, 0.5)]
    ends = [end.requires_grad_() for end in ends]
    term = FastRegularizer()(Interval(torch.zeros(1, 2), torch.ones(1, 2)), [Interval(*ends)])
    assert float(term.detach()) == 0
    term.backward()
    assert all(torch.equal(end.grad, torch.zeros(1, 3)) for end in ends)


def test_the_monitor_records_and_leaves_training_as_it_is():
    x, labels = torch.rand(64, 6), torch.arange(64) % 3

    def run(monitored):
        torch.manual_seed(1)
        layers = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.0)]
        model = nn.Sequential(*layers, nn.Linear(16, 3))
        objective = GaussianCrossEntropy()
        if monitored:
            objective = TightnessMonitor(objective, x[:4], 0.1, y=labels[:4], every=3)
        fit(model, x, labels, objective=objective, epochs=2, batch_size=16)
        return model, objective

    model, monitor = run(True)
    plain, _ = run(False)
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert [round(done * 8) for done, _ in monitor.history] == [0, 3, 6]
    assert all(0 < value <= 1 for _, value in monitor.history)
    assert monitor.plot().get_xlabel() == "share of training"
    with pytest.raises(ValueError, match="every"):
        TightnessMonitor(GaussianCrossEntropy(), x, 0.1, every=0)


def test_kappa_mixes_in_the_clean_loss_as_the_radius_grows():
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3))
    x, y = torch.rand(6, 5), torch.arange(6) % 3
    ramp = SmoothEpsSchedule(0.0, 0.5, eps=0.1)
    clean = nn.functional.cross_entropy(model(x), y)
    for done in (0.2, 0.4, 1.0):
        worst = IBPLoss(ramp, None)(model, x, y, done)
        weight = 1 - 0.7 * ramp(done) / 0.1
        mixed = IBPLoss(ramp, None, kappa=0.3)(model, x, y, done)
        torch.testing.assert_close(mixed, weight * clean + (1 - weight) * worst)
    with pytest.raises(ValueError, match=r"kappa must lie in the interval \[0, 1\]"):
        IBPLoss(ramp, kappa=1.5)
