"""Planned numbers of samples: sensible choices, fresh samples, and the level kept exactly."""

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import nn

from pyrobust.certify import clopper_pearson_lower, gaussian_radius, radius_plan
from pyrobust.nn import SmoothedClassifier

ALPHA = 0.001


def unit_radius(p_lower):
    return gaussian_radius(p_lower, 1.0)


class Halfspace(nn.Module):
    """Class 1 where the first coordinate is positive: an input's first coordinate is its radius."""

    def __init__(self):
        super().__init__()
        self.noisy = []

    def forward(self, x):
        self.noisy.append(x.clone())
        return torch.stack([torch.zeros_like(x[:, 0]), x[:, 0]], dim=1)


def margins(values):
    return torch.tensor(values)[:, None].repeat(1, 3) * torch.tensor([1.0, 0.0, 0.0])


def chosen(plan, votes, pilot):
    return int(plan.choose(torch.tensor([votes]), torch.tensor([pilot])))


def test_hopeless_inputs_get_no_samples_and_clear_ones_many():
    plan = radius_plan(unit_radius, ALPHA, 100_000)
    assert chosen(plan, 40, 100) == 0
    assert chosen(plan, 52, 100) > 0
    assert 1000 < chosen(plan, 90, 100) < chosen(plan, 500, 500) <= 100_000
    dear = radius_plan(unit_radius, ALPHA, 100_000, price=1e-5)
    assert chosen(dear, 500, 500) < chosen(plan, 500, 500)
    assert chosen(radius_plan(unit_radius, ALPHA, 7), 100, 100) <= 7


def test_expected_radius_agrees_with_the_binomial_distribution():
    plan = radius_plan(unit_radius, ALPHA, 1000, price=1e-6)
    for row in (5, 20, 40):
        p, n = float(np.exp(plan.log_hit[row])), 1000
        k = np.arange(n + 1)
        radii = np.maximum(unit_radius(clopper_pearson_lower(k, n, ALPHA)).numpy(), 0)
        exact = stats.binom.pmf(k, n, p) @ radii - 1e-6 * n
        assert plan.gain[row, -1] == pytest.approx(exact, abs=0.02)


def test_the_level_is_that_of_the_fresh_samples_whatever_the_plan():
    # Exact: for each pilot outcome the bound of the fresh votes fails with probability <= alpha.
    alpha, pilot, p = 0.05, 20, 0.8
    plan = radius_plan(unit_radius, alpha, 400)
    wrong = 0.0
    for votes in range(pilot + 1):
        n = chosen(plan, votes, pilot)
        if n:
            above = clopper_pearson_lower(np.arange(n + 1), n, alpha).numpy() > p
            wrong += (
                stats.binom.pmf(votes, pilot, p)
                * stats.binom.pmf(np.arange(n + 1), n, p)[above].sum()
            )
    assert 0.3 * alpha < wrong <= alpha


@pytest.mark.slow
def test_ten_million_null_paths_keep_the_level():
    paths, generator = 10_000_000, np.random.default_rng(0)
    plan = radius_plan(unit_radius, ALPHA, 100_000)
    for z in (0.5, 2.0):
        p = float(special.ndtr(z))
        pilot = generator.binomial(500, p, paths)
        sizes = plan.choose(torch.from_numpy(pilot), torch.full((paths,), 500)).numpy()
        wrong, exact = 0, 0.0
        for n in np.unique(sizes[sizes > 0]).tolist():
            count = int((sizes == n).sum())
            above = clopper_pearson_lower(np.arange(n + 1), n, ALPHA).numpy() > p
            first = int(np.argmax(above)) if above.any() else n + 1
            wrong += int((generator.binomial(n, p, count) >= first).sum())
            exact += count * stats.binom.sf(first - 1, n, p)
        assert exact <= ALPHA * paths
        assert abs(wrong - exact) < 5 * exact**0.5


def test_planned_certificate_follows_from_its_counts():
    smoothed = SmoothedClassifier(Halfspace().eval(), sigma=0.5, num_classes=2)
    x = margins([2.0, 0.4, 0.0, -0.7])
    certificate = smoothed.certify(x, n0=20, n=20_000, alpha=0.01, planned=True, price=1e-5)
    drawn = certificate.counts.sum(1)
    plan = radius_plan(lambda p: gaussian_radius(p, 0.5) / 0.5, 0.01, 20_000, price=1e-5)
    pilot = certificate.selection_counts
    assert torch.equal(drawn, plan.choose(pilot.amax(1), pilot.sum(1)))
    assert torch.equal(certificate.samples, drawn + pilot.sum(1))
    assert certificate.prediction.tolist() == [1, 1, -1, 0]
    votes = certificate.counts.gather(1, pilot.argmax(1)[:, None])[:, 0]
    lower = clopper_pearson_lower(votes, drawn.clamp_min(1), 0.01)
    certain = certificate.prediction >= 0
    assert torch.equal(certificate.radius[certain], gaussian_radius(lower, 0.5)[certain])
    assert (certificate.radius <= torch.tensor([2.0, 0.4, 0.0, 0.7]) + 0.05).all()
    noisy = torch.cat(smoothed.base.noisy)
    assert noisy.unique(dim=0).shape == noisy.shape  # the pilot is never counted again
    alone = smoothed.certify(
        x[1:2], n0=20, n=20_000, alpha=0.01, planned=True, price=1e-5, first_index=1, batch_size=7
    )
    assert torch.equal(alone.counts[0], certificate.counts[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.0}, "alpha must lie in the open interval"),
        ({"budget": 0}, "budget must be at least 1"),
        ({"price": 0.0}, "price must be finite and positive"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    settings = {"alpha": 0.01, "budget": 100, **options}
    with pytest.raises(ValueError, match=message):
        radius_plan(unit_radius, **settings)


def test_randomised_radii_are_longer_and_belong_to_the_input():
    smoothed = SmoothedClassifier(Halfspace().eval(), sigma=0.5, num_classes=2)
    x = margins([2.0, 0.4, 0.0, -0.7])
    for options in ({"n": 2000}, {"n": 5000, "planned": True, "price": 1e-5}):
        plain = smoothed.certify(x, n0=20, **options)
        longer = smoothed.certify(x, n0=20, randomised=True, **options)
        assert torch.equal(plain.counts, longer.counts)
        certain = plain.prediction >= 0
        assert (longer.radius[certain] > plain.radius[certain]).all()
        assert (longer.p_lower[plain.counts.sum(1) == 0] == 0).all()
        again = smoothed.certify(x[3:], n0=20, randomised=True, first_index=3, **options)
        assert torch.equal(again.radius[0], longer.radius[3])
    with pytest.raises(ValueError, match="randomised must be False with runner_up"):
        smoothed.certify(x, runner_up=True, randomised=True)
