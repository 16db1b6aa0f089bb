"""The report takes the worst case, and sees through models whose gradients mislead."""

import pytest
import torch
from torch import nn

from pyrobust.data import load_digits
from pyrobust.evaluate import attack_report, pgd
from pyrobust.train import GaussianCrossEntropy, fit


@pytest.fixture(scope="module")
def digits_model():
    torch.manual_seed(0)
    data = load_digits()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    fit(model, data.train_images, data.train_labels, objective=GaussianCrossEntropy(), epochs=5)
    return model, data.test_images[:60], data.test_labels[:60]


class Scaled(nn.Module):
    """The same classes, but a softmax so saturated that gradients underflow to zero."""

    def __init__(self, inner, scale):
        super().__init__()
        self.inner = inner
        self.scale = scale

    def forward(self, x):
        return self.inner(x) * self.scale


class Rounded(nn.Module):
    """The same classes on inputs rounded to 32 levels: no gradient at all."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner((x * 32).round() / 32)


class Random(nn.Module):
    """Noise on the input, fresh at each call."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + 0.2 * torch.randn_like(x))


def test_an_undefended_model_breaks_without_signs(digits_model):
    report = attack_report(*digits_model, eps=0.1, steps=10)
    accuracies = report.accuracies
    assert accuracies["clean"] > 0.9
    assert accuracies["worst case"] == min(accuracies.values())
    assert accuracies["worst case"] < accuracies["random points"]
    assert not report.masked
    assert "worst case" in report.summary()
    assert report.to_dict()["inputs"] == 60
    size = max(float((p - report.points["clean"]).abs().max()) for p in report.points.values())
    assert size <= 0.1 + 1e-6


def test_saturated_gradients_are_flagged_and_the_scale_free_attack_sees_through(digits_model):
    model, x, y = digits_model
    plain = attack_report(model, x, y, eps=0.1, steps=10).accuracies
    report = attack_report(Scaled(model, 300.0).eval(), x, y, eps=0.1, steps=10)
    assert report.accuracies["PGD-10"] > plain["PGD-10"] + 0.1
    assert report.accuracies["APGD-T"] <= plain["APGD-T"] + 0.02
    assert any("exactly zero" in sign for sign in report.signs)


def test_a_model_without_gradients_is_flagged_and_a_transfer_attack_breaks_it(digits_model):
    model, x, y = digits_model
    rounded = Rounded(model).eval()
    transfer = {"transfer": lambda: pgd(rounded, x, y, eps=0.1, steps=10, surrogate=model)}
    report = attack_report(rounded, x, y, eps=0.1, steps=10, extra=transfer)
    assert any("exactly zero" in sign for sign in report.signs)
    assert any("transfer breaks" in sign for sign in report.signs)
    assert any("allows every input" in sign for sign in report.signs)
    assert report.accuracies["transfer"] < report.accuracies["APGD-CE"] - 0.3


def test_randomness_is_flagged_until_it_is_averaged(digits_model):
    model, x, y = digits_model
    noisy = Random(model).eval()
    report = attack_report(noisy, x[:40], y[:40], eps=0.1, steps=5)
    assert any("samples = 1" in sign for sign in report.signs)
    averaged = attack_report(noisy, x[:40], y[:40], eps=0.1, steps=5, samples=4)
    assert not any("samples = 1" in sign for sign in averaged.signs)


def test_bad_input_is_refused(digits_model):
    for options, message in [({"eps": 0.0}, "eps"), ({"eps": 0.1, "steps": 0}, "steps")]:
        with pytest.raises(ValueError, match=message):
            attack_report(*digits_model, **options)
