"""GREAT score: identities, calibration, the black-box path, and why it is no certificate."""

import math

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust.certify import empirical_bernstein_margin
from pyrobust.data import ClassGaussian, draw_labelled, load_digits
from pyrobust.evaluate import (
    calibrate_great_score,
    great_sample_size,
    great_score,
    great_score_from_logits,
    merge_great_scores,
    squash,
)
from pyrobust.evaluate.confidence_margin import GREAT_SCORE_MAX

TWO = torch.tensor([[1.3, -0.4], [0.2, 0.9]], dtype=torch.float64)


def test_two_classes_by_hand():
    score = great_score_from_logits(TWO, torch.tensor([0, 0]))
    expected = math.sqrt(math.pi / 2) * float(torch.sigmoid(TWO[0, 0]) - torch.sigmoid(TWO[0, 1]))
    assert float(score.local[0]) == pytest.approx(expected, abs=1e-12)
    assert float(score.local[1]) == 0.0  # wrong: counted as 0, not dropped
    assert score.value == pytest.approx(expected / 2, abs=1e-12)
    assert score.accuracy == 0.5
    assert score.certified is False
    assert "not a certificate" in score.summary()
    assert score.to_dict()["local"] == score.local.tolist()


def test_extremes():
    wrong = great_score_from_logits(torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([0]))
    assert wrong.value == 0.0
    sure = great_score_from_logits(
        torch.tensor([[500.0, 0.0, 0.0]]), torch.tensor([0]), activation="softmax"
    )
    assert sure.value == pytest.approx(GREAT_SCORE_MAX, abs=1e-6)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "sigmoid_softmax", "softmax_sigmoid"])
def test_squashings_by_their_formulas(activation):
    z, t = torch.randn(5, 4, dtype=torch.float64), 0.7
    formula = {
        "sigmoid": 1 / (1 + torch.exp(-z / t)),
        "softmax": torch.exp(z / t) / torch.exp(z / t).sum(-1, keepdim=True),
        "sigmoid_softmax": torch.softmax(1 / (1 + torch.exp(-z)) / t, -1),
        "softmax_sigmoid": 1 / (1 + torch.exp(-torch.softmax(z, -1) / t)),
    }[activation]
    torch.testing.assert_close(squash(z, activation, t), formula, rtol=1e-12, atol=1e-14)


def test_a_constant_added_to_all_logits():
    logits, labels = torch.randn(50, 5, dtype=torch.float64), torch.arange(50) % 5
    scores = {
        name: [
            great_score_from_logits(logits + shift, labels, activation=name).value
            for shift in (0.0, 3.0)
        ]
        for name in ("softmax", "sigmoid")
    }
    assert scores["softmax"][0] == pytest.approx(scores["softmax"][1], abs=1e-6)
    assert abs(scores["sigmoid"][0] - scores["sigmoid"][1]) > 1e-3


def test_batch_size_and_order_change_nothing():
    model = nn.Linear(6, 3).eval()
    x, y = torch.randn(70, 6), torch.arange(70) % 3
    whole = great_score(model, x, y)
    parts = great_score(model, x, y, batch_size=7)
    order = torch.randperm(70)
    mixed = great_score(model, x[order], y[order])
    torch.testing.assert_close(parts.local, whole.local, rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed.local, whole.local[order], rtol=0, atol=1e-6)
    assert mixed.value == pytest.approx(whole.value, abs=1e-6)


def test_shards_merge_to_the_whole():
    logits, labels = torch.randn(31, 4), torch.arange(31) % 4
    whole = great_score_from_logits(logits, labels)
    parts = [great_score_from_logits(logits[s], labels[s]) for s in (slice(0, 9), slice(9, 31))]
    merged = merge_great_scores(parts)
    assert torch.equal(merged.local, whole.local)
    assert (merged.value, merged.ci, merged.n) == (whole.value, whole.ci, whole.n)
    assert merged.accuracy == pytest.approx(whole.accuracy)
    other = great_score_from_logits(logits, labels, temperature=2.0)
    with pytest.raises(ValueError, match="must share activation, temperature"):
        merge_great_scores([whole, other])
    with pytest.raises(ValueError, match="parts must not be empty"):
        merge_great_scores([])


def test_groups_average_to_the_whole():
    logits, labels = torch.randn(60, 4), torch.arange(60) % 4
    groups = torch.randint(0, 3, (60,))
    score = great_score_from_logits(logits, labels, groups=groups)
    weighted = sum(float((groups == g).sum()) * v for g, v in score.groups.items()) / 60
    assert weighted == pytest.approx(score.value, abs=1e-6)


def test_sample_size():
    assert great_sample_size(0.05, 0.05) == math.ceil(math.pi * math.log(40) / (4 * 0.0025)) == 1159
    for eps, delta in [(0.0, 0.1), (0.1, 0.0), (0.1, 1.0)]:
        with pytest.raises(ValueError, match="great_sample_size"):
            great_sample_size(eps, delta)


def test_interval_covers_and_the_sample_size_holds():
    """2,000 repetitions of n draws from a known distribution of local scores."""
    generator = torch.Generator().manual_seed(1)
    n = great_sample_size(0.1, 0.05)
    local = GREAT_SCORE_MAX * torch.rand(2000, n, generator=generator, dtype=torch.float64) ** 3
    mean, truth = local.mean(1), GREAT_SCORE_MAX / 4
    margin = empirical_bernstein_margin(local, 0.025, span=GREAT_SCORE_MAX, dim=1)
    tolerance = 3 * (0.05 * 0.95 / 2000) ** 0.5
    assert float(((mean - truth).abs() > margin).double().mean()) <= 0.05 + tolerance
    assert float(((mean - truth).abs() > 0.1).double().mean()) <= 0.05 + tolerance
    # it has power: the margin shrinks with the variance, below the distribution-free one
    calm = empirical_bernstein_margin(local * 0.01, 0.025, span=GREAT_SCORE_MAX, dim=1)
    assert float(calm.max()) < float(margin.min()) < 0.2


class Steep(nn.Module):
    """sigmoid(k w.x) as a two-class model: the boundary is where w.x = 0, whatever k."""

    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, x):
        score = self.k * x.flatten(1).sum(1) / x.flatten(1).shape[1] ** 0.5
        return torch.stack([score, -score], dim=1)


@pytest.mark.parametrize("k", [1.0, 10.0, 100.0, 1000.0])
def test_the_raw_score_is_no_distance(k):
    """Negative control: at k = 100 the score is more than ten times the mean true distance."""
    x = torch.randn(2000, 64) * 0.1
    distance = (x.sum(1) / 8).abs()
    labels = (x.sum(1) < 0).long()
    score = great_score(Steep(k).eval(), x, labels)
    assert 0.075 < float(distance.mean()) < 0.085
    assert not score.certified
    if k >= 100:
        assert score.value > 10 * float(distance.mean())


def _mlp(eps, x, y, epochs=30):
    """A small MLP trained against l2 PGD of radius eps."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(128):
            inputs = _attack(model, x[part], y[part], eps, 7) if eps > 0 else x[part]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), y[part]).backward()
            optimizer.step()
    return model.eval()


def _attack(model, x, y, eps, steps):
    delta = torch.zeros_like(x)
    for _ in range(steps):
        delta.requires_grad_(True)
        loss = nn.functional.cross_entropy(model(x + delta), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, delta)
        gradient = gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-12)
        delta = delta.detach() + 2.5 * eps / steps * gradient
        delta = delta * (eps / delta.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
        delta = (x + delta).clamp(0, 1) - x
    return (x + delta).detach()


def _distance(model, x, y):
    """Mean smallest radius of a ladder at which PGD succeeds; 0 where already wrong."""
    reach = torch.full((len(x),), 2.5)
    for eps in reversed([i * 0.1 for i in range(25)]):
        moved = _attack(model, x, y, eps, 20) if eps > 0 else x
        reach = torch.where(model(moved).argmax(1) != y, eps, reach)
    return float(reach.mean())


@pytest.fixture(scope="module")
def pool():
    digits = load_digits()
    x, y = digits.train_images, digits.train_labels
    samples, labels = draw_labelled(ClassGaussian(10).fit(x, y), 500, classes=10)
    flat = samples.flatten(1)
    models = [_mlp(eps, x.flatten(1), y) for eps in (0.0, 0.15, 0.3, 0.5, 0.75, 1.0, 1.5)]
    with torch.no_grad():
        logits = torch.stack([model(flat) for model in models])
    robust = [
        float((m(_attack(m, flat, labels, 0.5, 20)).argmax(1) == labels).float().mean())
        for m in models
    ]
    return models, flat, labels, logits, torch.tensor(robust)


@pytest.mark.slow
def test_calibration_ranks_the_pool_and_keeps_the_bound(pool):
    models, flat, labels, logits, robust = pool
    upper = torch.tensor([_distance(model, flat, labels) for model in models])
    grid = torch.arange(1, 201, dtype=torch.float64) * 0.01
    found = calibrate_great_score(logits, labels, robust, upper=upper, temperatures=grid)
    assert found.correlation >= 0.8
    assert bool((found.scores <= upper).all())
    for model, value in zip(models, found.scores, strict=True):
        again = great_score(model, flat, labels, temperature=found.temperature)
        assert again.value == pytest.approx(float(value), abs=1e-6)
    # plain softmax overstates an undefended model, and the violation is named
    with pytest.raises(ValueError, match="at every temperature a score exceeds its upper bound"):
        calibrate_great_score(
            logits, labels, robust, upper=upper, activation="softmax", temperatures=[1.0]
        )


def test_the_calibrator_rejects_temperatures_that_break_the_bound():
    torch.manual_seed(0)
    labels = torch.arange(40) % 3
    clean = nn.functional.one_hot(labels, 3).double()
    logits = torch.stack([s * clean + 0.1 * torch.randn(40, 3) for s in (1.0, 2.0, 4.0)])
    grid = [0.25, 0.5, 1.0, 2.0, 4.0]
    free = calibrate_great_score(logits, labels, [1, 2, 3], temperatures=grid)
    bounded = calibrate_great_score(logits, labels, [1, 2, 3], upper=[0.4] * 3, temperatures=grid)
    assert bool(free.feasible.all())
    assert 0 < int(bounded.feasible.sum()) < len(grid)
    assert bounded.temperature > free.temperature
    assert bool((bounded.scores <= 0.4).all())
    assert "Spearman" in bounded.summary()
    by_hand = [
        great_score_from_logits(m, labels, temperature=bounded.temperature).value for m in logits
    ]
    assert bounded.scores.tolist() == pytest.approx(by_hand, abs=1e-12)


def test_a_packed_model_is_scored():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    packed = pyrobust.pack(model, bits=8, group_size=32)
    x, y = torch.rand(20, 64), torch.arange(20) % 4
    plain, small = (great_score(m, x, y).value for m in (model, packed))
    assert small == pytest.approx(plain, abs=0.02)


def test_refusals():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\); got 3"):
        great_score_from_logits(logits, torch.tensor([0, 1, 3, 0]))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\); got -1"):
        great_score_from_logits(logits, torch.tensor([0, 1, -1, 0]))
    with pytest.raises(TypeError, match="labels must be an integer"):
        great_score_from_logits(logits, labels.float())
    with pytest.raises(ValueError, match="at least one sample"):
        great_score_from_logits(logits[:0], labels[:0])
    with pytest.raises(ValueError, match="must not be NaN; sample 2"):
        great_score_from_logits(logits.index_fill(0, torch.tensor([2]), torch.nan), labels)
    with pytest.raises(ValueError, match="temperature must be finite and positive"):
        great_score_from_logits(logits, labels, temperature=0.0)
    with pytest.raises(ValueError, match="activation must be one of sigmoid, softmax"):
        great_score_from_logits(logits, labels, activation="relu")
    with pytest.warns(UserWarning, match="sum to 1 like probabilities"):
        great_score_from_logits(torch.softmax(logits, -1), labels)
    with pytest.raises(ValueError, match="must be in evaluation mode"):
        great_score(nn.Sequential(nn.Dropout(), nn.Linear(2, 2)), torch.rand(1, 2), labels[:1])
    with pytest.raises(ValueError, match=r"temperatures must be finite and positive"):
        calibrate_great_score(logits[None].repeat(2, 1, 1), labels, [0, 1], temperatures=[0.0])
    with pytest.raises(ValueError, match="at least 2 models"):
        calibrate_great_score(logits[None], labels, [0])
    with pytest.raises(ValueError, match="reference must have shape"):
        calibrate_great_score(logits[None].repeat(2, 1, 1), labels, [0], temperatures=[1.0])
    with pytest.raises(ValueError, match="equal for all models"):
        calibrate_great_score(logits[None].repeat(2, 1, 1), labels, [0, 1], temperatures=[1.0])


def test_the_interval_is_two_sided_at_its_confidence():
    score = great_score_from_logits(
        torch.tensor([[2.0, 0.0]]).expand(500, 2),
        torch.zeros(500, dtype=torch.int64),
        confidence=0.9,
    )
    # no variance; each side errs with probability 0.05
    margin = 7 * GREAT_SCORE_MAX * math.log(2 / 0.05) / (3 * 499)
    assert score.ci == pytest.approx((score.value - margin, score.value + margin), rel=1e-9)
