"""Losses of certified training: limits, order, and what bounds what."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyrobust.evaluate import pgd
from pyrobust.train import (
    crown_ibp_loss,
    interval_loss,
    mtl_ibp_loss,
    sabr_loss,
    taps_loss,
)


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)
    ).eval()
    x, y = torch.rand(20, 6), torch.arange(20) % 4
    return model, x, y


def worst_sampled(model, x, y, eps):
    """Mean of the largest loss seen per input, by attack and by corners."""
    moved = pgd(model, x, y, eps=eps, steps=30, restarts=3)
    losses = [F.cross_entropy(model(moved), y, reduction="none")]
    for _ in range(50):
        corner = (x + eps * torch.randn_like(x).sign()).clamp(0, 1)
        losses.append(F.cross_entropy(model(corner), y, reduction="none"))
    return torch.stack(losses).amax(0).mean()


@pytest.mark.parametrize("eps", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("fused", [False, True])
def test_crown_ibp_bounds_the_loss_and_is_tighter_than_intervals(case, eps, fused):
    model, x, y = case
    found = crown_ibp_loss(model, x, y, eps=eps, fused=fused)
    assert float(found) >= float(worst_sampled(model, x, y, eps)) - 1e-5
    elided = crown_ibp_loss(model, x, y, eps=eps, share=0.0)
    assert float(found) <= float(elided) + 1e-5
    assert float(elided) <= float(interval_loss(model, x, y, eps=eps)) + 1e-5
    if not fused:
        assert float(found) < 0.98 * float(elided) or eps < 0.05


def test_points_have_their_own_loss(case):
    model, x, y = case
    plain = F.cross_entropy(model(x), y)
    for option in (False, True):
        torch.testing.assert_close(
            crown_ibp_loss(model, x, y, eps=0.0, fused=option), plain, rtol=1e-4, atol=1e-4
        )


def test_fusion_survives_large_margins(case):
    model, x, y = case
    with torch.no_grad():
        model[-1].weight.mul_(1e3)
    loss = crown_ibp_loss(model, x, y, eps=0.1, fused=True)
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_sabr_runs_from_intervals_to_attacks(case):
    model, x, y = case
    whole = sabr_loss(model, x, y, eps=0.1, ratio=1.0)
    torch.testing.assert_close(whole, interval_loss(model, x, y, eps=0.1))
    point = sabr_loss(model, x, y, eps=0.1, ratio=0.0)
    moved = pgd(model, x, y, eps=0.1, steps=8, keep="last", seed=0)
    torch.testing.assert_close(point, F.cross_entropy(model(moved), y), rtol=1e-5, atol=1e-5)
    middle = sabr_loss(model, x, y, eps=0.1, ratio=0.3)
    assert float(point) < float(middle) < float(whole)


def test_mtl_ibp_is_the_mean_of_its_parts(case):
    model, x, y = case
    ends = [mtl_ibp_loss(model, x, y, eps=0.1, weight=w) for w in (0.0, 1.0)]
    torch.testing.assert_close(ends[1], interval_loss(model, x, y, eps=0.1))
    torch.testing.assert_close(
        ends[0], sabr_loss(model, x, y, eps=0.1, ratio=0.0), atol=1e-5, rtol=1e-5
    )
    middle = mtl_ibp_loss(model, x, y, eps=0.1, weight=0.3)
    torch.testing.assert_close(middle, 0.7 * ends[0] + 0.3 * ends[1])


def test_taps_multiplies_an_attacked_and_an_interval_loss(case):
    model, x, y = case
    extractor, classifier = model[:2], model[2:]
    value = float(taps_loss(extractor, classifier, x, y, eps=0.1))
    intervals = float(interval_loss(model, x, y, eps=0.1))
    attacked = float(sabr_loss(model, x, y, eps=0.1, ratio=0.0))
    assert attacked**2 - 1e-4 <= value <= intervals**2 + 1e-4
    # a classifier of one layer is attacked exactly, up to where PGD stops: both factors agree
    both = float(taps_loss(model[:4], model[4:], x, y, eps=0.1, steps=20))
    elided = float(crown_ibp_loss(model, x, y, eps=0.1, share=0.0))
    assert both == pytest.approx(elided * intervals, rel=1e-3)


def test_gradients_reach_both_parts(case):
    model, x, y = case
    for weight, reached in ((0.0, True), (1.0, True)):
        model.zero_grad()
        taps_loss(model[:2], model[2:], x, y, eps=0.1, weight=weight).backward()
        assert all((p.grad.abs().sum() > 0) == reached for p in model.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_gradcheck(fused):
    torch.manual_seed(1)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    first = nn.Linear(5, 4).double()
    x, y = torch.rand(3, 5, dtype=torch.float64), torch.tensor([0, 1, 2])

    class Net(nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.first, self.rows = first, rows

        def forward(self, v):
            return F.linear(torch.relu(self.first(v)), self.rows)

    def loss(rows):
        return crown_ibp_loss(Net(rows), x, y, eps=0.1, fused=fused)

    assert torch.autograd.gradcheck(loss, (weight,), atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (crown_ibp_loss, {"eps": -0.1}, "eps must be finite and at least"),
        (crown_ibp_loss, {"eps": 0.1, "share": 2.0}, "share must lie in the interval"),
        (sabr_loss, {"eps": 0.1, "ratio": -1.0}, "ratio must lie in the interval"),
        (mtl_ibp_loss, {"eps": 0.1, "weight": 1.5}, "weight must lie in the interval"),
    ],
)
def test_refusals(case, loss, options, message):
    with pytest.raises(ValueError, match=message):
        loss(*case, **options)
