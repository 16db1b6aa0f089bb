"""Confidence bounds and radii against exact arithmetic."""

from fractions import Fraction
from math import comb

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from pyrobust.certify import (
    class_bounds,
    clopper_pearson_lower,
    clopper_pearson_upper,
    empirical_bernstein_margin,
    gaussian_radius,
    hoeffding_lower,
    hoeffding_upper,
    randomised_lower,
    union_bound,
)


def tail(k, n, p):
    """P(at least k successes of n), exactly."""
    p = Fraction(p)
    return sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


def long_tail(k, n, p):
    """The same for large n in 40 digits; the terms fall from k on, as the mean lies below k."""
    p = mpmath.mpf(p)
    term = mpmath.binomial(n, k) * p**k * (1 - p) ** (n - k)
    total, ratio = term, p / (1 - p)
    for i in range(k, n):
        term *= ratio * (n - i) / (i + 1)
        total += term
        if term < total * mpmath.mpf(10) ** -30:
            break
    return total


def test_all_votes_give_the_closed_form():
    assert clopper_pearson_lower(100, 100, 0.001).item() == pytest.approx(0.001**0.01, rel=1e-9)
    assert clopper_pearson_upper(0, 100, 0.001).item() == pytest.approx(1 - 0.001**0.01, rel=1e-9)


@pytest.mark.parametrize("alpha", [0.3, 0.05, 0.001, 1e-9])
def test_lower_bound_is_sound_and_tight_in_exact_arithmetic(alpha):
    for n in (1, 2, 7, 40):
        bounds = clopper_pearson_lower(torch.arange(n + 1), n, alpha).tolist()
        assert bounds[0] == 0
        for k in range(1, n + 1):
            assert tail(k, n, bounds[k]) <= Fraction(alpha)
            assert tail(k, n, bounds[k] * (1 + 1e-8)) > Fraction(alpha) * (1 - Fraction(1, 10**6))


@pytest.mark.parametrize("n", [1000, 100_000])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_lower_bound_is_sound_for_many_votes(n, alpha):
    with mpmath.workdps(40):
        for k in (1, 5, n // 3, n // 2, n - 50, n - 1, n):
            bound = clopper_pearson_lower(k, n, alpha).item()
            exact = long_tail(k, n, bound)
            assert exact <= alpha
            assert exact >= alpha * (1 - 1e-4)


def test_upper_bound_mirrors_the_lower_one():
    k = torch.arange(41)
    mirrored = 1 - clopper_pearson_lower(40 - k, 40, 0.01)
    upper = clopper_pearson_upper(k, 40, 0.01)
    torch.testing.assert_close(upper, mirrored, rtol=1e-8, atol=1e-9)
    assert upper[-1] == 1
    for votes in range(40):
        assert 1 - tail(votes + 1, 40, upper[votes].item()) <= Fraction(0.01)


def test_hoeffding_is_symmetric_and_covers():
    assert hoeffding_lower(0.5, 100, 0.05).item() == pytest.approx(0.5 - (np.log(20) / 200) ** 0.5)
    total = hoeffding_lower(0.3, 10, 0.1, span=2.0) + hoeffding_upper(0.3, 10, 0.1, span=2.0)
    assert total.item() == pytest.approx(0.6)


@pytest.mark.parametrize("draw", ["coins", "uniform"])
def test_hoeffding_bounds_of_many_means_hold_together(draw):
    """2,000 repetitions of five means, each bounded on both sides at a tenth of alpha."""
    n, alpha, mean = 50, 0.1, 0.5
    shape = (2000, 5, n)
    values = torch.rand(shape, dtype=torch.float64)
    values = (values < mean).double() if draw == "coins" else values
    level = union_bound(alpha, 10)
    means = values.mean(2)
    wrong = (hoeffding_lower(means, n, level) > mean) | (hoeffding_upper(means, n, level) < mean)
    assert int(wrong.any(1).sum()) <= 0.1 * 2000 + 3 * (2000 * 0.09) ** 0.5
    # one side at the same level errs less than half as often as two at alpha
    loose = hoeffding_lower(means, n, 0.5) > mean
    assert float(loose.double().mean()) > (0.05 if draw == "coins" else 0.0)


def test_union_bound_never_exceeds_alpha():
    for count in range(1, 200):
        assert Fraction(union_bound(0.001, count)) * count <= Fraction(0.001)


def test_radius_is_rounded_down_from_the_exact_quantile():
    p = torch.rand(300, dtype=torch.float64)
    p = torch.cat([p, torch.tensor([1e-300, 1 - 1e-15, 0.5 + 1e-12], dtype=torch.float64)])
    radius = gaussian_radius(p, 0.25)
    with mpmath.workdps(60):
        for value, probability in zip(radius.tolist(), p.tolist(), strict=True):
            below = mpmath.ncdf(mpmath.mpf(value) / mpmath.mpf(0.25))
            above = mpmath.ncdf(mpmath.mpf(value + 1e-11 * abs(value) + 1e-15) / mpmath.mpf(0.25))
            assert below <= probability
            assert above >= probability


def test_radius_is_signed_and_keeps_the_limits():
    assert gaussian_radius(torch.tensor([0.0, 1.0]), 1.0).tolist() == [-np.inf, np.inf]
    assert gaussian_radius(0.2, 1.0).item() < 0
    assert gaussian_radius(1.0, 1.0, p_upper=1.0).item() == -np.inf


def test_two_class_radius_reduces_to_one_class():
    p = torch.tensor([0.6, 0.9], dtype=torch.float64)
    torch.testing.assert_close(gaussian_radius(p, 0.5, p_upper=1 - p), gaussian_radius(p, 0.5))


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, float("nan")])
def test_alpha_outside_the_open_unit_interval_is_refused(alpha):
    for call in (clopper_pearson_lower, clopper_pearson_upper, hoeffding_lower, hoeffding_upper):
        with pytest.raises(ValueError, match=r"alpha must lie in the open interval \(0, 1\)"):
            call(1, 2, alpha)
    with pytest.raises(ValueError, match="alpha"):
        union_bound(alpha, 2)


def test_bad_counts_and_probabilities_are_refused():
    with pytest.raises(ValueError, match=r"k must be an integer in \[0, n\]; got 3 of 2"):
        clopper_pearson_lower(3, 2, 0.1)
    for n in (0, 10.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"n must be at least 1, an integer; got {n:g}"):
            clopper_pearson_upper(0, n, 0.1)
    with pytest.raises(ValueError, match=r"p_lower must lie in \[0, 1\]"):
        gaussian_radius(torch.tensor([float("nan")]), 1.0)
    with pytest.raises(ValueError, match="sigma must be finite and positive; got 0"):
        gaussian_radius(0.9, 0)


@pytest.mark.parametrize(("p", "n", "alpha"), [(0.6, 7, 0.05), (0.97, 60, 0.01), (0.05, 9, 0.1)])
def test_randomised_bound_uses_nearly_all_of_alpha(p, n, alpha):
    shares = (np.arange(4000) + 0.5) / 4000
    k = np.arange(n + 1)[:, None]
    wrong = (randomised_lower(k, n, alpha, shares) > p).double().mean(1).numpy()
    error = float((stats.binom.pmf(k[:, 0], n, p) * wrong).sum())
    plain = (clopper_pearson_lower(k[:, 0], n, alpha) > p).numpy()
    assert stats.binom.pmf(k[:, 0], n, p)[plain].sum() < 0.9 * alpha
    step = float(stats.binom.pmf(k[:, 0], n, p).max()) / len(shares)  # of the grid of shares
    assert 0.94 * alpha < error <= alpha + step


def test_randomised_bound_lies_between_those_of_neighbouring_counts():
    k, n, alpha = (
        np.array([0, 1, 50, 99, 100, 99_990, 100_000]),
        np.array([100] * 5 + [10**5] * 2),
        0.001,
    )
    plain = clopper_pearson_lower(k, n, alpha)
    torch.testing.assert_close(randomised_lower(k, n, alpha, 1.0), plain, rtol=1e-8, atol=1e-13)
    shares = np.linspace(0, 1, 101)[1:, None]
    bounds = randomised_lower(k, n, alpha, shares)
    assert (bounds >= plain - 1e-9).all()
    assert (bounds.diff(dim=0) <= 0).all()
    assert (bounds < 1).all()
    above = clopper_pearson_lower(np.minimum(k + 1, n), n, alpha)
    assert (bounds[:, k < n] <= above[k < n] + 1e-9).all()
    # All succeed: p^n = alpha / uniform.
    missed = -np.expm1(np.log(alpha / shares[5:, 0]) / 100_000)
    np.testing.assert_allclose(1 - bounds[5:, -1].numpy(), missed, rtol=1e-8)
    assert torch.equal(bounds[0], bounds[4])  # shares up to 0.05 count as 0.05
    assert randomised_lower(0, 5, 0.1, 0.5) == 0
    assert randomised_lower(0, 5, 0.1, 0.0) > 0
    with pytest.raises(ValueError, match="uniform must lie in"):
        randomised_lower(1, 2, 0.1, 1.5)


def test_randomised_bound_proves_no_certainty_at_any_level():
    shares = np.linspace(0, 1, 101)
    for alpha in (0.04, 0.1, 0.4, 0.7, 0.99):
        counts = np.array([[1], [50]])
        bounds = randomised_lower(counts, counts, alpha, shares)
        assert float(bounds.max()) < 1
        assert bool((bounds >= clopper_pearson_lower(counts, counts, alpha) - 1e-9).all())


def test_a_radius_between_two_probabilities_is_never_positive_by_rounding():
    low = np.random.default_rng(0).uniform(1e-9, 1 - 1e-9, 200_000)
    radius = gaussian_radius(low, 1.0, p_upper=np.nextafter(low, 1))
    assert not bool((radius > 0).any())


def test_class_bounds_are_clopper_and_pearson_at_shared_levels():
    counts, top = torch.tensor([[700, 200, 90, 10], [3, 500, 400, 97]]), torch.tensor([0, 1])
    lower, upper = class_bounds(counts, top, 0.06)
    assert torch.equal(lower, clopper_pearson_lower([700, 500], 1000, 0.03))
    # half of alpha for the top class, a third of the other half for each other one
    assert torch.equal(upper, clopper_pearson_upper([200, 400], 1000, np.nextafter(0.03 / 3, 0)))
    none = class_bounds(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([2]), 0.1)
    assert [float(bound) for bound in none] == [0.0, 1.0]


@pytest.mark.parametrize(("values", "span"), [([0.0, 1.0, 0.5, 0.25], 1.0), ([0.3] * 9, 2.0)])
def test_bernstein_margin_is_the_formula_of_the_theorem(values, span):
    mpmath.mp.dps = 30
    n, alpha = len(values), 0.4
    mean = mpmath.fsum(values) / n
    variance = mpmath.fsum((mpmath.mpf(v) - mean) ** 2 for v in values) / (n - 1)
    log = mpmath.log(2 / mpmath.mpf(alpha))
    exact = mpmath.sqrt(2 * variance * log / n) + 7 * span * log / (3 * (n - 1))
    margin = empirical_bernstein_margin(torch.tensor(values).double(), alpha, span=span, dim=0)
    assert float(exact) <= float(margin) <= span or float(margin) == span < float(exact)
    assert float(margin) == pytest.approx(min(float(exact), span), rel=1e-9)
