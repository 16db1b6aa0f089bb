import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyrobust.train import GaussianCrossEntropy, fit
from pyrobust.train.loop import _LossWatch


def blobs():
    """Two separable clouds in the plane."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(200, 2, generator=generator) * 0.3
    labels = torch.arange(200) % 2
    return points + labels[:, None] * 2.0 - 1.0, labels


def train(objective, seed=0):
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(seed)
    return fit(
        nn.Linear(2, 2),
        *blobs(),
        objective=objective,
        epochs=5,
        learning_rate=0.05,
        generator=generator,
    )


def test_fit_learns_and_ends_in_evaluation_mode():
    model = train(GaussianCrossEntropy())
    points, labels = blobs()
    assert not model.training
    assert (model(points).argmax(1) == labels).float().mean() > 0.98


def test_fit_repeats_for_equal_generators():
    first, again, other = (train(GaussianCrossEntropy(), seed) for seed in (3, 3, 4))
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)


def test_fit_passes_the_share_of_training_that_is_done():
    seen = []

    def objective(model, x, labels, done):
        seen.append(done)
        return F.cross_entropy(model(x), labels)

    fit(nn.Linear(2, 2), *blobs(), objective=objective, epochs=2, batch_size=150)
    assert seen == pytest.approx([0, 0.25, 0.5, 0.75])


def test_gaussian_cross_entropy_averages_to_the_noisy_risk():
    model = nn.Linear(2, 2)
    points, labels = blobs()
    plain = GaussianCrossEntropy()(model, points, labels)
    assert torch.equal(plain, F.cross_entropy(model(points), labels))
    noisy = GaussianCrossEntropy(0.5, torch.Generator().manual_seed(5))(model, points, labels)
    noise = torch.randn(points.shape, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(noisy, F.cross_entropy(model(points + 0.5 * noise), labels))


def test_bad_arguments_and_a_diverging_loss_are_refused():
    with pytest.raises(ValueError, match="GaussianCrossEntropy: sigma must be"):
        GaussianCrossEntropy(-1.0)
    with pytest.raises(ValueError, match="fit: epochs must be at least 1; got 0"):
        fit(nn.Linear(2, 2), *blobs(), objective=GaussianCrossEntropy(), epochs=0)
    with pytest.raises(FloatingPointError, match="the loss became nan"):
        fit(
            nn.Linear(2, 2),
            *blobs(),
            objective=lambda model, x, y, done: model(x).sum() * float("nan"),
            epochs=1,
        )


def test_fit_takes_an_optimizer_with_groups_a_schedule_and_a_call_after_each_step():
    model, calls = nn.Linear(2, 2), []
    groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.01}]
    optimizer = torch.optim.SGD(groups)

    def seen():
        calls.append([group["lr"] for group in optimizer.param_groups])

    options = {"objective": GaussianCrossEntropy(), "optimizer": optimizer, "batch_size": 100}
    fit(model, *blobs(), epochs=2, schedule=lambda done: 1 - done, after_step=seen, **options)
    assert torch.allclose(torch.tensor(calls)[:, 0], torch.tensor([0.1, 0.075, 0.05, 0.025]))
    assert torch.allclose(torch.tensor(calls)[:, 1], torch.tensor([0.01, 0.0075, 0.005, 0.0025]))
    fit(model, *blobs(), epochs=1, schedule=lambda _: 1.0, after_step=seen, **options)
    assert calls[-1] == [0.1, 0.01]


def test_gradients_are_scaled_down_to_the_largest_norm():
    model = torch.nn.Linear(3, 2)
    start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    x, y = torch.randn(4, 3), torch.arange(4) % 2
    options = {"epochs": 1, "batch_size": 4, "optimizer": optimizer, "max_norm": 1e-3}
    fit(model, x, y, objective=GaussianCrossEntropy(), **options)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-2)
    with pytest.raises(ValueError, match="max_norm"):
        fit(model, x, y, objective=GaussianCrossEntropy(), epochs=1, max_norm=0.0)


def test_losses_of_other_devices_are_read_some_at_a_time():
    watch = _LossWatch()
    watch.see(torch.zeros(()))
    watch._AT_A_TIME, watch._unread = 3, []
    later = torch.ones((), device="meta")
    watch.see(later)
    watch.see(later)
    assert len(watch._unread) == 2  # not read
    watch._unread = [torch.tensor(1.0), torch.tensor(float("nan"))]
    with pytest.raises(FloatingPointError, match="nan at step 2"):
        watch.look()
