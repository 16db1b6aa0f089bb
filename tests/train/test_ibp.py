import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyrobust.train import IntervalTraining, fit, interval_loss, worst_logits


def network():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)
    ).eval()


def centre_radius(model, x, eps):
    """The textbook bounds in float64, written out for this network."""
    conv, linear = model[0], model[3]
    low, high = (x - eps).clamp(0, 1).double(), (x + eps).clamp(0, 1).double()
    weight, bias = conv.weight.double(), conv.bias.double()
    c = F.conv2d((low + high) / 2, weight, bias, padding=1)
    r = F.conv2d((high - low) / 2, weight.abs(), padding=1)
    low, high = (c - r).relu().flatten(1), (c + r).relu().flatten(1)
    weight, bias = linear.weight.double(), linear.bias.double()
    c = F.linear((low + high) / 2, weight, bias)
    r = F.linear((high - low) / 2, weight.abs())
    return c - r, c + r


def test_worst_logits_mixes_the_ends():
    lower, upper = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[3.0, 4.0, 5.0]])
    assert worst_logits(lower, upper, torch.tensor([2])).tolist() == [[3.0, 4.0, 2.0]]


def test_interval_loss_is_the_loss_of_the_textbook_bounds():
    model, x, labels = network(), torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 3, 0])
    low, high = centre_radius(model, x, 0.1)
    worst = torch.where(F.one_hot(labels, 4).bool(), low, high)
    expected = F.cross_entropy(worst, labels)
    loss = interval_loss(model, x, labels, eps=0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    references = torch.autograd.grad(expected, list(model.parameters()))
    for ours, reference in zip(gradients, references, strict=True):
        assert torch.allclose(ours, reference, rtol=1e-3, atol=1e-5)


def test_interval_loss_bounds_the_loss_of_every_point():
    model, x, labels = network(), torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2])
    bound = interval_loss(model, x, labels, eps=0.1)
    for _ in range(200):
        point = (x + 0.1 * torch.randn(x.shape).sign()).clamp(0, 1)
        assert F.cross_entropy(model(point), labels) <= bound + 1e-6
    assert interval_loss(model, x, labels, eps=0.0).item() == pytest.approx(
        F.cross_entropy(model(x), labels).item(), rel=1e-5
    )


def test_the_schedules_start_clean_and_end_at_kappa():
    model, x, labels = network(), torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2])
    objective = IntervalTraining(0.2, kappa=0.25, begin=0.1, end=0.5)
    clean = F.cross_entropy(model(x), labels)
    assert torch.equal(objective(model, x, labels, 0.1), clean)
    half = interval_loss(model, x, labels, eps=0.1)
    expected = 0.625 * clean + 0.375 * half
    assert objective(model, x, labels, 0.3).item() == pytest.approx(expected.item(), rel=1e-5)
    full = interval_loss(model, x, labels, eps=0.2)
    expected = 0.25 * clean + 0.75 * full
    assert objective(model, x, labels, 0.9).item() == pytest.approx(expected.item(), rel=1e-5)


def test_training_tightens_the_bounds():
    x, labels = torch.rand(64, 1, 4, 4) * 0.5, torch.arange(64) % 4
    x[torch.arange(64), 0, labels, :] = 1.0
    model = network()
    before = interval_loss(model, x, labels, eps=0.1).item()
    objective = IntervalTraining(0.1)
    fit(model, x, labels, objective=objective, epochs=30, batch_size=32, learning_rate=0.03)
    low, high = centre_radius(model, x, 0.1)
    worst = torch.where(F.one_hot(labels, 4).bool(), low, high)
    assert interval_loss(model, x, labels, eps=0.1) < 0.3 * before
    assert (worst.argmax(1) == labels).float().mean() > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": 0.0}, "eps must be finite and positive"),
        ({"eps": 0.1, "kappa": 1.5}, r"kappa must lie in the interval \[0, 1\]"),
        ({"eps": 0.1, "begin": 0.7}, r"end must be finite and at least 0\.7; got 0\.6"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        IntervalTraining(**arguments)
