"""Dual smoothing: the radius is sound, tight for linear halves, and never the published ones."""

import math

import pytest
import torch
from scipy import special, stats
from torch import nn
from torch.nn import functional as F

from pyrobust.certify import (
    DualSmoothedClassifier,
    checkerboard_masks,
    clopper_pearson_lower,
    dual_radius,
    gaussian_radius,
    partition_masks,
)
from pyrobust.data import load_digits
from pyrobust.nn import PackedLinear, SmoothedClassifier
from pyrobust.ops import gaussian_samples
from pyrobust.train import fit, train_subclassifier
from pyrobust.train.loop import GaussianCrossEntropy

from ..scripted_votes import ScriptedVotes


class Halfspace(nn.Module):
    """Class 1 where ``w . x + b > 0`` on the flattened sub-image; records what it sees."""

    def __init__(self, w, b=0.0):
        super().__init__()
        self.register_buffer("w", w)
        self.b = b
        self.seen = []

    def forward(self, x):
        self.seen.append(x.flatten(1).clone())
        score = x.flatten(1) @ self.w + self.b
        return torch.stack([torch.zeros_like(score), score], dim=1)


def phi(z):
    return torch.special.ndtr(z)


def linear_dual(sigma=0.5, shift=(0.5, 0.2)):
    """Two half-spaces on two coordinates each; the vote shares at 0 are ``Phi(shift / sigma)``."""
    masks = torch.tensor([[True, True, False, False], [False, False, True, True]])
    w = torch.tensor([0.6, 0.8])
    halves = [Halfspace(w, b).eval() for b in shift]
    return DualSmoothedClassifier(*halves, sigma, 2, masks, reduce="compact").eval()


def test_radius_of_equal_halves_symmetry_and_equal_sigmas():
    p = torch.linspace(0.01, 0.999, 60, dtype=torch.float64)
    expected = math.sqrt(2) * 0.3 * special.ndtri(p.numpy())
    torch.testing.assert_close(dual_radius(p, p, 0.3), torch.from_numpy(expected))
    q = p.flip(0) * 0.7
    assert torch.equal(dual_radius(p, q, 0.3, 0.8), dual_radius(q, p, 0.8, 0.3))
    assert torch.equal(dual_radius(p, q, 0.3, 0.3), dual_radius(p, q, 0.3))
    torch.testing.assert_close(
        dual_radius(p, q, 0.4), (gaussian_radius(p, 0.4) + gaussian_radius(q, 0.4)) / 2**0.5
    )


def test_radius_is_signed_and_certain_halves_are_handled():
    assert dual_radius(0.7, 0.3, 1.0) <= 0
    assert dual_radius(0.7, 0.2, 1.0) < 0
    assert dual_radius(0.6, 0.5, 1.0) > 0
    assert dual_radius(0.0, 1.0, 1.0) == -math.inf
    assert dual_radius(1.0, 0.2, 1.0) == math.inf
    assert dual_radius(0.0, 0.9, 1.0) == -math.inf


def random_linear_pairs(count, dimension=6):
    """Shares, sigmas and weight vectors of halves whose sum favours class 1 at the origin."""
    z = torch.randn(4 * count, 2, dtype=torch.float64) * 1.5
    z = z[z.sum(1) > 0.05][:count]
    sigma = 0.1 + torch.rand(count, 2, dtype=torch.float64)
    w = F.normalize(torch.randn(count, 2, dimension, dtype=torch.float64), dim=-1)
    return z, sigma, w


def flips(z, sigma, w, radius, directions):
    """Whether the summed share of class 1 drops below 1 in one of the directions at ``radius``."""
    delta = radius[:, None, None, None] * directions  # (pairs, directions, 2, dimension)
    moved = z[:, None] + (delta * w[:, None]).sum(-1) / sigma[:, None]
    return (phi(moved).sum(-1) < 1).any(1)


@pytest.mark.parametrize("equal", [True, False])
def test_no_direction_inside_the_radius_flips_2000_linear_pairs(equal):
    z, sigma, w = random_linear_pairs(2000)
    sigma = sigma[:, :1].expand(-1, 2) if equal else sigma
    radius = dual_radius(phi(z[:, 0]), phi(z[:, 1]), sigma[:, 0], sigma[:, 1])
    assert (radius > 0).all()
    random = F.normalize(torch.randn(2000, 64, 12, dtype=torch.float64), dim=-1)
    # the plane of the two weight vectors holds the worst direction
    angle = torch.linspace(0, math.pi / 2, 101, dtype=torch.float64)
    plane = -torch.stack([angle.cos(), angle.sin()], 1)[None, :, :, None] * w[:, None]
    worst = -(w / sigma[..., None] / (sigma**-2.0).sum(1).sqrt()[:, None, None])[:, None]
    directions = torch.cat([random.view(2000, 64, 2, 6), plane, worst], dim=1)
    assert not flips(z, sigma, w, radius * (1 - 1e-12), directions).any()
    assert flips(z, sigma, w, radius * (1 + 1e-9), directions).all()  # tight


def test_published_radii_overclaim():
    z, sigma, w = random_linear_pairs(2000)
    sigma = sigma[:, :1].expand(-1, 2)
    half = (sigma * z).clamp(min=0)
    worst = -(w / 2**0.5)[:, None]
    quadrature = half.square().sum(1).sqrt()  # the CIFAR-10 script
    assert flips(z, sigma, w, quadrature, worst).double().mean() > 0.9
    clamped = half.sum(1) / 2**0.5  # the other scripts: a half below 1/2 counts as 0
    broken = flips(z, sigma, w, clamped * (1 - 1e-9), worst)
    assert torch.equal(broken, (z < 0).any(1))
    sound = dual_radius(phi(torch.tensor(1.5).double()), phi(torch.tensor(-1.0).double()), 1.0)
    assert round(sound.item(), 3) == 0.354
    assert round(1.5 / 2**0.5, 3) == 1.061


def test_without_the_union_bound_the_error_exceeds_alpha():
    # both halves at alpha instead of alpha / 2, and p so that a bound errs as often as it may
    alpha, n = 0.05, 60
    k = torch.arange(n + 1)
    full, half = (clopper_pearson_lower(k, n, a) for a in (alpha, alpha / 2))
    errors = []
    for bounds in (full, half):
        p = float(full[50]) - 1e-9
        wrong = stats.binom.pmf(k.numpy(), n, p)[(bounds > p).numpy()].sum()
        errors.append(1 - (1 - wrong) ** 2)  # the halves vote independently
    assert errors[0] > 1.5 * alpha
    assert errors[1] <= alpha


def test_counts_scaled_to_more_samples_are_wrong_about_half_of_the_time():
    # One published script multiplies the counts of n samples by 100,000 / n before the bound.
    alpha, n, scale, p = 0.001, 100, 1000, 0.8
    k = torch.arange(n + 1)
    mass = stats.binom.pmf(k.numpy(), n, p)
    errors = [
        mass[(clopper_pearson_lower(k * times, n * times, alpha) > p).numpy()].sum()
        for times in (1, scale)
    ]
    assert errors[0] <= alpha
    assert errors[1] > 0.3


def test_linear_classifier_split_evenly_gives_the_radius_of_plain_smoothing():
    z = torch.linspace(0.01, 5.0, 200, dtype=torch.float64)
    each = phi(z / 2**0.5)
    difference = dual_radius(each, each, 0.25) - gaussian_radius(phi(z), 0.25)
    assert difference.abs().max() < 1e-9


def test_limit_of_the_radius_at_unanimous_votes():
    n, alpha = 100_000, 0.001
    single = gaussian_radius(clopper_pearson_lower(n, n, alpha), 1.0)
    p = clopper_pearson_lower(n, n, alpha / 2)
    assert abs(single.item() - special.ndtri(alpha ** (1 / n))) < 1e-6
    expected = 2**0.5 * special.ndtri((alpha / 2) ** (1 / n))
    assert abs(dual_radius(p, p, 1.0).item() - expected) < 1e-6
    assert (round(single.item(), 2), round(expected, 2)) == (3.81, 5.36)
    assert dual_radius(p, p, 0.18) > gaussian_radius(clopper_pearson_lower(n, n, alpha), 0.25)


def test_bounds_of_the_halves_cover_jointly():
    alpha, n, runs, shift, sigma = 0.05, 100, 2000, (0.5, 0.2), 0.5
    dual = linear_dual(sigma, shift)
    certificate = dual.certify(torch.zeros(runs, 4), n0=25, n=n, alpha=alpha, batch_size=n, seed=3)
    p = [special.ndtr(s / sigma) for s in shift]
    wrong = (certificate.p_left > p[0]) | (certificate.p_right > p[1])
    chosen = certificate.selection_counts.sum(1).argmax(1) == 1
    assert chosen.float().mean() > 0.95
    assert int((wrong & chosen).sum()) <= stats.binom.isf(1e-4, runs, alpha)
    true = sum(shift) / 2**0.5
    right = certificate.prediction == 1
    assert int((certificate.radius[right] > true).sum()) <= stats.binom.isf(1e-4, runs, alpha)
    assert right.float().mean() > 0.9


def test_a_tie_of_the_halves_is_answered_no_more_often_than_alpha():
    runs, alpha = 2000, 0.05
    dual = linear_dual(0.5, (0.3, -0.3))  # the summed probabilities of both classes are 1
    answers = dual.predict(torch.zeros(runs, 4), n=40, alpha=alpha, batch_size=40, seed=8)
    assert int((answers != -1).sum()) <= stats.binom.isf(1e-4, runs, alpha)


@pytest.mark.parametrize(("won", "answer"), [(59, -1), (60, 0)])
def test_a_prediction_needs_the_lead_of_hoeffding_over_every_other_class(won, answer):
    # sqrt(4 n ln((K - 1) / alpha)) = 38.4 votes of both halves; 59 and 60 of 100 lead by 36 and 40
    masks = torch.tensor([[True, False], [False, True]])
    votes = [0] * won + [1] * (100 - won)
    halves = [ScriptedVotes(votes, 3).eval() for _ in range(2)]
    dual = DualSmoothedClassifier(*halves, 0.5, 3, masks, fill="zero").eval()
    assert dual.predict(torch.zeros(1, 2), n=100, alpha=0.05).item() == answer


def test_certificate_follows_from_its_counts():
    dual = linear_dual((0.5, 0.7), (0.3, 0.1))
    certificate = dual.certify(torch.zeros(3, 4), n0=20, n=300, alpha=0.01)
    assert certificate.counts.shape == certificate.selection_counts.shape == (3, 2, 2)
    assert certificate.counts.sum(2).unique().tolist() == [300]
    top = certificate.selection_counts.sum(1).argmax(1)
    for i in range(3):
        bounds = [
            clopper_pearson_lower(certificate.counts[i, h, top[i]], 300, 0.005) for h in (0, 1)
        ]
        assert bounds[0] <= certificate.p_left[i] + 1e-12
        radius = max(dual_radius(*bounds, 0.5, 0.7).item(), 0.0)
        assert abs(certificate.radius[i].item() - radius) < 1e-9
    assert certificate.samples.tolist() == [640] * 3
    assert certificate.certified
    assert "640" in str(certificate.to_dict()["samples"])


def test_each_half_sees_fresh_noise_on_its_own_coordinates_only():
    dual = linear_dual(1.0)
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    dual.certify(x, n0=4, n=9, batch_size=4, seed=7)
    left, right = (
        torch.cat(half.seen) - part
        for half, part in zip((dual.left, dual.right), x.view(2, 2), strict=True)
    )
    for noise in (left, right):
        assert noise.shape == (13, 2)
        assert noise.unique(dim=0).shape == noise.shape  # selection is not reused
    assert not torch.isin(left, right).any()
    drawn = gaussian_samples(x, 1.0, 13, seed=7)[0]  # one draw, split between the halves
    assert torch.equal(torch.cat(dual.left.seen), drawn[:, :2])
    assert torch.equal(torch.cat(dual.right.seen), drawn[:, 2:])


def test_nan_of_a_half_is_named():
    dual = linear_dual(1.0)
    dual.right.w = torch.tensor([0.6, math.nan])
    with pytest.raises(ValueError, match="the right one does for sample 0 of image 5"):
        dual.certify(torch.zeros(1, 4), n0=4, n=9, first_index=5)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_result_depends_on_no_split(batch_size):
    dual = linear_dual()
    x = torch.randn(3, 4) * 0.1
    whole = dual.certify(x, n0=10, n=150, seed=2)
    split = dual.certify(x, n0=10, n=150, seed=2, batch_size=batch_size)
    alone = dual.certify(x[2:], n0=10, n=150, seed=2, first_index=2)
    assert torch.equal(split.counts, whole.counts)
    assert torch.equal(split.radius, whole.radius)
    assert torch.equal(alone.counts[0], whole.counts[2])


def test_abstention_and_prediction():
    dual = linear_dual(0.5, (0.0, 0.0))
    x = torch.tensor([[0.0] * 4, [1.0] * 4, [-1.0] * 4])
    certificate = dual.certify(x, n0=10, n=200)
    assert certificate.prediction.tolist() == [-1, 1, 0]
    assert certificate.radius[0] == 0
    labels = torch.tensor([1, 1, 0])
    assert certificate.certified_accuracy(labels, 0.0).item() == pytest.approx(2 / 3)
    assert dual.predict(x, n=400).tolist() == [-1, 1, 0]
    tied = dual.predict(torch.zeros(500, 4), n=100, alpha=0.05, batch_size=100)
    assert int((tied >= 0).sum()) <= stats.binom.isf(1e-4, 500, 0.1)


def test_probabilities_are_differentiable_and_seeded():
    dual = linear_dual()
    x = torch.zeros(2, 4, requires_grad=True)
    out = dual(x, n=8, seed=1)
    torch.testing.assert_close(out.sum(1), torch.ones(2))
    out[:, 1].sum().backward()
    assert (x.grad != 0).all()
    assert torch.equal(dual(x, n=8, seed=1), out)


def test_packed_halves_are_certified():
    masks = checkerboard_masks((1, 4, 4))
    halves = [nn.Sequential(nn.Flatten(), PackedLinear(16, 3, group_size=8)).eval() for _ in "lr"]
    dual = DualSmoothedClassifier(*halves, 0.25, 3, masks).eval()
    certificate = dual.certify(torch.rand(2, 1, 4, 4), n0=10, n=50)
    assert certificate.counts.sum(2).tolist() == [[50, 50]] * 2


def train_digit_halves(sigma, *, hidden=128, scale=1):
    """A noisy network fine-tuned on each half of the digits."""
    digits = load_digits()
    images = F.interpolate(digits.train_images, scale_factor=scale, mode="bilinear")
    torch.manual_seed(0)
    size = images[0].numel()
    masks = checkerboard_masks(tuple(images.shape[1:]))
    halves = []
    for mask in masks:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        )
        fit(
            model,
            images,
            digits.train_labels,
            objective=GaussianCrossEntropy(sigma, torch.Generator().manual_seed(0)),
            epochs=8,
            generator=torch.Generator().manual_seed(0),
        )
        train_subclassifier(
            model,
            images,
            digits.train_labels,
            mask=mask,
            sigma=sigma,
            fill="bilinear",
            epochs=6,
            generator=torch.Generator().manual_seed(1),
        )
        halves.append(model)
    return DualSmoothedClassifier(*halves, sigma, 10, masks, fill="bilinear").eval()


def test_attack_inside_the_radius_finds_no_flip_on_digits():
    digits, sigma = load_digits(), 0.25
    dual = train_digit_halves(sigma)
    x, labels = digits.test_images[:25], digits.test_labels[:25]
    certificate = dual.certify(x, n=10_000, batch_size=2000)
    kept = certificate.prediction == labels
    assert int(kept.sum()) >= 20
    x, labels = x[kept][:20], labels[kept][:20]
    radius = certificate.radius[kept][:20].float()[:, None]
    delta = torch.zeros_like(x).flatten(1)
    for step in range(25):
        delta.requires_grad_()
        loss = F.nll_loss(dual(x + delta.view_as(x), n=32, seed=step).log(), labels)
        (grad,) = torch.autograd.grad(loss, delta)
        delta = delta.detach() + radius / 8 * F.normalize(grad, dim=1)
        delta = delta * (radius * 0.999 / delta.norm(dim=1, keepdim=True).clamp(min=1e-9)).clamp(
            max=1
        )
    assert (delta.norm(dim=1, keepdim=True) > 0.9 * radius).all()
    attacked = x + delta.view_as(x)
    votes = dual.predict(attacked, n=2000, batch_size=2000, seed=99)
    assert ((votes == labels) | (votes == -1)).all()


@pytest.mark.slow
def test_average_radius_on_enlarged_digits_is_that_of_plain_smoothing():
    digits = load_digits()
    images, test = (
        F.interpolate(part, scale_factor=4, mode="bilinear")
        for part in (digits.train_images, digits.test_images[:100])
    )
    torch.manual_seed(0)
    layers = [nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10)]
    base = fit(
        nn.Sequential(nn.Flatten(), *layers),
        images,
        digits.train_labels,
        objective=GaussianCrossEntropy(0.25, torch.Generator().manual_seed(0)),
        epochs=14,
        generator=torch.Generator().manual_seed(0),
    )
    labels, average = digits.test_labels[:100], []
    for smoothed in (SmoothedClassifier(base, 0.25, 10), train_digit_halves(0.18, scale=4)):
        certificate = smoothed.certify(test, n=2000, batch_size=2000)
        right = certificate.prediction == labels
        average.append((certificate.radius * right).mean().item())
    assert average[1] >= average[0] - 0.02, average


def test_bad_arguments_are_refused():
    masks = checkerboard_masks((1, 2, 2))
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    overlap = masks.clone()
    overlap[1, 0, 0, 0] = True
    with pytest.raises(ValueError, match="1 coordinates are in both parts and 0 in none"):
        DualSmoothedClassifier(model, model, 0.5, 3, overlap)
    with pytest.raises(ValueError, match="0 coordinates are in both parts and 2 in none"):
        DualSmoothedClassifier(model, model, 0.5, 3, masks & masks[:1])
    with pytest.raises(TypeError, match="masks must be a bool tensor"):
        DualSmoothedClassifier(model, model, 0.5, 3, masks.float())
    for sigma in (0.0, (0.5, -1.0), math.nan):
        with pytest.raises(ValueError, match="sigma must be finite and positive"):
            DualSmoothedClassifier(model, model, sigma, 3, masks)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        dual_radius(1.2, 0.5, 1.0)
    with pytest.raises(ValueError, match="sigma must be finite and positive; got 0"):
        dual_radius(0.9, 0.5, 0.0)
    dual = DualSmoothedClassifier(model, model, 0.5, 3, masks)
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="evaluation mode"):
        dual.certify(x, n=5)
    dual.eval()
    for options, message in [
        ({"n": 0}, "n must be at least 1"),
        ({"n0": 0}, "n0 must be at least 1"),
        ({"alpha": 1.0}, r"alpha must lie in the open interval \(0, 1\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            dual.certify(x, **{"n": 5, **options})
    other = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"must return shape \(5, 3\)"):
        DualSmoothedClassifier(model, other, 0.5, 3, masks).eval().certify(x, n0=5, n=5)
    with pytest.raises(ValueError, match=r"x must have shape"):
        dual.certify(torch.zeros(1, 1, 2, 3), n=5)
    assert partition_masks((2, 2), scheme="columns").any()
