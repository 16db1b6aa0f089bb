"""Radii in l1 and l0 against exact worst cases, and the probabilities that radii need."""

from fractions import Fraction
from math import comb

import mpmath
import numpy as np
import pytest
import torch

from pyrobust.certify import (
    ablation_radius,
    class_bounds,
    clopper_pearson_lower,
    gaussian_radius,
    laplace_radius,
    uniform_radius,
)
from pyrobust.certify.radii import ablation_needs, gaussian_needs, laplace_needs, uniform_needs

P = torch.linspace(0.501, 0.999, 60, dtype=torch.float64)
RADIUS = {
    "gaussian": (gaussian_radius, gaussian_needs, 0.3),
    "uniform": (uniform_radius, uniform_needs, 0.7),
    "laplace": (laplace_radius, laplace_needs, 0.4),
}


def test_uniform_radius_is_where_the_worst_classifier_ties():
    # The class {x < c} in one coordinate loses most by a shift to the right.
    half = Fraction(3, 4)
    for p in (Fraction(3, 5), Fraction(9, 10), Fraction(99, 100)):
        radius = Fraction(uniform_radius(float(p), float(half)).item())
        edge = -half + 2 * half * p
        assert (edge - radius + half) / (2 * half) >= Fraction(1, 2) - Fraction(1, 10**12)
        assert (edge - radius + half) / (2 * half) <= Fraction(1, 2) + Fraction(1, 10**9)


def test_laplace_radius_is_where_the_worst_classifier_ties():
    # The class {x < c}: after a shift by the radius its probability is one half.
    with mpmath.workdps(40):
        for p in (0.6, 0.9, 0.999):
            radius = mpmath.mpf(laplace_radius(p, 2.0).item())
            edge = -2 * mpmath.log(2 * (1 - mpmath.mpf(p)))
            shifted = edge - radius  # P(Laplace < edge - radius), at least one half
            assert shifted >= 0
            assert shifted < 1e-9


def test_ablation_radius_holds_for_the_worst_set_of_masks():
    # On 6 pixels: a classifier that answers the top class on any set of masks of probability >= p.
    # The adversary turns every mask that keeps a changed pixel: the loss is exactly 1 - (1-keep)^r.
    for keep in (0.1, 0.3):
        for r in range(5):
            lost = 1 - (1 - Fraction(keep)) ** r
            needed = Fraction(1, 2) + lost
            if needed >= 1:
                continue
            at, above = float(needed), float(needed) + 1e-9
            assert ablation_radius(at, keep).item() <= r - 1 or Fraction(at) > needed
            assert ablation_radius(above, keep).item() >= r
            masks = sum(  # exact probability that no changed pixel is kept
                comb(6 - r, k) * Fraction(keep) ** k * (1 - Fraction(keep)) ** (6 - k)
                for k in range(7 - r)
            )
            assert masks == 1 - lost


def test_ablation_radius_of_no_margin_certifies_nothing():
    values = ablation_radius(
        torch.tensor([0.0, 0.3, 0.5, 0.5 + 1e-9, 1.0], dtype=torch.float64), 0.2
    ).tolist()
    assert max(values[:3]) <= -1
    assert values[3] == 0
    assert values[4] == 3  # (1 - 0.2)^r > 1/2


@pytest.mark.parametrize("name", RADIUS)
def test_needed_probability_inverts_the_radius_from_above(name):
    radius, needs, scale = RADIUS[name]
    for r in (0.0, 0.1, 0.35, 0.6):
        needed = needs(r, scale)
        if needed < 1:
            assert radius(needed, scale).item() >= r - 1e-12
            assert radius(needed + 1e-10, scale).item() > r
            assert radius(needed - 1e-10, scale).item() < r


def test_needed_probability_for_pixels():
    for keep in (0.05, 0.3):
        for r in (0, 1, 2):
            needed = ablation_needs(r, keep)
            if needed >= 1:
                continue
            assert ablation_radius(needed + 1e-10, keep).item() >= r
            assert ablation_radius(needed - 1e-10, keep).item() < r


def test_needed_probability_of_an_unreachable_radius_is_one():
    assert uniform_needs(0.7, 0.7) == 1.0
    assert uniform_needs(2.0, 0.7) == 1.0
    assert ablation_needs(4, 0.2) == 1.0
    assert gaussian_needs(100.0, 1.0) == 1.0


@pytest.mark.parametrize("name", ["uniform", "laplace"])
def test_two_class_radius_reduces_to_one_class_and_is_signed(name):
    radius, _, scale = RADIUS[name]
    torch.testing.assert_close(radius(P, scale, p_upper=1 - P), radius(P, scale))
    assert (radius(1 - P, scale) < 0).all()
    assert (radius(P, scale).diff() > 0).all()
    assert (radius(P, scale, p_upper=(1 - P) / 2) > radius(P, scale)).all()
    assert radius(0.4, scale, p_upper=0.2).item() > 0


def test_laplace_ratio_counts_where_it_is_larger():
    expected = -np.log(1 - 0.2 + 0.01), np.log(0.2 / 0.01) / 2
    assert expected[1] > expected[0]
    assert laplace_radius(0.2, 1.0, p_upper=0.01).item() == pytest.approx(expected[1])
    assert laplace_radius(1.0, 1.0).item() == np.inf


def test_class_bounds_hold_jointly():
    # Exact coverage by enumeration of all counts of three classes.
    n, alpha = 12, 0.2
    for p in ((0.5, 0.3, 0.2), (0.8, 0.1, 0.1), (0.34, 0.33, 0.33)):
        wrong = 0.0
        for a in range(n + 1):
            for b in range(n + 1 - a):
                c = n - a - b
                mass = comb(n, a) * comb(n - a, b) * p[0] ** a * p[1] ** b * p[2] ** c
                low, high = class_bounds(torch.tensor([[a, b, c]]), torch.tensor([0]), alpha)
                wrong += mass * (low.item() > p[0] or high.item() < max(p[1:]))
        assert wrong <= alpha


def test_class_bounds_pick_the_runner_up():
    counts = torch.tensor([[40, 3, 7], [40, 0, 10]])
    lower, upper = class_bounds(counts, torch.tensor([0, 2]), 0.01)
    assert lower[0] == clopper_pearson_lower(40, 50, 0.005)
    assert lower[1] == clopper_pearson_lower(10, 50, 0.005)
    assert 0.14 < upper[0] < 1 - lower[0]
    assert upper[1] == pytest.approx(0.93, abs=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform_radius(1.5, 1.0), r"p_lower must lie in \[0, 1\]; got 1.5"),
        (lambda: laplace_radius(0.5, 1.0, p_upper=float("nan")), r"p_upper must lie in \[0, 1\]"),
        (lambda: uniform_radius(0.5, 0.0), "half_width must be finite and positive"),
        (lambda: laplace_radius(0.5, -1.0), "scale must be finite and positive"),
        (lambda: ablation_radius(0.5, 1.0), "keep must lie in the open interval"),
        (lambda: class_bounds(torch.ones(1, 1), torch.tensor([0]), 0.1), "classes must be at"),
        (lambda: class_bounds(torch.ones(1, 2), torch.tensor([0]), 1.0), "alpha must lie in"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_radii_never_exceed_the_exact_ones():
    draw = np.random.default_rng(0)
    for p, half in draw.uniform(0.5, 1, (500, 2)):
        exact = Fraction(half) * (2 * Fraction(p) - 1)
        assert Fraction(uniform_radius(p, half).item()) <= exact
    # the share that decides about r pixels, rounded either way
    for keep in draw.uniform(0.02, 0.3, 60):
        for r in range(1, 9):
            at = float(Fraction(3, 2) - (1 - Fraction(keep)) ** r)
            if at >= 1:
                break
            for p in (np.nextafter(at, 0), at, np.nextafter(at, 1)):
                margin = Fraction(p) - Fraction(1, 2)
                found = int(ablation_radius(p, keep).item())
                assert found < 0 or 1 - (1 - Fraction(keep)) ** found < margin


def test_needed_probabilities_are_no_lower_than_the_exact_ones():
    with mpmath.workdps(40):
        for radius, size in np.random.default_rng(1).uniform(0.01, 1, (200, 2)):
            z = mpmath.mpf(radius) / mpmath.mpf(size)
            assert mpmath.mpf(gaussian_needs(radius, size)) >= min(mpmath.ncdf(z), 1 - 2.0**-53)
            assert mpmath.mpf(laplace_needs(radius, size)) >= 1 - mpmath.exp(-z) / 2
            if radius < size:
                assert mpmath.mpf(uniform_needs(radius, size)) >= (1 + z) / 2
