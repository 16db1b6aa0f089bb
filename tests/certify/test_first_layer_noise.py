"""Noise after a linear layer has the law of noise before it."""

import copy

import pytest
import torch
from scipy import stats
from torch import nn

from pyrobust.certify import after_linear_samples, noise_factor, split_first_linear
from pyrobust.nn import SmoothedClassifier
from pyrobust.ops import gaussian_samples


def test_factor_is_a_root_of_the_gram_matrix():
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 5), (7, 64), (64, 7), (20, 20)):
        weight = torch.randn(shape, generator=generator)
        factor = noise_factor(weight)
        assert factor.dtype == torch.float64
        assert factor.shape == (min(shape), shape[0])
        gram = weight.double() @ weight.double().T
        torch.testing.assert_close(factor.T @ factor, gram, rtol=0, atol=1e-12 * shape[1] * 10)
    deficient = torch.randn(3, 50, generator=generator)[[0, 1, 2, 0, 1]]  # a Cholesky would fail
    factor = noise_factor(deficient)
    torch.testing.assert_close(factor.T @ factor, deficient.double() @ deficient.double().T)


def test_distribution_is_that_of_noise_on_the_input():
    torch.manual_seed(1)
    linear, sigma, n = nn.Linear(300, 12), 0.5, 40_000
    x = torch.rand(1, 300)
    with torch.no_grad():
        after = after_linear_samples(x, linear.weight, linear.bias, sigma, n, seed=3)[0].double()
        before = linear(gaussian_samples(x, sigma, n, seed=4)[0]).double()
        mean = linear(x).double()[0]
    covariance = sigma**2 * linear.weight.detach().double() @ linear.weight.detach().double().T
    spread = covariance.diagonal().sqrt()
    assert ((after.mean(0) - mean).abs() < 5 * spread / n**0.5).all()
    seen = torch.cov(after.T)
    error = ((covariance**2 + covariance.diagonal().outer(covariance.diagonal())) / n).sqrt()
    assert ((seen - covariance).abs() < 5 * error).all()
    for _ in range(5):  # projections: exact normal law, and the law of noise on the input
        a = torch.randn(12, dtype=torch.float64)
        z = (after - mean) @ a / (a @ covariance @ a).sqrt()
        assert stats.kstest(z.numpy(), "norm").pvalue > 1e-4
        assert stats.ks_2samp((after @ a).numpy(), (before @ a).numpy()).pvalue > 1e-4
    whitened = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (after - mean).T, upper=False
    )
    assert stats.kstest(whitened.square().sum(0).numpy(), stats.chi2(12).cdf).pvalue > 1e-4


def test_votes_of_a_network_have_the_same_law():
    torch.manual_seed(2)
    base = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    linear, rest = split_first_linear(base)
    x, n = torch.rand(1, 1, 8, 8), 30_000
    with torch.no_grad():
        after = after_linear_samples(x.flatten(1), linear.weight, linear.bias, 1.0, n, seed=5)
        votes = torch.bincount(rest(after[0]).argmax(1), minlength=3)
        plain = torch.bincount(base(gaussian_samples(x, 1.0, n, seed=6)[0]).argmax(1), minlength=3)
    assert (votes > 500).sum() >= 2
    assert stats.chi2_contingency(torch.stack([votes, plain])[:, votes > 0]).pvalue > 1e-4


def test_position_decides_the_noise():
    x, weight = torch.rand(3, 40), torch.randn(5, 40)
    whole = after_linear_samples(x, weight, None, 0.5, 20, seed=1, first_sample=3, first_index=7)
    part = after_linear_samples(
        x[1:], weight, None, 0.5, 4, seed=1, first_sample=9, first_index=8,
        factor=noise_factor(weight),
    )  # fmt: skip
    torch.testing.assert_close(part, whole[1:, 6:10])
    assert whole.unique().numel() == whole.numel()


def test_gradient_reaches_the_input():
    x = torch.rand(2, 6, requires_grad=True)
    weight = torch.randn(3, 6)
    after_linear_samples(x, weight, torch.zeros(3), 0.5, 7, seed=0).sum().backward()
    torch.testing.assert_close(x.grad, 7 * weight.sum(0).expand(2, 6))


def test_split_shares_layers_and_mode():
    base = nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    linear, rest = split_first_linear(base)
    assert linear is base[0]
    assert rest[1] is base[2]
    assert not rest.training
    x = torch.rand(5, 9)
    assert torch.equal(rest(linear(x)), base(x))


def narrow_network():
    torch.manual_seed(3)
    layers = [nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).eval()


def test_smoothed_classifier_certifies_alike_with_either_noise():
    base, x = narrow_network(), torch.rand(6, 1, 8, 8) * 4
    plain = SmoothedClassifier(base, 0.5, 3)
    after = SmoothedClassifier(base, 0.5, 3, noise="after_first_layer")
    one, other = (s.certify(x, n=4000, seed=1, batch_size=1000) for s in (plain, after))
    for a, b in zip(one.counts, other.counts, strict=True):
        seen = torch.stack([a, b])[:, a + b > 0].numpy()
        assert seen.shape[1] == 1 or stats.chi2_contingency(seen).pvalue > 1e-4
    assert not torch.equal(one.counts, other.counts)
    alone = after.certify(x[4:], n=4000, seed=1, batch_size=1000, first_index=4)
    assert torch.equal(alone.counts, other.counts[4:])
    early = after.certify_at(x, 0.1, budget=2000, batch_size=300)
    agreed = (early.prediction >= 0) & (other.prediction >= 0)
    assert agreed.any()
    assert torch.equal(early.prediction[agreed], other.prediction[agreed])
    assert after.state_dict().keys() == plain.state_dict().keys()


def test_noise_follows_a_changed_layer_and_forward_keeps_its_gradient():
    base, x = narrow_network(), torch.rand(2, 1, 8, 8)
    after = SmoothedClassifier(base, 0.5, 3, noise="after_first_layer")
    before = after.noise.samples(x, 5, seed=1)
    assert before.shape == (2, 5, 8)
    with torch.no_grad():
        base[1].weight.mul_(2)
        base[1].bias.mul_(2)
    torch.testing.assert_close(after.noise.samples(x, 5, seed=1), 2 * before)
    after(x, n=3, seed=2)[:, 0].sum().backward()
    gradient = base[1].weight.grad.clone()
    base.zero_grad()
    SmoothedClassifier(base, 0.5, 3)(x, n=3, seed=2)[:, 0].sum().backward()
    assert torch.equal(gradient, base[1].weight.grad)
    with pytest.raises(ValueError, match="split_first_linear: base must be a Sequential"):
        SmoothedClassifier(nn.Linear(4, 2), 0.5, 2, noise="after_first_layer")


def test_noise_follows_a_layer_whose_weight_or_place_was_replaced():
    base, x = narrow_network(), torch.rand(2, 1, 8, 8)
    after = SmoothedClassifier(base, 0.5, 3, noise="after_first_layer")
    before = after.noise.samples(x, 5, seed=1)
    base[1].weight.data = 2 * base[1].weight.data  # counted as no change of the weight
    base[1].bias.data = 2 * base[1].bias.data
    torch.testing.assert_close(after.noise.samples(x, 5, seed=1), 2 * before)
    base[1] = nn.Linear(64, 8).eval()
    fresh = SmoothedClassifier(base, 0.5, 3, noise="after_first_layer")
    assert torch.equal(after.certify(x, n=50).counts, fresh.certify(x, n=50).counts)
    copied = copy.deepcopy(after)
    assert copied.noise.linear is copied.base[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_networks_see_outputs_in_their_type(dtype):
    base, x = narrow_network().to(dtype), torch.rand(2, 1, 8, 8).to(dtype)
    after = SmoothedClassifier(base, 0.5, 3, noise="after_first_layer")
    assert after.noise.samples(x, 3, seed=0).dtype == dtype
    assert after.certify(x, n=50).counts.sum(1).tolist() == [50, 50]


def test_hooks_that_would_not_run_are_refused():
    for place in (lambda base: base, lambda base: base[0], lambda base: base[1]):
        base = narrow_network()
        place(base).register_forward_hook(lambda module, inputs, made: 2 * made)
        with pytest.raises(ValueError, match="must have no hooks and no forward of its own"):
            SmoothedClassifier(base, 0.5, 3, noise="after_first_layer")


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="starts with Conv2d"):
        split_first_linear(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match="got Linear"):
        split_first_linear(nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"fewer outputs than inputs.*it has 4 of 4"):
        split_first_linear(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"weight must have shape \(H, D\)"):
        noise_factor(torch.zeros(3))
    with pytest.raises(ValueError, match="weight must be finite"):
        noise_factor(torch.full((1, 2), torch.inf))
    with pytest.raises(ValueError, match=r"x must be \(B, D\) and weight \(H, D\)"):
        after_linear_samples(torch.zeros(1, 3), torch.zeros(2, 4), None, 0.5, 1, seed=0)
    with pytest.raises(ValueError, match="sigma must be finite and positive"):
        after_linear_samples(torch.zeros(1, 4), torch.zeros(2, 4), None, 0.0, 1, seed=0)
