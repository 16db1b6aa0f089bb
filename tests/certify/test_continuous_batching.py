"""Sequential certification with shared batches: SmoothedClassifier.certify_at."""

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import nn

from pyrobust.certify import SequentialDesign, continuous_batching, sequential_design
from pyrobust.certify.continuous_batching import decide_radii
from pyrobust.certify.noise import GaussianNoise
from pyrobust.nn import SmoothedClassifier
from pyrobust.ops import gaussian_samples

from ..scripted_votes import ScriptedVotes


class Halfspace(nn.Module):
    """Class 1 where the first coordinate is positive: an input's first coordinate is its radius."""

    def __init__(self):
        super().__init__()
        self.rows = []
        self.noisy = []

    def forward(self, x):
        self.rows.append(x.shape[0])
        self.noisy.append(x.clone())
        return torch.stack([torch.zeros_like(x[:, 0]), x[:, 0]], dim=1)


def margins(values):
    return torch.tensor(values)[:, None].repeat(1, 3) * torch.tensor([1.0, 0.0, 0.0])


@pytest.fixture
def smoothed():
    return SmoothedClassifier(Halfspace().eval(), sigma=1.0, num_classes=2)


def test_clear_inputs_are_decided_with_few_samples(smoothed):
    x = margins([3.0, 2.0, 0.8, 0.0, -3.0])
    certificate = smoothed.certify_at(x, 0.5, budget=20_000)
    assert certificate.prediction.tolist() == [1, 1, 1, -1, 0]
    assert certificate.radius.tolist() == [0.5, 0.5, 0.5, 0.0, 0.5]
    assert certificate.samples[0] < 200
    assert (certificate.errors <= 1e-3).all()


def test_decision_replays_from_the_noise_and_the_design(smoothed):
    x, budget = margins([1.0, 0.6, 0.4, 0.2]), 500
    certificate = smoothed.certify_at(x, 0.3, alpha=0.01, budget=budget, n0=20, seed=5)
    design = sequential_design(float(special.ndtr(0.3)) + 1e-15, 0.01, budget)
    for b in range(4):
        z = gaussian_samples(x[b : b + 1], 1.0, 20 + budget, seed=5, first_index=b)[0]
        votes = (z[:, 0] > 0).long()
        drawn = int(certificate.selection_counts[b].sum())
        label = int(votes[:drawn].sum() * 2 > drawn)
        hits = (votes[20:] == label).long().cumsum(0)
        for n, upper, lower in zip(design.looks, design.upper, design.lower, strict=True):
            count = int(hits[n - 1])
            if count >= upper or count <= lower:
                break
        assert int(certificate.prediction[b]) == (label if count >= upper else -1)
        assert int(certificate.trials[b]) == n
        assert int(certificate.successes[b]) == count


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_result_depends_on_no_batch(smoothed, batch_size):
    x = margins([3.0, 1.0, 0.7, 0.4, 0.1])
    radii = [0.0, 0.25, 0.5]
    whole = smoothed.certify_at(x, radii, budget=300)
    other = smoothed.certify_at(x, radii, budget=300, batch_size=batch_size)
    alone = smoothed.certify_at(x[3:4], radii, budget=300, first_index=3, batch_size=batch_size)
    for name in ("prediction", "radius", "successes", "trials", "selection_counts", "samples"):
        assert torch.equal(getattr(other, name), getattr(whole, name))
        assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[3])


def test_images_share_full_batches_and_no_sample_is_drawn_twice(smoothed):
    certificate = smoothed.certify_at(margins([0.9] * 30), 0.5, budget=300, batch_size=64)
    rows = smoothed.base.rows
    assert 0 <= sum(rows) - int(certificate.samples.sum()) <= 64  # drawn for looks that never came
    assert sum(size == 64 for size in rows) > 0.6 * len(rows)
    noisy = torch.cat(smoothed.base.noisy)
    assert noisy.unique(dim=0).shape == noisy.shape


def test_radii_are_certified_from_the_smallest_on(smoothed):
    x = margins([0.3, 0.9, 4.0])
    certificate = smoothed.certify_at(x, [0.0, 0.5, 1.0, 2.0], budget=20_000)
    assert certificate.radius.tolist() == [0.0, 0.5, 2.0]
    assert certificate.prediction.tolist() == [1, 1, 1]
    accuracy = certificate.certified_accuracy(torch.tensor([1, 1, 0]), [0.0, 0.5, 1.0])
    assert accuracy.tolist() == [pytest.approx(2 / 3), pytest.approx(1 / 3), 0.0]


@pytest.mark.parametrize("design", ["optimal", "spending"])
def test_inputs_at_the_boundary_are_rarely_certified(smoothed, design):
    alpha, runs = 0.05, 800
    x = margins([0.5] * runs)
    certificate = smoothed.certify_at(
        x, [0.25, 0.5, 0.75], alpha, 400, n0=10, design=design, seed=3
    )
    false = int((certificate.radius >= 0.5).sum())
    assert false <= stats.binom.isf(1e-4, runs, alpha)
    assert false > 0.5 * alpha * runs * float(certificate.errors[1] / alpha)


def test_summary_progress_and_empty_batch(smoothed, capsys):
    certificate = smoothed.certify_at(margins([3.0, 3.0]), 1.0, budget=100, progress=True)
    assert certificate.summary().startswith("2 of 2 certified, mean l2 radius 1")
    assert certificate.to_dict()["radii"] == [1.0]
    assert "2/2" in capsys.readouterr().err
    assert len(smoothed.certify_at(torch.zeros(0, 3), 1.0, budget=100)) == 0


@pytest.mark.parametrize("radius", [-0.1, [0.5, 0.5], [0.5, 0.25], [], float("inf"), float("nan")])
def test_bad_radii_are_refused(smoothed, radius):
    with pytest.raises(ValueError, match="radius must be a number >= 0 or increasing"):
        smoothed.certify_at(torch.zeros(1, 3), radius)


def test_other_bad_arguments_are_refused(smoothed):
    with pytest.raises(ValueError, match="budget must be at least 1"):
        smoothed.certify_at(torch.zeros(1, 3), 0.5, budget=0)
    with pytest.raises(ValueError, match="alpha must lie in the open interval"):
        smoothed.certify_at(torch.zeros(1, 3), 0.5, alpha=1.0)
    with pytest.raises(ValueError, match="must be one of optimal, spending, fixed"):
        smoothed.certify_at(torch.zeros(1, 3), 0.5, design="best")
    smoothed.base.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        smoothed.certify_at(torch.zeros(1, 3), 0.5)


def test_nan_logits_name_the_sample():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.where(x[:, :2] > 2.0, float("nan"), x[:, :2])

    broken = SmoothedClassifier(Broken().eval(), 1.0, 2)
    with pytest.raises(ValueError, match=r"NaN; it does for sample \d+ of image 7"):
        broken.certify_at(torch.zeros(1, 2), 0.1, first_index=7)


@pytest.mark.parametrize("radii", [0.5, [0.0, 0.25, 0.5]])
def test_samples_of_later_looks_fill_a_lone_images_batch_and_change_no_decision(
    smoothed, radii, monkeypatch
):
    x = margins([3.0, 0.8, 0.6, 0.2, -1.0])
    calls, decisions = [], []
    for least in (1, 64, 200):
        monkeypatch.setattr(continuous_batching, "_LEAST", least)
        smoothed.base.rows.clear()
        decisions.append(
            [smoothed.certify_at(x[b : b + 1], radii, budget=300, first_index=b) for b in range(5)]
        )
        calls.append(len(smoothed.base.rows))
    assert calls[0] > 3 * calls[1] > 3 * calls[2]
    for early in decisions[1:]:
        for one, other in zip(decisions[0], early, strict=True):
            for name in ("prediction", "radius", "successes", "trials", "selection_counts"):
                assert torch.equal(getattr(one, name), getattr(other, name))


def test_a_radius_counts_only_where_every_smaller_one_is_certified():
    looks = np.array([10])
    designs = [
        SequentialDesign(p, 0.1, 0.1, looks, np.array([needed]), np.array([needed - 1]))
        for p, needed in ((0.3, 5), (0.4, 3), (0.5, 4))
    ]
    for won, certified in ((4, 0), (5, 3), (2, 0)):
        base = ScriptedVotes([0] + [0] * won + [1] * (10 - won), 2).eval()
        (decision,) = decide_radii(
            base,
            torch.zeros(1, 2),
            GaussianNoise(0.5),
            designs,
            num_classes=2,
            n0=1,
            seed=0,
            batch_size=1,
        )
        assert (decision.trials, decision.successes) == (10, won)
        assert decision.certified == certified
