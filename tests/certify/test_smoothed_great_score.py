"""The certified variant of the GREAT score: below the true distance, whatever the slope."""

import math

import pytest
import torch
from scipy import special
from torch import nn

import pyrobust
from pyrobust.certify import smoothed_great_score
from pyrobust.certify.smoothed_great_score import _expected_lower
from pyrobust.certify.statistics import bernstein_margin


class Steep(nn.Module):
    """Two classes, sigmoid(k w.x): the boundary is where w.x = 0, whatever k."""

    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, x):
        score = self.k * x.flatten(1).sum(1) / x.flatten(1).shape[1] ** 0.5
        return torch.stack([score, -score], dim=1)


@pytest.mark.parametrize("k", [1.0, 10.0, 100.0, 1000.0])
def test_never_beyond_the_true_distance(k):
    """The smoothed classifier of a symmetric score has the base's boundary: w.x = 0."""
    x = torch.randn(1000, 64) * 0.1
    distance = (x.sum(1) / 8).abs().double()
    labels = (x.sum(1) < 0).long()
    score = smoothed_great_score(Steep(k).eval(), x, labels, sigma=0.1, n=200, alpha=1e-6)
    assert bool((score.certificate.radius <= distance).all())
    assert score.lower <= score.value <= float(distance.mean())
    assert score.certified
    assert score.certificate.certified
    if k >= 100:
        assert score.value > 0  # it says something


def test_margin_bound_covers_the_known_margin():
    """2,000 repetitions: the bound exceeds the exact margin in at most a share alpha."""
    alpha, sigma = 0.05, 0.5
    x = torch.tensor([[0.3]]).expand(2000, 1)  # each has its own index, hence its own noise
    labels = torch.zeros(2000, dtype=torch.int64)
    score = smoothed_great_score(
        Steep(1e6).eval(), x, labels, sigma=sigma, n=400, alpha=alpha, seed=3
    )
    exact = 2 * special.ndtr(0.3 / sigma) - 1
    missed = float((score.margin > exact).double().mean())
    assert missed <= alpha + 3 * (alpha * (1 - alpha) / 2000) ** 0.5
    assert float(score.margin.mean()) > 0.2  # and has power


class Thirds(nn.Module):
    """Three classes on a line, cut at -0.2 and 0.4, sure of each."""

    def forward(self, x):
        place = (x > -0.2).long() + (x > 0.4).long()
        return 40.0 * nn.functional.one_hot(place[:, 0], 3).float()


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_margin_bound_covers_the_least_of_several_margins(activation):
    """2,000 repetitions with three classes: the union over the other two is enough."""
    alpha, sigma, x = 0.05, 0.5, 0.1
    score = smoothed_great_score(
        Thirds().eval(),
        torch.full((2000, 1), x),
        torch.ones(2000, dtype=torch.int64),
        sigma=sigma,
        n=400,
        alpha=alpha,
        activation=activation,
        seed=4,
    )
    low, high = special.ndtr((-0.2 - x) / sigma), special.ndtr((0.4 - x) / sigma)
    span = 0.5 if activation == "sigmoid" else 1.0  # sigmoid(40) - sigmoid(0)
    exact = span * min(high - low - low, high - low - (1 - high))
    missed = float((score.margin > exact).double().mean())
    assert missed <= alpha + 3 * (alpha * (1 - alpha) / 2000) ** 0.5
    assert abs(exact) < 0.2
    assert float(score.margin.mean()) > exact - 0.3  # and has power


def test_lower_covers_the_expected_radius():
    """2,000 repetitions of the procedure on votes drawn from their known distribution."""
    sigma, alpha, n = 0.25, 0.05, 200
    largest = sigma * math.sqrt(math.pi / 2)
    x = torch.rand(2000, 100, dtype=torch.float64) * 0.5
    p = torch.from_numpy(special.ndtr(x.numpy() / sigma))
    grid = torch.linspace(0, 0.5, 10_001, dtype=torch.float64)
    true = largest * (2 * torch.from_numpy(special.ndtr(grid.numpy() / sigma)) - 1)
    votes = torch.binomial(torch.full_like(p, n), p)
    mean, variance = 2 * votes / n - 1, 4 * votes * (n - votes) / (n * (n - 1))
    radius = (largest * (mean - bernstein_margin(variance, n, alpha, span=2.0))).clamp(min=0)
    lower = _expected_lower(radius, alpha, largest)
    missed = float((lower > true.mean()).double().mean())
    assert missed <= alpha + 3 * (alpha * (1 - alpha) / 2000) ** 0.5
    assert float(lower.mean()) > 0.02  # and has power


def test_batches_do_not_matter_and_ranges_hold():
    model = nn.Linear(8, 5).eval()
    x, y = torch.rand(6, 8), torch.arange(6) % 5
    whole = smoothed_great_score(model, x, y, sigma=0.3, n=200, batch_size=200)
    parts = smoothed_great_score(model, x, y, sigma=0.3, n=200, batch_size=33)
    torch.testing.assert_close(parts.margin, whole.margin, rtol=0, atol=1e-6)
    alone = smoothed_great_score(model, x[4:], y[4:], sigma=0.3, n=200, first_index=4)
    torch.testing.assert_close(alone.margin, whole.margin[4:], rtol=0, atol=1e-6)
    assert bool((whole.margin >= -1 - 2).all())
    assert bool((whole.margin <= 1).all())
    assert whole.to_dict()["radius"] == whole.certificate.radius.tolist()
    assert "mean certified l2 radius" in whole.summary()


def test_no_attack_inside_the_radius_flips_the_exact_smoothed_class():
    """Two smooth classes in the plane: the exact mean scores by quadrature decide."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        model[2].weight.mul_(8)
    nodes, weights = (
        torch.from_numpy(special.roots_hermitenorm(40)[0]),
        torch.from_numpy(special.roots_hermitenorm(40)[1]),
    )
    grid = torch.cartesian_prod(nodes, nodes)
    mass = torch.outer(weights, weights).flatten() / (2 * math.pi)
    sigma = 0.4
    x = torch.rand(40, 2)

    def smoothed(points):
        copies = points[:, None].double() + sigma * grid
        return (torch.sigmoid(model.double()(copies)) * mass[:, None]).sum(1)

    with torch.no_grad():
        labels = smoothed(x).argmax(1)
        score = smoothed_great_score(model.float(), x, labels, sigma=sigma, n=4000)
        certain = score.certificate.radius > 0
        assert int(certain.sum()) >= 10
        angles = torch.linspace(0, 2 * math.pi, 33)[:-1]
        circle = torch.stack([angles.cos(), angles.sin()], 1).double()
        for point, label, radius in zip(
            x[certain], labels[certain], score.certificate.radius[certain], strict=True
        ):
            moved = point.double() + 0.999 * radius * circle
            assert bool((smoothed(moved).argmax(1) == label).all())


def test_a_packed_model_is_certified():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    packed = pyrobust.pack(model, bits=4, group_size=16)
    x = torch.rand(3, 16)
    y = packed(x).argmax(1)
    score = smoothed_great_score(packed, x, y, sigma=0.05, n=100)
    assert score.margin.shape == (3,)


def test_refusals():
    model, x, y = nn.Linear(2, 2).eval(), torch.rand(1, 2), torch.tensor([0])
    for option in ({"sigma": 0.0}, {"n": 1}, {"alpha": 1.0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="smoothed_great_score"):
            smoothed_great_score(model, x, y, **{"sigma": 0.1, **option})
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\)"):
        smoothed_great_score(model, x, torch.tensor([2]), sigma=0.1)
    with pytest.raises(ValueError, match="at least one sample"):
        smoothed_great_score(model, x[:0], y[:0], sigma=0.1)
    with pytest.raises(ValueError, match="evaluation mode"):
        smoothed_great_score(nn.Linear(2, 2), x, y, sigma=0.1)

    class Broken(nn.Module):
        def forward(self, inputs):
            return torch.full((len(inputs), 2), torch.nan)

    with pytest.raises(ValueError, match="must not return NaN; it does for image 0"):
        smoothed_great_score(Broken().eval(), x, y, sigma=0.1)


def test_margins_are_those_of_bernstein_at_a_shared_level():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([[2.0, 0.0, -1.0, 0.5]]).expand(len(x), 4)

    score = smoothed_great_score(
        Constant().eval(), torch.zeros(1, 3), torch.tensor([0]), sigma=0.5, n=200, alpha=0.01
    )
    # no variance; three other classes share alpha; a margin lies in [-1, 1]
    best = torch.sigmoid(torch.tensor([2.0, 0.5]).double())
    lost = 7 * 2 * math.log(2 * 3 / 0.01) / (3 * 199)
    assert score.margin.item() == pytest.approx(float(best[0] - best[1]) - lost, rel=1e-9)


def test_the_expected_radius_pays_for_sampling_and_for_false_radii():
    alpha, largest, count = 0.01, 1.2, 4000
    lost = 7 * largest * math.log(2 / alpha) / (3 * (count - 1)) + alpha * largest
    found = _expected_lower(torch.full((count,), 0.5, dtype=torch.float64), alpha, largest)
    assert float(found) == pytest.approx(0.5 - lost, rel=1e-9)
