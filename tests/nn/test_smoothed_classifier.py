"""The smoothed classifier on bases whose true probabilities are known."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import nn

from pyrobust.certify import clopper_pearson_lower, gaussian_radius, randomised_lower
from pyrobust.certify.voting import uniform_shares
from pyrobust.nn import SmoothedClassifier
from pyrobust.ops import gaussian_samples, uniform_samples

from ..scripted_votes import ScriptedVotes


class Halfspace(nn.Module):
    """Class 1 where ``w . x > 0``; the margin of an input is its true radius."""

    def __init__(self, dimension):
        super().__init__()
        w = torch.randn(dimension)
        self.register_buffer("w", w / w.norm())

    def forward(self, x):
        score = x.flatten(1) @ self.w
        return torch.stack([torch.zeros_like(score), score], dim=1)

    def inputs(self, margins):
        return torch.as_tensor(margins)[:, None] * self.w


class Shape(nn.Module):
    """Records the batches it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.clone())
        return x.flatten(1)[:, :3]


def convolutional():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)).eval()


def test_radius_of_a_halfspace_never_exceeds_its_margin_beyond_alpha():
    torch.manual_seed(0)
    base, sigma, alpha, runs = Halfspace(16).eval(), 0.5, 0.05, 2000
    smoothed = SmoothedClassifier(base, sigma, 2)
    margin = 0.3
    x = base.inputs([margin] * runs)
    certificate = smoothed.certify(x, n0=10, n=200, alpha=alpha, seed=1, batch_size=200)
    too_far = int((certificate.radius > margin).sum())
    # With k of n votes the bound exceeds p for a known set of k: the exact error is below alpha.
    p = special.ndtr(margin / sigma)
    bounds = clopper_pearson_lower(torch.arange(201), 200, alpha)
    exact = stats.binom.pmf(range(201), 200, p)[bounds.numpy() > p].sum()
    assert exact <= alpha
    assert too_far <= stats.binom.isf(1e-4, runs, alpha)
    assert abs(too_far - exact * runs) <= 5 * (runs * exact) ** 0.5
    assert (certificate.prediction[certificate.radius > 0] == 1).float().mean() > 0.99


def test_boundary_input_is_rarely_certified():
    base = Halfspace(4).eval()
    certificate = SmoothedClassifier(base, 1.0, 2).certify(
        base.inputs([0.0] * 2000), n0=10, n=100, alpha=0.05, batch_size=100
    )
    assert int((~certificate.abstained).sum()) <= stats.binom.isf(1e-4, 2000, 0.05)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_radius_of_a_linear_classifier_tends_to_its_distance(alpha):
    torch.manual_seed(0)
    linear, sigma, n = nn.Linear(9, 2).eval(), 0.25, 40_000
    x = torch.randn(12, 9) * 0.3
    w = (linear.weight[1] - linear.weight[0]).detach().double()
    b = (linear.bias[1] - linear.bias[0]).detach().double()
    distance = (x.double() @ w + b).abs() / w.norm()
    certificate = SmoothedClassifier(linear, sigma, 2).certify(
        x, n0=1000, n=n, alpha=alpha, batch_size=8000
    )
    votes = certificate.counts.amax(1)
    clear = (distance > 0.1) & (distance < 2.5 * sigma)
    assert int(clear.sum()) >= 5
    # pA is the textbook bound of Clopper and Pearson
    textbook = stats.beta.ppf(alpha, votes.numpy(), n - votes.numpy() + 1)
    torch.testing.assert_close(
        certificate.p_lower[clear], torch.from_numpy(textbook)[clear], atol=1e-9, rtol=0
    )
    # without the bound the radius is the distance to within the error of sampling
    p = torch.special.ndtr(distance / sigma)
    density = torch.exp(-((distance / sigma) ** 2) / 2) / math.sqrt(2 * math.pi)
    error = sigma * (p * (1 - p) / n).sqrt() / density
    plain = sigma * torch.special.ndtri(votes / n)
    assert bool(((plain - distance).abs() < 4 * error)[clear].all())
    # with it, it lies below by the width of the bound
    width = error * -special.ndtri(alpha)
    gap = distance - certificate.radius
    assert bool((gap > -error)[clear].all())
    assert bool((gap < 4 * error + 1.5 * width)[clear].all())
    assert torch.equal(certificate.prediction[clear], linear(x).argmax(1)[clear])


def test_certificate_follows_from_its_counts():
    smoothed = SmoothedClassifier(convolutional(), 0.5, 10)
    certificate = smoothed.certify(torch.rand(4, 1, 8, 8), n0=20, n=500, alpha=0.01)
    top = certificate.selection_counts.argmax(1)
    votes = certificate.counts.gather(1, top[:, None])[:, 0]
    p_lower = clopper_pearson_lower(votes, 500, 0.01)
    assert torch.equal(certificate.p_lower, p_lower)
    certain = p_lower > 0.5
    expected = torch.where(certain, gaussian_radius(p_lower, 0.5), 0.0)
    assert torch.equal(certificate.radius, expected)
    assert torch.equal(certificate.prediction, torch.where(certain, top, -1))
    assert certificate.counts.sum(1).tolist() == [500] * 4
    assert certificate.selection_counts.sum(1).tolist() == [20] * 4
    assert certificate.samples.tolist() == [520] * 4


def test_selection_samples_are_never_reused():
    base = Shape().eval()
    SmoothedClassifier(base, 1.0, 3).certify(torch.zeros(2, 3), n0=5, n=12, batch_size=4)
    samples = torch.cat(base.seen)
    assert samples.shape == (2 * 17, 3)
    assert samples.unique(dim=0).shape == samples.shape
    drawn = gaussian_samples(torch.zeros(2, 3), 1.0, 17, seed=0)
    assert torch.equal(samples[:10], drawn[:, :5].flatten(0, 1))
    assert torch.equal(samples[10:], drawn[:, 5:].flatten(0, 1))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("threads", [1, 2])
def test_result_depends_on_no_split(batch_size, threads):
    x = torch.rand(3, 1, 8, 8)
    smoothed = SmoothedClassifier(convolutional(), 0.5, 10)
    whole = smoothed.certify(x, n0=10, n=150, seed=2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        split = smoothed.certify(x, n0=10, n=150, seed=2, batch_size=batch_size)
    finally:
        torch.set_num_threads(before)
    alone = smoothed.certify(x[2:], n0=10, n=150, seed=2, first_index=2)
    assert torch.equal(split.counts, whole.counts)
    assert torch.equal(split.radius, whole.radius)
    assert torch.equal(alone.counts[0], whole.counts[2])


def test_prediction_abstains_when_two_classes_are_close():
    base = Halfspace(8).eval()
    smoothed = SmoothedClassifier(base, 0.5, 2)
    x = base.inputs([2.0, -2.0, 0.0])
    assert smoothed.predict(x, n=200, alpha=0.001).tolist() == [1, 0, -1]


def test_a_tie_is_answered_no_more_often_than_alpha():
    base = Halfspace(4).eval()
    smoothed = SmoothedClassifier(base, 1.0, 2)
    tied = base.inputs([0.0] * 2000)
    answers = smoothed.predict(tied, n=60, alpha=0.05, batch_size=60, seed=4)
    assert int((answers != -1).sum()) <= stats.binom.isf(1e-4, 2000, 0.05)


@pytest.mark.parametrize("won", [21, 27, 33])
def test_prediction_is_the_two_sided_sign_test_of_the_two_best(won):
    votes = [0] * won + [1] * (40 - won) + [2] * 5
    tail = sum(math.comb(40, k) for k in range(won, 41)) / 2**40
    for alpha, answer in ((2 * tail * 1.0001, 0), (2 * tail * 0.9999, -1)):
        smoothed = SmoothedClassifier(ScriptedVotes(votes, 3).eval(), 0.5, 3)
        if alpha < 1:
            assert smoothed.predict(torch.zeros(1, 2), n=45, alpha=alpha).item() == answer


def test_randomised_certificates_use_one_share_per_position():
    smoothed, x = SmoothedClassifier(convolutional(), 0.5, 10), torch.rand(5, 1, 8, 8)
    certificate = smoothed.certify(x, n=80, seed=3, randomised=True, first_index=7)
    shares = uniform_shares(5, 3, 7)
    votes = certificate.counts.gather(1, certificate.selection_counts.argmax(1, keepdim=True))[:, 0]
    assert torch.equal(certificate.p_lower, randomised_lower(votes, 80, 1e-3, shares))
    assert torch.equal(uniform_shares(2, 3, 10), shares[3:])


def test_shares_are_uniform_and_rounded_up():
    shares = uniform_shares(4000, 5, 0)
    assert stats.kstest(shares.numpy(), "uniform").pvalue > 1e-3
    drawn = uniform_samples(torch.zeros(4000, 1), 1.0, 1, seed=5, first_sample=2**40 - 1)
    # a uniform number below 1 is off by at most 2^-25 + 2^-31, half of which reaches a share
    least = (1 + drawn.flatten().double()) / 2 + 2.0**-25
    assert bool((shares >= least.clamp(max=1)).all())


def test_probabilities_are_differentiable_and_seeded():
    base = convolutional().double().float()
    smoothed = SmoothedClassifier(base, 0.25, 10)
    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    probabilities = smoothed(x, n=5, seed=3)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2))
    noisy = gaussian_samples(x.detach(), 0.25, 5, seed=3).flatten(0, 1)
    expected = torch.softmax(base(noisy), -1).view(2, 5, 10).mean(1)
    torch.testing.assert_close(probabilities, expected)
    probabilities[:, 0].sum().backward()
    assert x.grad.abs().sum() > 0
    assert not torch.equal(smoothed(x, n=5), smoothed(x, n=5))
    torch.manual_seed(5)
    first = smoothed(x, n=5)
    torch.manual_seed(5)
    assert torch.equal(smoothed(x, n=5), first)


def test_module_copies_pickles_and_keeps_its_weights():
    smoothed = SmoothedClassifier(convolutional(), 0.25, 10)
    x = torch.rand(1, 1, 8, 8)
    expected = smoothed(x, seed=0)
    assert torch.equal(copy.deepcopy(smoothed)(x, seed=0), expected)
    assert torch.equal(pickle.loads(pickle.dumps(smoothed))(x, seed=0), expected)
    assert [name.split(".")[0] for name in smoothed.state_dict()] == ["base"] * 4
    assert "sigma=0.25, num_classes=10" in repr(smoothed)


def test_half_precision_base_and_progress(capsys):
    smoothed = SmoothedClassifier(convolutional().bfloat16(), 0.25, 10)
    x = torch.rand(2, 1, 8, 8).bfloat16()
    certificate = smoothed.certify(x, n0=5, n=20, progress=True)
    assert certificate.counts.sum(1).tolist() == [20, 20]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "50/50" in captured.err


@pytest.mark.parametrize(
    ("shape", "rows"), [((1, 8, 8), 512), ((3, 32, 32), 256), ((3, 64, 64), 64), ((3, 224, 224), 8)]
)
def test_copies_of_a_forward_pass_fit_the_cache(shape, rows):
    base = Shape().eval()
    smoothed = SmoothedClassifier(base, 0.5, 3)
    x = torch.rand(1, *shape)
    chosen = smoothed.certify(x, n0=1, n=513)
    assert [len(batch) for batch in base.seen[1:]] == [rows] * (513 // rows) + [513 % rows]
    given = smoothed.certify(x, n0=1, n=513, batch_size=100)
    assert torch.equal(chosen.counts, given.counts)


def test_empty_batch():
    certificate = SmoothedClassifier(convolutional(), 1.0, 10).certify(torch.rand(0, 1, 8, 8), n=5)
    assert len(certificate) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 0.0}, ValueError, r"alpha must lie in the open interval \(0, 1\); got 0"),
        ({"alpha": 1.0}, ValueError, "alpha must lie"),
        ({"n": 0}, ValueError, "n must be at least 1; got 0"),
        ({"n0": 0}, ValueError, "n0 must be at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        (
            {"x": torch.zeros(1, 1, 8, 8, dtype=torch.uint8)},
            TypeError,
            "scale them first, as in",
        ),
        ({"x": torch.zeros(1, 1, 8, 8) * math.nan}, ValueError, "x must be finite"),
        ({"x": torch.zeros(64)}, ValueError, r"x must be a batch \(B, ...\)"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    smoothed = SmoothedClassifier(convolutional(), 0.25, 10)
    x = options.pop("x", torch.zeros(1, 1, 8, 8))
    with pytest.raises(error, match=message):
        smoothed.certify(x, **{"n": 5, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed must be at least 0; got -1"),
        ({"seed": 2**63}, ValueError, r"seed must not exceed 2\*\*63"),
        ({"seed": 0.5}, TypeError, "seed must be an integer; got float"),
        ({"first_index": 2**48}, ValueError, r"first_index \+ B must not exceed 2\*\*48"),
        ({"x": torch.zeros(1, 4).double()}, TypeError, "x must have dtype float32, bfloat16 or"),
    ],
)
@pytest.mark.parametrize("call", ["certify", "certify_at", "predict"])
def test_all_calls_refuse_alike_before_the_base_is_called(call, options, error, message):
    base = nn.Sequential(nn.Linear(4, 2)).eval()
    base.register_forward_hook(lambda *_: pytest.fail("the base was called"))
    smoothed = SmoothedClassifier(base, 0.25, 2)
    x = options.get("x", torch.zeros(1, 4))
    rest = {name: value for name, value in options.items() if name != "x"}
    given = (x, 0.1) if call == "certify_at" else (x,)
    with pytest.raises(error, match=f"SmoothedClassifier.{call}: {message}"):
        getattr(smoothed, call)(*given, **rest)


def test_radii_may_be_numbers_of_any_kind():
    smoothed, x = SmoothedClassifier(convolutional(), 0.5, 10), torch.rand(1, 1, 8, 8)
    for radius in (0.25, np.float32(0.25), torch.tensor(0.25), [0.25], np.array([0.25])):
        assert smoothed.certify_at(x, radius, budget=50).radii.tolist() == [0.25]
    for radius in ([0.2, 0.1], [], float("nan"), torch.ones(1, 1)):
        with pytest.raises(ValueError, match="radius must be a number >= 0 or increasing numbers"):
            smoothed.certify_at(x, radius, budget=50)


def test_training_mode_is_refused():
    base = convolutional()
    base[1].train()
    smoothed = SmoothedClassifier(base, 0.25, 10)
    with pytest.raises(
        ValueError, match=r"evaluation mode, but its module '1' is in training mode"
    ):
        smoothed.certify(torch.zeros(1, 1, 8, 8), n=5)


def test_wrong_class_count_is_refused():
    smoothed = SmoothedClassifier(convolutional(), 0.25, 9)
    with pytest.raises(ValueError, match=r"must return shape \(5, 9\) for num_classes=9"):
        smoothed.certify(torch.zeros(1, 1, 8, 8), n0=5, n=5)


def test_nan_logits_name_the_sample():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.where(x[:, :2] > 1.5, math.nan, x[:, :2])

    z = gaussian_samples(torch.zeros(1, 2), 1.0, 200, seed=0, first_index=4)[0]
    bad = int((z > 1.5).any(1).nonzero()[0])
    with pytest.raises(ValueError, match=f"NaN; it does for sample {bad} of image 4"):
        SmoothedClassifier(Broken().eval(), 1.0, 2).certify(
            torch.zeros(1, 2), n0=1, n=199, batch_size=8, first_index=4
        )


@pytest.mark.parametrize("sigma", [0.0, -0.5, math.nan])
def test_bad_sigma_is_refused(sigma):
    with pytest.raises(ValueError, match="sigma must be finite and positive"):
        SmoothedClassifier(nn.Identity(), sigma, 2)
