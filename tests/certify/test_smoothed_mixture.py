"""SmoothedMixture: coverage over thousands of runs, attacks, packed parts."""

import math

import pytest
import torch
from scipy import special, stats
from torch import nn

import pyrobust
from pyrobust.certify import (
    DualSmoothedClassifier,
    SmoothedMixture,
    smoothed_great_score,
    smoothed_mixture_radius,
)
from pyrobust.data import load_digits
from pyrobust.evaluate import pgd
from pyrobust.nn import SmoothedClassifier
from pyrobust.train import GaussianCrossEntropy, fit


class Halfspace(nn.Module):
    """Class 1 where the first coordinate is positive."""

    def forward(self, x):
        return torch.stack([torch.zeros_like(x[:, 0]), x[:, 0]], 1)


class Fixed(nn.Module):
    """The same probabilities everywhere."""

    def __init__(self, *shares):
        super().__init__()
        self.register_buffer("logits", torch.tensor(shares).log())

    def forward(self, x):
        return self.logits.expand(len(x), -1)


SIGMA = 0.5


def mixture(standard, alpha):
    return SmoothedMixture(standard, Halfspace(), SIGMA, 2, alpha).eval()


def test_radii_exceed_the_true_distance_no_more_often_than_alpha():
    shift, alpha, level, runs, n = 0.5, 0.85, 0.05, 2000, 120
    mixed = mixture(Fixed(0.3, 0.7), alpha)
    x = torch.full((runs, 1), shift)
    result = mixed.certify(x, n0=40, n=n, alpha=level, batch_size=n, seed=5)
    true = shift - SIGMA * special.ndtri(1 / (2 * alpha))
    wrong = ((result.radius > true) & (result.prediction == 1)) | (
        (result.radius > shift) & (result.prediction == 0)
    )
    assert int(wrong.sum()) <= stats.binom.isf(1e-4, runs, level)
    assert float((result.radius > 0).double().mean()) > 0.3
    # The vote shares themselves, as published code takes them, are wrong about half of the time.
    shares = result.counts[:, 1] / n
    assert float((smoothed_mixture_radius(shares, None, alpha, SIGMA) > true).double().mean()) > 0.3
    p = float(special.ndtr(shift / SIGMA))
    chosen = result.selection_counts[:, 1] * alpha / 40 + (1 - alpha) * 0.7 > 0.5
    missed = (result.p_lower > p) & chosen
    assert int(missed.sum()) <= stats.binom.isf(1e-4, runs, level)


def test_radii_of_an_adaptive_mixture_exceed_the_true_distance_no_more_often_than_alpha():
    # The weight depends on the input; inside a radius it may fall to the lowest one, and the
    # standard part may be wholly wrong there: that worst mixture flips at the true distance.
    shift, low, level, runs, n = 0.5, 0.8, 0.05, 2000, 120

    def weights(x):
        return low + (0.99 - low) * (x[:, 0] >= shift).float()

    mixed = SmoothedMixture(
        Fixed(0.3, 0.7), Halfspace(), SIGMA, 2, weights, alpha_range=(low, 0.99)
    ).eval()
    x = torch.full((runs, 1), shift)
    result = mixed.certify(x, n0=40, n=n, alpha=level, batch_size=n, seed=6)
    true = shift - SIGMA * special.ndtri(1 / (2 * low))
    wrong = ((result.radius > true) & (result.prediction == 1)) | (
        (result.radius > shift) & (result.prediction == 0)
    )
    assert int(wrong.sum()) <= stats.binom.isf(1e-4, runs, level)
    assert float((result.radius > 0).double().mean()) > 0.3


def test_a_tie_is_answered_no_more_often_than_alpha():
    # alpha h_1 + (1 - alpha) g_1 = 1/2 exactly: every certain class is an error half of the time.
    level, runs, alpha = 0.05, 2000, 0.8
    share = 0.25
    p = (0.5 - (1 - alpha) * share) / alpha
    x = torch.full((runs, 1), float(SIGMA * special.ndtri(p)))
    mixed = mixture(Fixed(1 - share, share), alpha)
    result = mixed.certify(x, n0=20, n=100, alpha=level, batch_size=120, seed=9)
    assert int((result.prediction != -1).sum()) <= stats.binom.isf(1e-4, runs, level)
    answered = mixed.predict(x, n=100, alpha=level, batch_size=100, seed=10)
    assert int((answered != -1).sum()) <= stats.binom.isf(1e-4, runs, level)


def test_full_weight_is_plain_smoothing():
    x = torch.linspace(-1, 1, 40)[:, None]
    mixed = mixture(Fixed(0.9, 0.1), 1.0).certify(x, n0=50, n=400, seed=3)
    plain = SmoothedClassifier(Halfspace(), SIGMA, 2).eval().certify(x, n0=50, n=400, seed=3)
    assert torch.equal(mixed.counts, plain.counts)
    assert torch.equal(mixed.prediction, plain.prediction)
    torch.testing.assert_close(mixed.radius, plain.radius, atol=1e-9, rtol=0)


def test_low_weights_certify_a_class_at_the_input_but_no_radius():
    with pytest.warns(UserWarning, match="below 1/2 certifies no radius"):
        result = mixture(Fixed(0.1, 0.9), 0.4).certify(torch.ones(5, 1), n=500)
    assert not bool(result.radius.any())
    assert "below 1/2 certifies no radius" in result.assumption
    assert "1/2" not in mixture(Fixed(0.1, 0.9), 0.5).certify(torch.ones(1, 1), n=5).assumption
    assert result.prediction.tolist() == [1] * 5
    with pytest.warns(UserWarning, match="got 0.4"):
        again = mixture(Fixed(0.5, 0.5), 0.4).certify(torch.zeros(5, 1), n=500)
    assert bool(again.abstained.all())


def test_results_follow_from_counts_and_do_not_depend_on_the_batch():
    mixed = mixture(Fixed(0.4, 0.6), 0.9)
    x = torch.tensor([[0.8], [-0.5], [0.02]])
    whole = mixed.certify(x, n0=30, n=700, alpha=0.01, batch_size=64)
    for i in range(3):
        one = mixed.certify(x[i : i + 1], n0=30, n=700, alpha=0.01, first_index=i)
        assert torch.equal(one.counts[0], whole.counts[i])
        assert torch.equal(one.radius[0], whole.radius[i])
    expected = smoothed_mixture_radius(whole.p_lower, None, 0.9, SIGMA)
    assert torch.equal(whole.radius, torch.where(whole.abstained, 0.0, expected))
    assert whole.samples.tolist() == [730] * 3


def test_the_lowest_weight_of_an_adaptive_mixture_counts():
    def weights(x):
        return torch.full((len(x),), 0.97)

    options = {"alpha_range": (0.8, 0.99)}
    adaptive = SmoothedMixture(Fixed(0.5, 0.5), Halfspace(), SIGMA, 2, weights, **options).eval()
    fixed = mixture(Fixed(0.5, 0.5), 0.8)
    x = torch.full((3, 1), 0.9)
    assert torch.equal(adaptive.certify(x, n=500).radius, fixed.certify(x, n=500).radius)
    outside = SmoothedMixture(
        Fixed(0.5, 0.5), Halfspace(), SIGMA, 2, lambda x: torch.zeros(len(x)), **options
    ).eval()
    with pytest.raises(ValueError, match=r"weights in \[0.8, 0.99\]"):
        outside.certify(x, n=10)


@pytest.fixture(scope="module")
def digits():
    torch.manual_seed(0)
    data = load_digits()
    models = []
    for sigma in (0.0, 0.25):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        objective = GaussianCrossEntropy(sigma, torch.Generator().manual_seed(0))
        models.append(
            fit(model, data.train_images, data.train_labels, objective=objective, epochs=10)
        )
    return data, *models


class AgainstBase(nn.Module):
    """Sure of the class after the base's: the standard part at its worst."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 30.0 * nn.functional.one_hot((self.base(x).argmax(1) + 1) % 10, 10).float()


@pytest.mark.parametrize("hostile", [False, True])
def test_no_attack_flips_a_certified_digit(digits, hostile):
    data, standard, base = digits
    standard = AgainstBase(base).eval() if hostile else standard
    mixed = SmoothedMixture(standard, base, 0.25, 10, 0.85).eval()
    x, y = data.test_images[:60], data.test_labels[:60]
    result = mixed.certify(x, n=2000, batch_size=2000)
    certain = (result.radius > 0.05) & (result.prediction == y)
    assert int(certain.sum()) >= 20
    x, y, radius = x[certain], y[certain], result.radius[certain].float()
    smooth = SmoothedClassifier(base, 0.25, 10).eval()

    def soft(points):  # what the mixture would answer with softmax instead of votes
        g, h = standard(points).softmax(1), smooth(points, n=16)
        return ((1 - 0.85) * g + 0.85 * h).log()

    points = pgd(
        soft, x, y, eps=radius * (1 - 1e-5), norm="l2", steps=50, clamp=None, objective="margin"
    )
    size = (points - x).flatten(1).norm(dim=1)
    assert float((size / radius).mean()) > 0.5  # the attack went to the border
    answers = mixed.predict(points, n=2000, batch_size=2000, seed=77)
    assert bool(((answers == y) | (answers == -1)).all())


def test_packed_parts_are_certified(digits):
    data, standard, base = digits
    packed = [pyrobust.pack(part, bits=4, group_size=16) for part in (standard, base)]
    mixed = SmoothedMixture(*packed, 0.25, 10, 0.85).eval()
    x, y = data.test_images[:20], data.test_labels[:20]
    result = mixed.certify(x, n=1000, batch_size=1000)
    assert float(result.certified_accuracy(y, 0.1)) > 0.5
    assert torch.equal(mixed.certify(x, n=1000, batch_size=1000).radius, result.radius)


def test_bad_input_is_refused():
    for options, message in [
        ({"alpha": 1.5}, "alpha"),
        ({"alpha": lambda x: x}, "alpha_range"),
        ({"sigma": 0.0}, "sigma"),
        ({"standard_scale": -1.0}, "standard_scale"),
        ({"num_classes": 1}, "num_classes"),
    ]:
        values = {"sigma": SIGMA, "num_classes": 2, "alpha": 0.8} | options
        with pytest.raises(ValueError, match=message):
            SmoothedMixture(Fixed(0.5, 0.5), Halfspace(), **values)
    mixed = mixture(Fixed(0.5, 0.5), 0.8)
    x = torch.zeros(1, 1)
    for options, message in [({"n": 0}, "n must"), ({"n0": 0}, "n0"), ({"alpha": 0.0}, "alpha")]:
        with pytest.raises(ValueError, match=message):
            mixed.certify(x, **{"n": 5, **options})
    with pytest.raises(ValueError, match="evaluation mode"):
        mixture(nn.Sequential(Fixed(0.5, 0.5)), 0.8).train().certify(x, n=5)
    with pytest.raises(ValueError, match="finite logits"):
        mixture(Fixed(math.nan, 0.5), 0.8).certify(x, n=5)
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        mixture(Fixed(0.2, 0.3, 0.5), 0.8).certify(x, n=5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed must be at least 0; got -1"),
        ({"first_index": 2**48}, ValueError, r"first_index \+ B must not exceed 2\*\*48"),
        ({"x": torch.zeros(1, 2, dtype=torch.float64)}, TypeError, "x must have dtype float32"),
    ],
)
def test_positions_and_types_are_refused_before_any_network_is_called(options, error, message):
    class Untouched(nn.Module):
        def forward(self, x):
            pytest.fail("a network was called")

    parts = Untouched().eval(), Untouched().eval()
    masks = torch.tensor([[True, False], [False, True]])
    mixture = SmoothedMixture(*parts, 0.25, 2).eval()
    dual = DualSmoothedClassifier(*parts, 0.25, 2, masks, fill="zero").eval()
    rest = {name: value for name, value in options.items() if name != "x"}
    x = options.get("x", torch.zeros(1, 2))
    label = torch.zeros(1, dtype=torch.int64)
    for call in (mixture.certify, mixture.predict, dual.certify, dual.predict):
        with pytest.raises(
            error, match=f"^(SmoothedMixture|Dual\\w+).(certify|predict): {message}"
        ):
            call(x, n=10, **rest)
    with pytest.raises(error, match=f"^smoothed_great_score: {message}"):
        smoothed_great_score(parts[0], x, label, sigma=0.25, n=10, **rest)
