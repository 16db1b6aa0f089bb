"""Mixtures against the plain formula, their certificates, and the paper's claims on digits."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyrobust
from pyrobust.data import load_digits
from pyrobust.evaluate import attack_report, auto_pgd, pgd
from pyrobust.nn import AdaptiveMixedClassifier, FeatureTap, MixedClassifier, MixingNetwork
from pyrobust.train import (
    GaussianCrossEntropy,
    IBPLoss,
    MixingLoss,
    RandomizedPGD,
    SmoothEpsSchedule,
    choose_alpha,
    fit,
    train_mixer,
)


def mlp(inputs=6, width=8, classes=4):
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    )
    model.append(nn.Linear(width, classes))
    return model.requires_grad_(False).eval()


def tapped(**options):
    return FeatureTap(mlp(**options), ["2", "4"])


def adaptive(**options):
    mixer = MixingNetwork((8, 8), (8, 8), widths=(8, 8, 8))
    return AdaptiveMixedClassifier(tapped(), tapped(), mixer, **options).eval()


class Given(nn.Module):
    """Its input, times a number, is its logits."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def test_weights_of_zero_and_one_are_the_two_classifiers():
    g, h, x = mlp(), mlp(), torch.rand(50, 6)
    assert torch.equal(MixedClassifier(g, h, 0.0).eval()(x), g(x).log_softmax(1))
    assert torch.equal(MixedClassifier(g, h, 1.0, 1.0, 3.0).eval()(x), (3 * h(x)).log_softmax(1))


def test_outputs_are_normalised_and_finite_at_huge_logits():
    x = torch.randn(200, 5) * 1e4
    for alpha in (1e-6, 0.3, 0.85, 1 - 1e-6):
        out = MixedClassifier(Given(1.0).eval(), Given(-1.0).eval(), alpha).eval()(x)
        assert bool(torch.isfinite(out).all())
        assert float(out.logsumexp(1).abs().max()) < 1e-6
        naive = ((1 - alpha) * x.softmax(1) + alpha * (-x).softmax(1)).log()
        assert not bool(torch.isfinite(naive).all())  # what mixing in log space is for


def test_values_and_gradients_equal_those_of_the_plain_formula():
    g, h = mlp().double(), mlp().double()
    x = torch.rand(20, 6, dtype=torch.float64, requires_grad=True)
    mixed = MixedClassifier(g, h, 0.7, 2.0, 0.5).eval()
    plain = (0.3 * (2.0 * g(x)).softmax(1) + 0.7 * (0.5 * h(x)).softmax(1)).log()
    weight = torch.randn(20, 4, dtype=torch.float64)
    torch.testing.assert_close(mixed(x), plain)
    ours, theirs = (torch.autograd.grad((f * weight).sum(), x)[0] for f in (mixed(x), plain))
    torch.testing.assert_close(ours, theirs)


def test_the_parts_stay_frozen_in_evaluation_mode():
    mixed = MixedClassifier(mlp(), mlp(), 0.5)
    mixed.train()
    assert mixed.training
    assert not mixed.standard.training
    assert not mixed.robust[0].training
    assert not list(filter(lambda p: p.requires_grad, mixed.parameters()))


def test_interval_certificates_follow_the_margin_of_the_robust_part():
    h, x = mlp(), torch.rand(300, 6)
    with torch.no_grad():
        h[-1].weight.mul_(20)
    certified = 0
    for alpha, scale in ((0.6, 1.0), (0.85, 1.0), (0.85, 4.0), (1.0, 1.0)):
        mixed = MixedClassifier(mlp(), h, alpha, 1.0, scale).eval()
        result = mixed.certify(x, 0.02)
        certain = ~result.abstained
        certified += int(certain.sum())
        assert torch.equal(result.prediction[certain], mixed(x).argmax(1)[certain])
        inside = (x[None] + 0.02 * (2 * torch.rand(64, *x.shape) - 1)).clamp(0, 1)
        shares = (scale * h(inside.flatten(0, 1))).softmax(1).view(64, 300, 4)
        y = result.prediction.clamp_min(0)[None, :, None].expand(64, -1, 1)
        gap = shares.gather(2, y)[..., 0] - shares.scatter(2, y, -1).amax(2)
        assert bool((gap.amin(0)[certain] > (1 - alpha) / alpha).all())
        for k in range(1, 4):  # no standard classifier can change a certified input
            against = F.one_hot((y[0, :, 0] + k) % 4, 4)
            worst = (1 - alpha) * against + alpha * shares
            assert bool((worst.argmax(2) == y[..., 0])[:, certain].all())
    assert certified > 100
    low = MixedClassifier(mlp(), h, 0.49).eval().certify(x, 0.0)
    assert bool(low.abstained.all())
    assert "below 1/2 certifies no radius" in low.assumption


def test_adaptive_weights_stay_in_their_range_and_form_the_mixture():
    model = adaptive(alpha_range=(0.6, 0.95), standard_scale=2.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_var.fill_(1e-4)  # gammas far from 0
    x = torch.rand(64, 6)
    scores, gamma = model.with_gamma(x)
    weights = model.weights(x)
    assert bool(((weights >= 0.6) & (weights <= 0.95)).all())
    torch.testing.assert_close(weights, 0.6 + 0.35 * torch.sigmoid(gamma))
    g, h = model.standard.model(x), model.robust.model(x)
    w = weights[:, None]
    plain = ((1 - w) * (2 * g).softmax(1) + w * h.softmax(1)).log()
    torch.testing.assert_close(scores, plain)
    assert torch.equal(model(x), scores)
    assert model.lowest_alpha == 0.6
    low = MixedClassifier(model.standard.model, model.robust.model, 0.6, 2.0).eval()
    certain = ~model.certify(x, 1e-4).abstained
    assert torch.equal(
        certain, ~low.certify(x, 1e-4).abstained & (scores.argmax(1) == low(x).argmax(1))
    )


def test_certificates_count_on_the_lowest_weight_also_of_a_changed_range():
    model = adaptive(alpha_range=(0.9, 0.95)).eval()
    assert model.lowest_alpha == 0.9
    model.alpha_range = (0.4, 0.95)
    assert model.lowest_alpha == 0.4
    x = torch.rand(6, 6)
    assert bool(model.certify(x, 0.0).abstained.all())


def test_gamma_is_clamped_normalised_and_mapped_in_training():
    model = adaptive().train()
    x = torch.rand(64, 6)
    _, gamma = model.with_gamma(x)
    gamma = gamma.detach()
    assert float(gamma.mean()) == pytest.approx(0.4, abs=1e-4)
    assert float(gamma.std(unbiased=False)) == pytest.approx(2.0, rel=0.05)
    assert float((gamma - gamma.mean()).abs().max()) < 2.0 * 2.0  # no outlier is left
    assert float(model.norm.running_mean) != 0
    assert model.eval().with_gamma(x)[1].requires_grad


def test_features_of_different_sizes_and_a_resized_standard_input():
    def conv(stride):
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU()
        )
        model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)])
        return FeatureTap(model.requires_grad_(False).eval(), ["1", "3"])

    for shortcut in ("conv", "identity"):
        mixer = MixingNetwork((4, 4), (6, 6), shortcut=shortcut)
        model = AdaptiveMixedClassifier(conv(2), conv(1), mixer, standard_size=(24, 24)).eval()
        assert model(torch.rand(2, 1, 10, 10)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"widths\[0\] = 12"):
        MixingNetwork((4, 4), (6, 6), widths=(8, 8, 8), shortcut="identity")


def test_taps_can_be_copied_and_name_their_layers():
    tap = tapped()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(tap)))
    x = torch.rand(3, 6)
    output, features = twin(x)
    assert torch.equal(output, tap.model(x))
    assert torch.equal(features[0], tap.model[:3](x))
    assert torch.equal(features[1], tap.model[:5](x))
    assert not tap.model[2]._forward_hooks
    with pytest.raises(ValueError, match="known are 0, 1"):
        FeatureTap(mlp(), ["conv1"])
    shared = nn.ReLU()
    twice = FeatureTap(nn.Sequential(shared, nn.Linear(6, 6), shared), ["0"])
    with pytest.raises(ValueError, match="got 2 runs"):
        twice(x)


def test_packed_parts_are_mixed_and_certified():
    g, h = mlp(inputs=16, width=32), mlp(inputs=16, width=32)
    with torch.no_grad():
        h[-1].weight.mul_(30)
    packed = [pyrobust.pack(part, bits=8, group_size=16) for part in (g, h)]
    mixed = MixedClassifier(*packed, 0.85).eval()
    x = torch.rand(40, 16)
    float_mixed = MixedClassifier(g, h, 0.85).eval()
    torch.testing.assert_close(mixed(x).exp(), float_mixed(x).exp(), atol=0.1, rtol=0)
    certain = ~mixed.certify(x, 0.002).abstained
    assert int(certain.sum()) > 10
    points = pgd(mixed, x, mixed(x).argmax(1), eps=0.002, steps=20)
    assert torch.equal(mixed(points).argmax(1)[certain], mixed(x).argmax(1)[certain])
    mixer = MixingNetwork((32, 32), (32, 32), widths=(8, 8, 8))
    taps = [FeatureTap(part, ["2", "4"]) for part in packed]
    assert AdaptiveMixedClassifier(*taps, mixer).eval()(x).shape == (40, 4)


def test_the_loss_is_the_stated_one_and_attacks_stay_in_their_balls():
    model, x, y = adaptive(), torch.rand(12, 6), torch.arange(12) % 4
    scores, gamma = model.with_gamma(x)
    attacked = (torch.arange(12) % 2).float()
    ce = F.cross_entropy(scores, y, reduction="none")
    bce = F.binary_cross_entropy_with_logits(gamma, attacked, reduction="none")
    torch.testing.assert_close(
        MixingLoss(1.5, 0.5, 0.2)(scores, y, gamma, attacked),
        (1.5 * bce + 0.5 * ce + 0.2 * bce * ce).mean(),
    )
    for attack in ("apgd", "pgd"):
        runs = RandomizedPGD(0.1, attack=attack, step_degrees=6.0)
        model.train()
        points = list(runs(model, x, y, seed=3))
        assert model.training
        assert len(points) == 4  # one untargeted, three targets
        assert all(float((p - x).abs().max()) <= 0.11 + 1e-6 for p in points)
        again = list(runs(model, x, y, seed=3))
        assert all(torch.equal(a, b) for a, b in zip(points, again, strict=True))
        assert not torch.equal(points[0], next(iter(runs(model, x, y, seed=4))))


def test_bad_input_is_refused():
    g, h = mlp(), mlp()
    for call, error, message in [
        (lambda: MixedClassifier(g, h, 1.5), ValueError, "alpha"),
        (lambda: MixedClassifier(g, h, 0.5, 0.0), ValueError, "standard_scale"),
        (lambda: MixedClassifier(g, h, 0.5, 1.0, -1.0), ValueError, "robust_scale"),
        (lambda: MixedClassifier(mlp().train(), h), ValueError, "training mode"),
        (lambda: MixedClassifier(g, mlp().requires_grad_()), ValueError, "robust must be frozen"),
        (lambda: MixedClassifier(g, mlp(classes=3)).eval()(torch.rand(2, 6)), ValueError, "shape"),
        (lambda: MixedClassifier(g, h).eval().certify(torch.rand(2, 6), -1), ValueError, "eps"),
        (lambda: AdaptiveMixedClassifier(g, tapped(), nn.Identity()), TypeError, "FeatureTap"),
        (lambda: adaptive(alpha_range=(0.9, 0.8)), ValueError, "alpha_range"),
        (lambda: adaptive(gamma_affine=(0.0, 1.0)), ValueError, "gamma_affine"),
        (lambda: RandomizedPGD(0.0), ValueError, "eps"),
        (lambda: RandomizedPGD(0.1, attack="fgsm"), ValueError, "attack"),
        (lambda: MixingLoss(-1.0), ValueError, "c_bce"),
    ]:
        with pytest.raises(error, match=message):
            call()
    hidden = adaptive(mixer_gradient=False)
    x = torch.rand(2, 6, requires_grad=True)
    with pytest.warns(UserWarning, match="not adaptive"):
        hidden(x)


# The paper's claims, on digits: g trained plainly, h against PGD.


def digit_mlp():
    layers = [nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(96, 10))


def against_pgd(model, x, labels, done):
    eps = 0.15 * min(1.0, 3 * done)
    points = pgd(model, x, labels, eps=eps, steps=5, keep="last", seed=int(1e6 * done))
    return F.cross_entropy(model(points), labels)


def trades(model, x, labels, done):
    """TRADES: clean cross-entropy and 6 times the divergence of attacked from clean answers."""
    eps = 0.15 * min(1.0, 3 * done)
    clean = model(x)
    target = clean.detach().log_softmax(1)

    def divergence(logits, _):
        return F.kl_div(logits.log_softmax(1), target, log_target=True, reduction="none").sum(1)

    points = pgd(
        model, x, labels, eps=eps, steps=5, keep="last", objective=divergence, seed=int(1e6 * done)
    )
    apart = F.kl_div(
        model(points).log_softmax(1), clean.log_softmax(1), log_target=True, reduction="batchmean"
    )
    return F.cross_entropy(clean, labels) + 6.0 * apart


def train_pair(robust_epochs, robust_objective=against_pgd, seed=0):
    torch.manual_seed(seed)
    data, models = load_digits(), []
    for objective, epochs in ((GaussianCrossEntropy(), 8), (robust_objective, robust_epochs)):
        generator = torch.Generator().manual_seed(seed)
        model = fit(
            digit_mlp(),
            data.train_images,
            data.train_labels,
            objective=objective,
            epochs=epochs,
            batch_size=128,
            learning_rate=5e-3,
            generator=generator,
        )
        models.append(model.requires_grad_(False))
    return data, *models


@pytest.fixture(scope="module")
def trained():
    return train_pair(20)


def attacked(model, x, y):
    return auto_pgd(model, x, y, eps=0.15, steps=15)


def margins(shares, y):
    """Top probability less the second, of right and of wrong answers."""
    top = shares.topk(2, 1)
    gap, right = top.values[:, 0] - top.values[:, 1], top.indices[:, 0] == y
    return float(gap[right].mean()), float(gap[~right].mean())


def test_a_robust_classifier_is_surer_where_it_is_right(trained):
    data, _, h = trained
    x, y = data.test_images, data.test_labels
    for points in (x, attacked(h, x, y)):
        right, wrong = margins(h(points).softmax(1), y)
        assert right > wrong


def test_so_is_one_trained_by_trades_which_needs_a_scale():
    data, _, h = train_pair(12, trades)
    x, y = data.test_images, data.test_labels
    for scale in (1.0, 4.0):
        for points in (x, attacked(h, x, y)):
            right, wrong = margins((scale * h(points)).softmax(1), y)
            print("scale", scale, "right", right, "wrong", wrong)
            assert right > wrong


def sweep(data, g, h):
    x, y = data.test_images, data.test_labels
    choice = choose_alpha(
        g, h, x, y, attack=attacked, alphas=(0.5, 0.7, 0.85, 1.0), robust_scale=4.0
    )
    print(choice)
    assert choice.attacked[choice.alphas.index(choice.alpha)] >= max(choice.attacked) - 0.03
    clean = dict(zip(choice.alphas, choice.clean, strict=True))
    return clean, dict(zip(choice.alphas, choice.attacked, strict=True))


def test_a_mixture_keeps_clean_accuracy_and_most_robustness(trained):
    clean, robust = sweep(*trained)
    assert clean[0.85] >= clean[1.0]
    assert robust[0.85] >= robust[1.0] - 0.03


@pytest.mark.slow
def test_the_mixture_at_the_paper_like_weight():
    """Mean of five seeds: single ones differ by an image or two of 360 between machines."""
    # With 20 epochs against PGD the robust part is not sure enough: 0.039 are lost at 0.7.
    sweeps = [sweep(*train_pair(40, seed=seed)) for seed in range(5)]
    clean, robust = (
        {weight: sum(s[i][weight] for s in sweeps) / 5 for weight in (0.7, 1.0)} for i in (0, 1)
    )
    print(clean, robust)
    assert clean[0.7] >= clean[1.0] - 0.5 / 360  # half an image
    assert robust[0.7] >= robust[1.0] - 0.03


def test_gradients_of_the_mixture_are_not_masked(trained):
    data, g, h = trained
    x, y = data.test_images[:100], data.test_labels[:100]
    mixed = MixedClassifier(g, h, 0.85, 1.0, 4.0).eval()

    def naive(points):
        return (0.15 * g(points).softmax(1) + 0.85 * (4 * h(points)).softmax(1)).clamp_min(1e-30)

    def cross_entropy(shares, labels):
        return -shares.gather(1, labels[:, None])[:, 0].log()

    ours = pgd(mixed, x, y, eps=0.15, steps=15)
    theirs = pgd(naive, x, y, eps=0.15, steps=15, objective=cross_entropy)
    left = [float((mixed(p).argmax(1) == y).float().mean()) for p in (ours, theirs)]
    assert abs(left[0] - left[1]) <= 0.01
    report = attack_report(mixed, x, y, eps=0.15, steps=10)
    assert not any("twice the steps" in sign for sign in report.signs)


@pytest.mark.slow
def test_the_mixing_network_learns_to_see_attacks(trained):
    data, g, h = trained
    taps = [FeatureTap(part, ["2", "4"]) for part in (g, h)]
    mixer = MixingNetwork((96, 96), (96, 96), widths=(32, 32, 32))
    model = AdaptiveMixedClassifier(*taps, mixer, alpha_range=(0.5, 0.95), robust_scale=4.0)
    before = {name: p.clone() for name, p in model.named_parameters() if "mixer" not in name}
    attack = RandomizedPGD(0.15, attack="pgd", step_degrees=6.0, targets=1)
    x, y = data.train_images[:500], data.train_labels[:500]
    train_mixer(model, x, y, attack=attack, epochs=2, batch_size=100, learning_rate=2e-3)
    assert not model.training
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in before.items())
    x, y = data.test_images[:200], data.test_labels[:200]
    with torch.no_grad():
        clean, under = model.with_gamma(x)[1], model.with_gamma(attacked(model, x, y))[1]
    auroc = float((under[:, None] > clean[None]).double().mean())
    print("AUROC", auroc)
    assert auroc > 0.6
    weights = model.weights(torch.cat([x, attacked(h, x, y)]))
    assert bool(((weights >= 0.5) & (weights <= 0.95)).all())


def test_no_attack_breaks_interval_certificates_of_a_trained_mixture():
    torch.manual_seed(0)
    data = load_digits()
    objectives = (GaussianCrossEntropy(), IBPLoss(SmoothEpsSchedule(0.0, 0.5, eps=0.05)))
    g, h = (
        fit(digit_mlp(), data.train_images, data.train_labels, objective=o, epochs=6)
        for o in objectives
    )
    mixed = MixedClassifier(g.requires_grad_(False), h.requires_grad_(False), 0.8, 1.0, 4.0).eval()
    x, y = data.test_images[:150], data.test_labels[:150]
    result = mixed.certify(x, 0.02)
    certain = (result.prediction == y) & ~result.abstained
    print("certified", float(certain.double().mean()))
    assert float(certain.double().mean()) > 0.3
    for points in (
        auto_pgd(mixed, x, y, eps=0.02, steps=30),
        pgd(mixed, x, y, eps=0.02, steps=50, restarts=2),
    ):
        assert bool((mixed(points).argmax(1) == y)[certain].all())
