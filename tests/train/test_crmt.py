"""CRMT: the losses by their formulas, step 2, and the small claim on halves of digits."""

import math

import pytest
import torch
from torch import nn

from pyrobust.data import load_digits
from pyrobust.nn import FusionOutput, LateFusion, OrthogonalFusion
from pyrobust.train import (
    MultimodalMarginLoss,
    crmt_integration_step,
    fit_crmt,
    mixup_margin,
    multimodal_margin,
)


def naive(modality_logits, labels):
    total = torch.full((len(labels),), 1e-5, dtype=torch.float64)
    for h in modality_logits:
        for k in range(h.shape[1]):
            wrong = labels != k
            gap = h[:, k] - h[torch.arange(len(labels)), labels]
            total = total + torch.where(wrong, gap.exp(), 0.0)
    return total.log().mean()


def test_margin_equals_its_formula_and_survives_large_logits():
    each = [torch.randn(9, 5, dtype=torch.float64) for _ in range(3)]
    labels = torch.arange(9) % 5
    torch.testing.assert_close(
        multimodal_margin(each, labels), naive(each, labels), rtol=1e-9, atol=0
    )
    huge = [1e3 * h.float() for h in each]
    assert math.isfinite(float(multimodal_margin(huge, labels)))
    flat = [h.requires_grad_() for h in each]
    assert torch.autograd.gradcheck(lambda *h: multimodal_margin(h, labels), flat)


def test_mixed_margin_equals_its_formula():
    each = [torch.randn(6, 5, dtype=torch.float64) for _ in range(2)]
    a, b, share = torch.arange(6) % 5, torch.tensor([1, 1, 2, 0, 0, 3]), 0.3
    rows = torch.arange(6)
    total = torch.full((6,), 1e-5, dtype=torch.float64)
    for h in each:
        positive = share * h[rows, a] + (1 - share) * h[rows, b]
        for k in range(5):
            total = total + torch.where((a != k) & (b != k), (h[:, k] - positive).exp(), 0.0)
    torch.testing.assert_close(mixup_margin(each, a, b, share), total.log().mean())
    torch.testing.assert_close(mixup_margin(each, a, a, 0.7), multimodal_margin(each, a))


def test_loss_is_cross_entropy_plus_margin():
    each, labels = [torch.randn(4, 3), torch.randn(4, 3)], torch.tensor([0, 1, 2, 0])
    output = FusionOutput(each[0] + each[1], each)
    entropy = nn.functional.cross_entropy(output.logits, labels)
    expected = entropy + 1.5 * multimodal_margin(each, labels)
    torch.testing.assert_close(MultimodalMarginLoss(1.5)(output, labels), expected)


def head_and_batches():
    torch.manual_seed(0)
    head = OrthogonalFusion([8, 8], 3)
    labels = torch.arange(30) % 3
    features = [torch.randn(30, 8) + 2 * head.classifier(m).detach()[labels] for m in range(2)]
    return head, [(features, labels)]


def test_step_two_moves_only_the_scales_and_raises_the_radius():
    head, batches = head_and_batches()
    before = {n: p.detach().clone() for n, p in head.named_parameters()}
    history = crmt_integration_step(head, batches, torch.ones(2, 3), lr=1e-3, epochs=20)
    assert history.radius[-1] > history.radius[0]
    for name, p in head.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("scale")
        if name.startswith("scale"):
            assert float(p.detach().min()) >= 0


def test_step_two_goes_back_when_accuracy_falls():
    head, batches = head_and_batches()
    before = [a.detach().clone() for a in head.scale]
    answers = iter([0.9, 0.895, 0.5])
    kept = []

    def validate():
        kept.append([a.detach().clone() for a in head.scale])
        return next(answers)

    history = crmt_integration_step(
        head, batches, torch.ones(2, 3), lr=0.05, epochs=9, validate=validate
    )
    assert history.stopped
    assert history.accuracy == [0.9, 0.895, 0.5]
    assert all(torch.equal(a, b) for a, b in zip(head.scale, kept[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(head.scale, before, strict=True))


def halves():
    digits = load_digits()
    split = lambda x: [x[..., :4].flatten(1), x[..., 4:].flatten(1)]  # noqa: E731
    return (
        split(digits.train_images),
        digits.train_labels,
        split(digits.test_images),
        digits.test_labels,
    )


def train(seed, rho, epochs, base="joint", **options):
    torch.manual_seed(seed)
    x, y, test, labels = halves()
    encoders = [nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(2)]
    model = LateFusion(encoders, OrthogonalFusion([32, 32], 10))
    order = torch.Generator().manual_seed(seed)

    class Batches:
        def __iter__(self):
            for part in torch.randperm(len(y), generator=order).split(64):
                yield [v[part] for v in x], y[part]

    fit_crmt(model, Batches(), rho=rho, epochs=epochs, lr=0.02, base=base, seed=seed, **options)

    def accuracy(*inputs):
        with torch.no_grad():
            return float((model(*inputs).logits.argmax(1) == labels).float().mean())

    zeros = [torch.zeros_like(v) for v in test]
    return torch.tensor([accuracy(*test), accuracy(zeros[0], test[1]), accuracy(test[0], zeros[1])])


@pytest.mark.slow
def test_each_modality_alone_gains():
    """Mean of three seeds, 60 epochs: missing-modality accuracy against plain joint training."""
    plain = torch.stack([train(s, 0.0, 60, integration_epochs=0) for s in range(3)]).mean(0)
    margin = torch.stack([train(s, 4.0, 60, integration_epochs=0) for s in range(3)]).mean(0)
    assert float(margin[1]) >= float(plain[1]) + 0.25
    assert float(margin[2]) >= float(plain[2]) + 0.25
    assert abs(float(margin[0]) - float(plain[0])) <= 0.01


@pytest.mark.slow
def test_the_second_step_keeps_what_the_first_gained():
    """Mean of three seeds: rho 2, then 10 epochs on the scales, guarded by training accuracy."""
    x, y, _, _ = halves()
    step = {"integration_epochs": 10, "integration_lr": 1e-3, "validation": (x, y)}
    plain = torch.stack([train(s, 0.0, 60, integration_epochs=0) for s in range(3)]).mean(0)
    both = torch.stack([train(s, 2.0, 60, **step) for s in range(3)]).mean(0)
    assert float(both[1]) >= float(plain[1]) + 0.25
    assert float(both[2]) >= float(plain[2]) + 0.25
    assert float(both[0]) >= float(plain[0]) - 0.01


@pytest.mark.parametrize("base", ["joint", "adversarial", "mixup"])
def test_every_base_trains_and_is_reproducible(base):
    x, y, _, _ = halves()
    first = train(0, 2.0, 2, base, validation=(x, y), integration_epochs=1)
    again = train(0, 2.0, 2, base, validation=(x, y), integration_epochs=1)
    assert torch.equal(first, again)
    assert float(first[0]) > 0.5


def test_refusals():
    head, batches = head_and_batches()
    model = LateFusion([nn.Identity(), nn.Identity()], head)
    with pytest.raises(ValueError, match="base must be one of joint, adversarial, mixup"):
        fit_crmt(model, batches, base="other")
    with pytest.raises(ValueError, match="loader must give at least one batch"):
        fit_crmt(model, [], epochs=1)
    with pytest.raises(ValueError, match=r"must be \(inputs, labels\); got \(list, NoneType\)"):
        fit_crmt(model, [([torch.zeros(1, 8)] * 2, None)], epochs=1)
    with pytest.raises(ValueError, match="rho must be finite and at least"):
        MultimodalMarginLoss(-1.0)
    with pytest.raises(ValueError, match="positive constants"):
        crmt_integration_step(head, batches, torch.zeros(2, 3), lr=0.1)
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        crmt_integration_step(head, [], torch.ones(2, 3), lr=0.1)
    with pytest.raises(ValueError, match="share must lie in the interval"):
        mixup_margin([torch.zeros(1, 2)], torch.tensor([0]), torch.tensor([0]), 1.5)
    with pytest.raises(ValueError, match="at least one modality"):
        multimodal_margin([], torch.tensor([0]))
    with pytest.raises(ValueError, match=r"must be \(B, K\), \(B,\) and \(B,\)"):
        multimodal_margin([torch.zeros(2, 2)], torch.tensor([0]))
