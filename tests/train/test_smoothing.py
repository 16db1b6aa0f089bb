"""Training for smoothing: losses against their formulae and figures of published code."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import special
from torch import nn
from torch.nn import functional as F

from pyrobust.data import load_digits
from pyrobust.ops import gaussian_samples
from pyrobust.train import (
    ConsistencyTraining,
    GaussianAugmentation,
    MacerTraining,
    SmoothAdvTraining,
    StabilityTraining,
    consistency_penalty,
    fit,
    gaussian_augmentation_loss,
    macer_loss,
    noisy_copies,
    smooth_adv,
    smoothed_cross_entropy,
    stability_loss,
)

B, M, K = 6, 4, 5
STEPS = torch.arange(B * M * K, dtype=torch.float64)
LOGITS = (torch.sin(1.7 * STEPS) * 2 + torch.cos(0.31 * STEPS * STEPS)).view(B, M, K)
CLEAN = torch.sin(0.9 * torch.arange(B * K, dtype=torch.float64)).view(B, K) * 2
LABELS = torch.tensor([1, 3, 2, 4, 4, 0])
OBJECTIVES = [
    GaussianAugmentation(0.25, copies=2),
    StabilityTraining(0.25, copies=2),
    MacerTraining(0.25, copies=4),
    ConsistencyTraining(0.25),
    SmoothAdvTraining(0.25, steps=2, consistency=2.0),
]


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_losses_agree_with_their_formulae_written_in_numpy():
    logits, clean, labels = LOGITS.numpy(), CLEAN.numpy(), LABELS.numpy()
    each, rows = log_softmax(logits), np.arange(B)
    plain = -each[rows, :, labels].mean()
    assert gaussian_augmentation_loss(LOGITS, LABELS).item() == pytest.approx(plain)
    smoothed = -np.log(np.exp(each).mean(1)[rows, labels]).mean()
    assert smoothed_cross_entropy(LOGITS, LABELS).item() == pytest.approx(smoothed)
    target = np.exp(log_softmax(clean))
    apart = -(target[:, None] * each).sum(-1).mean()
    stable = -log_softmax(clean)[rows, labels].mean() + 3 * apart
    assert stability_loss(CLEAN, LOGITS, LABELS, weight=3.0).item() == pytest.approx(stable)
    mean = np.exp(each).mean(1, keepdims=True)
    divergence = (mean * (np.log(mean) - each)).sum(-1).mean()
    penalty = divergence - 0.2 * (mean * np.log(mean)).sum(-1).mean()
    ours = consistency_penalty(LOGITS.transpose(0, 1), entropy=0.2)
    assert ours.item() == pytest.approx(penalty)
    warm = 0.05 * logits
    best = np.sort(np.exp(log_softmax(16 * warm)).mean(1), -1)[:, -2:]
    top = np.exp(log_softmax(16 * warm)).mean(1).argmax(-1)
    xi = special.ndtri(best[:, 1]) - special.ndtri(best[:, 0])
    hinge = np.where((top == labels) & (xi <= 8), 8 - xi, 0).mean() * 0.25 / 2
    loss = -np.log(np.exp(log_softmax(warm)).mean(1)[rows, labels]).mean() + 12 * hinge
    assert macer_loss(0.05 * LOGITS, LABELS, 0.25).item() == pytest.approx(loss)


def test_losses_agree_with_figures_of_published_code():
    # Obtained once by running github.com/jh-jeong/smoothing-consistency on these inputs.
    ours = 10 * consistency_penalty(LOGITS.transpose(0, 1), entropy=0.05)
    assert ours.item() == pytest.approx(10.084333488191318, rel=1e-12)
    classification, robustness = 1.5856149991353352, 0.6534206867218018
    expected = classification + 12 * robustness
    assert macer_loss((0.05 * LOGITS).float(), LABELS, 0.25).item() == pytest.approx(
        expected, rel=1e-6
    )


def tanh_model():
    weight = torch.sin(torch.arange(12 * K, dtype=torch.float32) * 0.37).view(K, 12)

    class Model(nn.Module):
        def forward(self, x):
            return torch.tanh(x.flatten(1)) @ weight.T

    return Model()


def test_smooth_adv_finds_the_point_of_published_code():
    steps = torch.arange(3 * 12, dtype=torch.float32)
    x = (0.5 + 0.15 * torch.sin(steps)).view(3, 1, 3, 4)
    noise = 0.25 * torch.cos(torch.arange(3 * M * 12, dtype=torch.float32) * 0.7)
    noise, labels = noise.view(3, M, 1, 3, 4), torch.tensor([0, 2, 4])
    adversarial = smooth_adv(tanh_model(), x, labels, noise, eps=0.3, steps=5)
    # The inputs stay clear of 0 and 1, where published code cuts before it shrinks, not after.
    expected = [
        [0.4283082, 0.5360838, 0.5299596, 0.4013324],
        [0.3488989, 0.5464137, 0.6743455, 0.6661723],
        [0.4801769, 0.5864701, 0.6971121, 0.7042322],
    ]
    torch.testing.assert_close(
        adversarial.flatten(1)[:, :4], torch.tensor(expected), rtol=0, atol=2e-5
    )
    before = smoothed_cross_entropy(
        tanh_model()((x[:, None] + noise).flatten(0, 1)).view(3, M, K), labels
    )
    after = tanh_model()((adversarial[:, None] + noise).flatten(0, 1)).view(3, M, K)
    assert smoothed_cross_entropy(after, labels) > before
    assert ((adversarial - x).flatten(1).norm(dim=1) <= 0.3 + 1e-6).all()


def test_gradients_are_those_of_finite_differences():
    logits = LOGITS[:3, :2].clone().requires_grad_()
    clean = CLEAN[:3].clone().requires_grad_()
    labels = LABELS[:3]
    check = torch.autograd.gradcheck
    assert check(lambda z: gaussian_augmentation_loss(z, labels), (logits,))
    assert check(lambda z: smoothed_cross_entropy(z, labels), (logits,))
    assert check(lambda c, z: stability_loss(c, z, labels), (clean, logits))
    assert check(lambda z: consistency_penalty(z, entropy=0.3), (logits,))
    assert check(lambda z: macer_loss(0.05 * z, labels, 0.5), (logits,))


def test_identities():
    one = LOGITS[:, :1]
    plain = F.cross_entropy(one[:, 0], LABELS)
    torch.testing.assert_close(gaussian_augmentation_loss(one, LABELS), plain)
    torch.testing.assert_close(smoothed_cross_entropy(one, LABELS), plain)
    torch.testing.assert_close(
        macer_loss(LOGITS, LABELS, 0.5, weight=0.0), smoothed_cross_entropy(LOGITS, LABELS)
    )
    torch.testing.assert_close(
        stability_loss(CLEAN, LOGITS, LABELS, weight=0.0), F.cross_entropy(CLEAN, LABELS)
    )
    same = one.expand(B, M, K).transpose(0, 1)
    assert consistency_penalty(same, entropy=0.0).abs() < 1e-12
    # Jensen: the mean probability loses less than the mean of the losses.
    assert smoothed_cross_entropy(LOGITS, LABELS) <= gaussian_augmentation_loss(LOGITS, LABELS)
    none = smoothed_cross_entropy(LOGITS, LABELS, reduction="none")
    torch.testing.assert_close(none.mean(), smoothed_cross_entropy(LOGITS, LABELS))


def test_macer_stays_finite_where_quantiles_are_not():
    logits = torch.tensor([[[200.0, -200.0, 0.0]], [[0.0, 0.0, 0.0]]]).requires_grad_()
    loss = macer_loss(logits, torch.tensor([0, 0]), 0.25)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    # A certain input is beyond the hinge: it has the loss of its cross-entropy alone.
    assert macer_loss(logits[:1], torch.tensor([0]), 0.25) < 1e-6


def test_copies_come_from_the_sampler_and_pass_gradients():
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(2, 1, 3, 3, requires_grad=True)
    copies = noisy_copies(x, 0.5, 3, generator=generator)
    key = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(4)))
    assert torch.equal(copies, gaussian_samples(x, 0.5, 3, seed=key))
    copies.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3.0))
    assert not torch.equal(noisy_copies(x, 0.5, 3, generator=generator), copies)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_objectives_are_seeded_differentiable_and_leave_the_mode(objective):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.Dropout(0.1), nn.Linear(8, 3)).train()
    x, labels = torch.rand(4, 1, 3, 3), torch.tensor([0, 1, 2, 0])
    torch.manual_seed(7)
    first = objective(model, x, labels, 0.5)
    assert model.training
    first.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    torch.manual_seed(7)
    assert torch.equal(objective(model, x, labels, 0.5), first)


def test_smooth_adv_training_starts_with_plain_augmentation():
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 3))
    x, labels = torch.rand(4, 1, 3, 3), torch.tensor([0, 1, 2, 0])
    objective = SmoothAdvTraining(0.25, copies=3, eps=0.5, warm_up=0.5)
    torch.manual_seed(1)
    start = objective(model, x, labels, 0.0)
    torch.manual_seed(1)
    torch.testing.assert_close(start, GaussianAugmentation(0.25, copies=3)(model, x, labels))
    torch.manual_seed(1)
    assert objective(model, x, labels, 1.0) > start


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_training_lowers_the_smoothed_error_on_digits(objective):
    data = load_digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    untrained = copy.deepcopy(model)
    fit(model, data.train_images, data.train_labels, objective=objective, epochs=15)

    def smoothed_accuracy(network):
        with torch.no_grad():
            copies = noisy_copies(data.test_images, 0.25, 64)
            votes = network(copies.flatten(0, 1)).view(len(data.test_images), 64, 10)
        right = votes.softmax(-1).mean(1).argmax(-1) == data.test_labels
        return right.float().mean().item()

    assert smoothed_accuracy(untrained) < 0.3
    assert smoothed_accuracy(model) > 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_augmentation_loss(CLEAN, LABELS), r"logits must have shape \(B, copies"),
        (lambda: smoothed_cross_entropy(LOGITS, LABELS[:2]), r"labels must have shape \(6\)"),
        (lambda: stability_loss(CLEAN[:2], LOGITS, LABELS), "clean must have shape"),
        (lambda: stability_loss(CLEAN, LOGITS, LABELS, weight=-1.0), "weight must be finite"),
        (lambda: macer_loss(LOGITS, LABELS, 0.0), "sigma must be finite and positive"),
        (lambda: macer_loss(LOGITS, LABELS, 1.0, gamma=0.0), "gamma must be finite and positive"),
        (lambda: consistency_penalty(CLEAN), r"logits must have shape \(copies, N, K\)"),
        (lambda: GaussianAugmentation(0.0), "sigma must be finite and positive"),
        (lambda: GaussianAugmentation(0.1, copies=0), "copies must be at least 1"),
        (lambda: ConsistencyTraining(0.1, copies=1), "copies must be at least 2"),
        (lambda: MacerTraining(0.1, beta=math.nan), "beta must be finite and positive"),
        (lambda: SmoothAdvTraining(0.1, eps=0.0), "eps must be finite and positive"),
        (lambda: SmoothAdvTraining(0.1, copies=1, consistency=1.0), "copies must be at least 2"),
        (lambda: StabilityTraining(0.1, weight=-1.0), "weight must be finite and at least 0"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
