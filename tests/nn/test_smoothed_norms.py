"""Smoothing in other norms and on grids: bases with known probabilities, attacked at the radius."""

import math

import pytest
import torch
from scipy import special, stats
from torch import nn

import pyrobust
from pyrobust.certify import ablation_radius, clopper_pearson_lower, laplace_radius, uniform_radius
from pyrobust.certify.noise import noise_of
from pyrobust.nn import SmoothedClassifier
from pyrobust.ops import gaussian_samples, grid_samples

SIGMA = 0.5


class Threshold(nn.Module):
    """Class 1 where the first coordinate is at least ``at``: the worst base for l1 noise."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def forward(self, x):
        score = x.flatten(1)[:, 0] - self.at
        return torch.stack([torch.zeros_like(score), score], dim=1)


class Ball(nn.Module):
    """Class 1 inside a ball: under Gaussian noise its probability is a noncentral chi-square."""

    def __init__(self, radius):
        super().__init__()
        self.radius = radius

    def forward(self, x):
        score = self.radius**2 - x.flatten(1).square().sum(1)
        return torch.stack([torch.zeros_like(score), score], dim=1)


class Visible(nn.Module):
    """Class 1 while most of the visible pixels are bright."""

    def forward(self, x):
        score = (x.flatten(1) - 0.5).sign().where(x.flatten(1) != 0, torch.tensor(0.0)).sum(1)
        return torch.stack([torch.full_like(score, -0.5), score], dim=1)


def point(value, dimension=4):
    x = torch.zeros(1, dimension)
    x[0, 0] = value
    return x


@pytest.mark.parametrize(
    ("noise", "exact", "radius"),
    [
        ("uniform", stats.uniform(-math.sqrt(3) * SIGMA, 2 * math.sqrt(3) * SIGMA), uniform_radius),
        ("laplace", stats.laplace(scale=SIGMA / math.sqrt(2)), laplace_radius),
    ],
)
def test_l1_votes_have_the_known_probability_and_the_radius_is_sound(noise, exact, radius):
    margin = 0.3
    smoothed = SmoothedClassifier(Threshold(0.0).eval(), SIGMA, 2, norm="l1", noise=noise)
    certificate = smoothed.certify(point(margin), n0=20, n=20_000, alpha=1e-3)
    p = exact.cdf(margin)
    votes = int(certificate.counts[0, 1])
    assert abs(votes - 20_000 * p) < 5 * (20_000 * p * (1 - p)) ** 0.5
    scale = smoothed.noise.half_width if noise == "uniform" else smoothed.noise.scale
    expected = radius(clopper_pearson_lower(votes, 20_000, 1e-3), scale).item()
    assert certificate.radius.item() == pytest.approx(expected)
    # For this base the true radius is the margin itself, so the bound must stay just below it.
    assert 0.85 * margin < certificate.radius.item() < margin
    assert certificate.norm == "l1"


def test_quadratic_base_is_never_certified_beyond_its_exact_radius():
    # p(x) = P(noncentral chi2 <= (R/sigma)^2): the smoothed class changes where it crosses 1/2.
    radius, dimension, alpha, runs = 1.4, 4, 0.02, 300
    smoothed = SmoothedClassifier(Ball(radius).eval(), SIGMA, 2)

    def probability(distance):
        return stats.ncx2.cdf((radius / SIGMA) ** 2, dimension, (distance / SIGMA) ** 2)

    low, high = 0.0, 3.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) > 0.5 else (low, middle)
    start = 0.2
    exact = low - start  # outward along the ray is the worst direction
    x = point(start, dimension).repeat(runs, 1)
    certificate = smoothed.certify(x, n0=40, n=400, alpha=alpha, batch_size=400)
    assert (certificate.prediction != 0).all()
    assert (certificate.prediction == 1).double().mean() > 0.95
    p = probability(start)
    assert certificate.counts[:, 1].double().mean() / 400 == pytest.approx(p, abs=0.01)
    certifiable = SIGMA * special.ndtri(p)  # what Cohen's theorem gives with p itself
    assert certifiable < exact
    assert int((certificate.radius > certifiable).sum()) <= stats.binom.isf(1e-4, runs, alpha)
    assert int((certificate.radius > exact).sum()) == 0


def test_ablation_counts_pixels_and_survives_every_change_of_them():
    # 9 bright pixels: enumerate the worst change of r pixels exactly, by a fresh large vote.
    x = torch.ones(1, 1, 3, 3)
    smoothed = SmoothedClassifier(Visible().eval(), 0.8, 2, norm="l0")
    certificate = smoothed.certify(x, n0=50, n=20_000)
    radius = int(certificate.radius)
    assert radius >= 1
    assert certificate.radius.item() == ablation_radius(certificate.p_lower, 0.2).item()
    for changed in range(radius + 1):
        attacked = x.clone()
        attacked.flatten()[:changed] = 0.1
        votes = smoothed.certify(attacked, n0=50, n=20_000, seed=1).counts[0]
        assert votes.argmax() == certificate.prediction.item()
    low = SmoothedClassifier(Visible().eval(), 0.05, 2, norm="l0").certify(x, n=200)
    assert low.prediction.item() == 1  # certain of the class, but of no pixel
    assert low.radius.item() == 0.0


def test_channels_of_a_pixel_are_hidden_together():
    seen = []

    class Watch(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.flatten(1)[:, :2]

    SmoothedClassifier(Watch().eval(), 0.5, 2, norm="l0").certify(torch.ones(1, 3, 4, 4), n=20)
    x = torch.cat(seen)
    assert torch.equal(x[:, 0], x[:, 2])
    assert x.unique().tolist() == [0.0, 1.0]


def test_grid_sees_rounded_noise_and_certifies_integer_images():
    seen = []

    class Watch(nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.stack([0.4 - x.flatten(1).mean(1), x.flatten(1).mean(1) - 0.4], 1)

    x = torch.randint(100, 256, (2, 1, 5, 5), dtype=torch.uint8)
    smoothed = SmoothedClassifier(Watch().eval(), 0.25, 2, grid=255)
    certificate = smoothed.certify(x, n0=10, n=300, seed=3)
    assert certificate.prediction.tolist() == [1, 1]
    rows = torch.cat(seen)
    steps = (rows * 255).round()
    assert torch.equal(steps / 255, rows)
    expected = grid_samples(x, 0.25, 310, seed=3)
    assert torch.equal(steps[:10].to(torch.int16), expected[0, :10])
    assert "rounded correctly" in certificate.assumption
    table = smoothed.certify_at(x, [0.1, 0.3], budget=500)
    assert (table.radius > 0).all()
    # The float twin differs from the grid by rounding alone, to the same noise.
    floats = gaussian_samples(x.float() / 255, 0.25, 10, seed=3)
    assert (floats[0].flatten() - rows[:10].flatten()).abs().max() <= 0.5 / 255 + 1e-4


def test_forward_on_a_grid_is_differentiable_for_floats_and_takes_integers():
    smoothed = SmoothedClassifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), 0.25, 3, grid=255)
    x = torch.rand(2, 1, 2, 2, requires_grad=True)
    smoothed(x, n=3, seed=1)[:, 0].sum().backward()
    assert x.grad.abs().sum() > 0
    assert smoothed(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), n=3, seed=1).shape == (2, 3)


@pytest.mark.parametrize(
    ("norm", "noise", "grid"),
    [("l2", None, None), ("l1", "uniform", None), ("l1", "laplace", None), ("l0", None, None)],
)
def test_forward_and_tables_work_in_every_norm(norm, noise, grid):
    torch.manual_seed(1)
    base = nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).eval()
    sigma = 0.9 if norm == "l0" else 0.4
    smoothed = SmoothedClassifier(base, sigma, 3, norm=norm, noise=noise, grid=grid)
    x = torch.rand(2, 1, 3, 3, requires_grad=True)
    smoothed(x, n=4, seed=0)[:, 0].sum().backward()
    assert x.grad.abs().sum() > 0
    x = x.detach()
    radii = [0.0, 1.0] if norm == "l0" else [0.01, 0.1]
    whole = smoothed.certify_at(x, radii, budget=400, seed=1)
    alone = smoothed.certify_at(x[1:], radii, budget=400, seed=1, first_index=1, batch_size=7)
    assert whole.norm == norm
    assert torch.equal(alone.successes[0], whole.successes[1])
    planned = smoothed.certify(x, n0=20, n=500, planned=True)
    assert torch.equal(planned.samples, planned.counts.sum(1) + planned.selection_counts.sum(1))
    assert len(smoothed.predict(x, n=50)) == 2


def test_runner_up_certifies_a_class_without_a_majority():
    class Thirds(nn.Module):
        """Class 0 in 45%, nine others in 6% each, whatever the input."""

        def forward(self, x):
            u = special.ndtr(x[:, 0].double().numpy())
            index = torch.from_numpy(((u - 0.45) / (0.55 / 9)).clip(-1, 8.999)).floor().long() + 1
            return nn.functional.one_hot(index, 10).float()

    smoothed = SmoothedClassifier(Thirds().eval(), 1.0, 10)
    x = torch.zeros(1, 1)
    one = smoothed.certify(x, n0=200, n=5000)
    assert one.prediction.item() == -1
    both = smoothed.certify(x, n0=200, n=5000, runner_up=True)
    assert both.prediction.item() == 0
    exact = 0.5 * (special.ndtri(0.45) - special.ndtri(0.55 / 9))
    assert 0.8 * exact < both.radius.item() < exact


def test_autocast_and_packed_bases_are_certified_as_they_run():
    torch.manual_seed(2)
    base = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    x = torch.rand(2, 1, 8, 8)
    seen = []
    base.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    smoothed = SmoothedClassifier(base, 0.25, 10)
    with torch.autocast("cpu", torch.bfloat16):
        low = smoothed.certify(x, n0=10, n=200)
        table = smoothed.certify_at(x, 0.1, budget=200)
    assert set(seen) == {torch.bfloat16}
    assert low.counts.sum(1).tolist() == [200, 200]
    assert len(table) == 2
    packed = pyrobust.pack(base, bits=4, group_size=32).eval()
    certificate = SmoothedClassifier(packed, 0.25, 10).certify(x, n0=10, n=200)
    noisy = gaussian_samples(x, 0.25, 210, seed=0)[:, 10:]
    votes = packed(noisy.flatten(0, 1)).argmax(1).view(2, 200)
    expected = torch.stack([torch.bincount(row, minlength=10) for row in votes])
    assert torch.equal(certificate.counts, expected)


def test_needed_probabilities_refuse_radii_out_of_reach():
    for norm, radius in (("l1", 10.0), ("l0", 500)):
        smoothed = SmoothedClassifier(Threshold(0.0).eval(), SIGMA, 2, norm=norm)
        with pytest.raises(ValueError, match="radius must be one that this noise can certify"):
            smoothed.certify_at(point(0.1), radius, budget=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "linf"}, "norm must be one of l2, l1, l0; got 'linf'"),
        ({"norm": "l2", "kind": "laplace"}, "noise for norm l2 must be one of gaussian"),
        ({"norm": "l0", "sigma": 1.0}, "sigma must lie in the open interval"),
        ({"norm": "l1", "sigma": 0.0}, "sigma must be finite and positive"),
        ({"norm": "l1", "grid": 255}, "grid must be None for norm l1; got 255"),
        ({"norm": "l2", "grid": 0}, "grid must be at least 1"),
    ],
)
def test_bad_noise_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        noise_of("SmoothedClassifier", **{"sigma": 0.5, **options})


def test_integer_images_need_a_grid_and_a_grid_needs_integers():
    x = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    base = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    with pytest.raises(TypeError, match=r"keep them and give grid=255"):
        SmoothedClassifier(base, 0.5, 3).certify(x, n=5)
    for wrong in (x.float(), x.long()):
        with pytest.raises(TypeError, match="must be a uint8 tensor of grid steps with grid=255"):
            SmoothedClassifier(base, 0.5, 3, grid=255).certify_at(wrong, 0.1, budget=5)


@pytest.mark.parametrize(("norm", "noise"), [("l1", "uniform"), ("l1", "laplace")])
def test_an_adversary_at_the_boundary_is_certified_as_rarely_as_promised(norm, noise):
    # The radius of this base is the margin itself: certifying it there is the error.
    alpha, runs, margin = 0.1, 250, 0.2
    smoothed = SmoothedClassifier(Threshold(0.0).eval(), SIGMA, 2, norm=norm, noise=noise)
    x = point(margin).repeat(runs, 1)
    certificate = smoothed.certify_at(x, [margin], alpha, 120, n0=20, seed=5)
    false = int((certificate.radius >= margin).sum())
    assert float(certificate.errors[0]) <= alpha
    assert 0.4 * alpha * runs < false <= stats.binom.isf(1e-4, runs, alpha)
