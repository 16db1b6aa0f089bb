"""Mixture radii against exact flip distances; an estimated Lipschitz constant overclaims."""

import math
from fractions import Fraction

import pytest
import torch
from scipy import special

from pyrobust.certify import (
    gaussian_radius,
    lipschitz_radius,
    smoothed_lipschitz,
    smoothed_mixture_radius,
)


def phi(z):
    return torch.special.ndtr(torch.as_tensor(z, dtype=torch.float64))


@pytest.mark.parametrize("z", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.7, 0.85, 0.99])
def test_two_classes_with_an_adversarial_standard_part(z, alpha):
    # h_y = Phi(x / sigma) and g_y = 0: the mixture flips where alpha h_y = 1/2.
    flip = z - special.ndtri(1 / (2 * alpha))
    tight = float(smoothed_mixture_radius(phi(z), None, alpha, 1.0))
    scaled = float(smoothed_mixture_radius(phi(z), None, alpha, 1.0, bound="scaled"))
    assert scaled <= max(flip, 0.0)
    assert tight <= max(flip, 0.0)
    assert tight == pytest.approx(max(flip, 0.0), abs=1e-9)
    if (z, alpha) == (1.0, 0.85):
        assert round(scaled, 3) == 0.568


def test_weights_below_one_half_give_nothing_and_one_gives_plain_smoothing():
    p = torch.linspace(0.01, 0.9999, 200, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"below 1/2 certifies no radius.*; got 0.499"):
        assert not bool(smoothed_mixture_radius(p, None, 0.499, 0.5).any())
    assert not bool(smoothed_mixture_radius(p, None, 0.5, 0.5).any())  # needs h_y = 1, h_i = 0
    other = (1 - p) / 2
    for bound in ("tight", "scaled"):
        radius = smoothed_mixture_radius(p, other, 1.0, 0.5, bound=bound)
        plain = gaussian_radius(p, 0.5, p_upper=other).clamp_min(0)
        torch.testing.assert_close(radius, plain, atol=1e-9, rtol=0)
        assert bool((radius <= plain + 1e-15).all())


def test_the_tight_radius_is_never_below_the_published_one():
    p = torch.rand(5000, dtype=torch.float64)
    other = (1 - p) * torch.rand(5000, dtype=torch.float64)
    alpha = 0.5 + 0.5 * torch.rand(5000, dtype=torch.float64)
    tight = smoothed_mixture_radius(p, other, alpha, 0.3)
    scaled = smoothed_mixture_radius(p, other, alpha, 0.3, bound="scaled")
    assert bool((tight >= scaled - 1e-9).all())
    assert float((tight - scaled).max()) > 0.1


def test_no_point_inside_flips_4000_random_three_class_mixtures():
    sigma, count = 0.5, 4000
    start = torch.randn(count, dtype=torch.float64)
    cuts = torch.randn(count, 2, dtype=torch.float64).sort(1).values
    alpha = 0.5 + 0.5 * torch.rand(count, dtype=torch.float64)
    below = phi((cuts - start[:, None]) / sigma)
    shares = torch.stack([below[:, 0], below[:, 1] - below[:, 0], 1 - below[:, 1]], 1)
    top = shares.topk(2, 1)
    radius = smoothed_mixture_radius(top.values[:, 0], top.values[:, 1], alpha, sigma)
    assert int((radius > 0).sum()) > 500
    steps = torch.linspace(-1, 1, 401, dtype=torch.float64)
    moved = start[:, None] + radius[:, None] * steps
    below = phi((cuts[:, None] - moved[..., None]) / sigma)
    inside = torch.stack([below[..., 0], below[..., 1] - below[..., 0], 1 - below[..., 1]], -1)
    y = top.indices[:, :1]
    own = inside.gather(2, y[:, None].expand(-1, 401, 1))[..., 0]
    others = inside.scatter(2, y[:, None].expand(-1, 401, 1), -1.0).amax(2)
    # The standard part gives everything to the strongest other class.
    lead = alpha[:, None] * (own - others) - (1 - alpha[:, None])
    # 1e-9: shares of 1e-8 are known here to 1e-8 of themselves only
    assert bool((lead[radius > 0] >= -1e-9).all())


def test_the_lipschitz_radius_is_sound_with_the_constant_of_smoothing():
    sigma = 0.7
    slope = smoothed_lipschitz(sigma)
    assert slope == pytest.approx(1 / (sigma * math.sqrt(2 * math.pi)))
    z = torch.linspace(0.0, 3.0, 2000, dtype=torch.float64)
    h = torch.stack([phi(z), phi(-z)], 1)
    y = torch.zeros(len(z), dtype=torch.int64)
    for alpha in (0.6, 0.85, 1.0):
        radius = lipschitz_radius(h, alpha, slope, y)
        flip = sigma * (z - special.ndtri(1 / (2 * alpha))).clamp_min(0)
        assert bool((radius <= flip + 1e-12).all())
        assert float(radius.max()) > 0
        per_class = lipschitz_radius(h, alpha, torch.tensor([slope, 2 * slope]), y)
        assert bool((per_class <= radius).all())
    with pytest.warns(UserWarning, match="lipschitz_radius: a weight below 1/2"):
        assert not bool(lipschitz_radius(h, 0.4, slope, y).any())


def test_a_lipschitz_constant_estimated_from_samples_overclaims():
    # Slopes between test points, as public code estimates the constant: the steep part lies
    # between the classes, where no test point is.
    sigma, alpha = 0.5, 0.85
    x = torch.cat([torch.linspace(0.9, 2.0, 300), torch.linspace(-2.0, -0.9, 300)]).double()
    h = torch.stack([phi(x / sigma), phi(-x / sigma)], 1)
    near = (x[1:] - x[:-1]).abs() < 0.1
    estimate = float(((h[1:, 0] - h[:-1, 0]) / (x[1:] - x[:-1])).abs()[near].max())
    y = (x < 0).long()
    flip = (x.abs() - sigma * special.ndtri(1 / (2 * alpha))).clamp_min(0)
    broken = lipschitz_radius(h, alpha, estimate, y) > flip
    assert float(broken.double().mean()) > 0.5
    sound = lipschitz_radius(h, alpha, smoothed_lipschitz(sigma), y)
    assert not bool((sound > flip).any())


def test_bad_input_is_refused():
    h, y = torch.tensor([[0.9, 0.1]]), torch.tensor([0])
    for call, message in [
        (lambda: lipschitz_radius(h * 2, 0.8, 1.0, y), "probabilities"),
        (lambda: lipschitz_radius(h, 1.2, 1.0, y), "alpha"),
        (lambda: lipschitz_radius(h, 0.8, -1.0, y), "lipschitz"),
        (lambda: lipschitz_radius(h, 0.8, math.nan, y), "lipschitz"),
        (lambda: lipschitz_radius(h, 0.8, 1.0, y[:0]), "y must have shape"),
        (lambda: smoothed_mixture_radius(1.1, None, 0.8, 0.5), "p_lower_top"),
        (lambda: smoothed_mixture_radius(0.9, -0.1, 0.8, 0.5), "p_upper_second"),
        (lambda: smoothed_mixture_radius(0.9, None, -0.1, 0.5), "alpha"),
        (lambda: smoothed_mixture_radius(0.9, None, 0.8, 0.0), "sigma"),
        (lambda: smoothed_mixture_radius(0.9, None, 0.8, 1.0, bound="loose"), "bound"),
        (lambda: smoothed_lipschitz(0.0), "sigma"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_no_radius_comes_from_rounding():
    weight, own = torch.rand(2, 4000, dtype=torch.float64, generator=seeded(2)) / 2 + 0.5
    other = own - (1 - weight) / weight
    exact = [
        Fraction(a) * (Fraction(y) - Fraction(i)) + Fraction(a) - 1
        for a, y, i in zip(weight.tolist(), own.tolist(), other.tolist(), strict=True)
    ]
    lost = (other >= 0) & (torch.tensor([margin <= 0 for margin in exact]))
    weight, own, other = weight[lost], own[lost], other[lost]
    assert len(own) > 500
    h, label = torch.stack([own, other], 1), torch.zeros(len(own), dtype=torch.int64)
    assert not bool((lipschitz_radius(h, weight, 0.0, label) > 0).any())
    for bound in ("tight", "scaled"):
        assert not bool((smoothed_mixture_radius(own, other, weight, 1.0, bound=bound) > 0).any())
    # numbers that are no tensors are not rounded to float32 either
    number = smoothed_mixture_radius(0.7, other[0].item(), 0.9, 1.0)
    assert number == smoothed_mixture_radius(0.7, other[0], 0.9, 1.0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)
