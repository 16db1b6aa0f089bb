"""Training on a part of noisy inputs and the consistency penalty."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyrobust.certify import SubImage, checkerboard_masks
from pyrobust.train import NoisyConsistency, consistency_penalty, train_subclassifier


def test_penalty_agrees_with_torch_divergence():
    logits = torch.randn(4, 6, 3, dtype=torch.float64)
    mean = logits.softmax(-1).mean(0)
    divergence = sum(F.kl_div(each.log_softmax(-1), mean, reduction="batchmean") for each in logits)
    entropy = torch.distributions.Categorical(mean).entropy().mean()
    expected = divergence / 4 + 0.05 * entropy
    torch.testing.assert_close(consistency_penalty(logits), expected)


def test_penalty_is_zero_for_equal_certain_copies_and_differentiable():
    certain = torch.tensor([[[200.0, 0.0]]]).repeat(3, 1, 1)
    assert consistency_penalty(certain) == 0
    logits = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(consistency_penalty, (logits,))


def test_objective_without_penalty_is_cross_entropy_of_the_part():
    mask = checkerboard_masks((4, 4))[0]
    model, view = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), SubImage(mask)
    x, labels = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    objective = NoisyConsistency(0.3, view=view, generator=torch.Generator().manual_seed(4))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    expected = F.cross_entropy(model(view(x + 0.3 * noise)), labels)
    torch.testing.assert_close(objective(model, x, labels, 0.0), expected)


def test_training_learns_from_one_half_and_consistency_draws_the_copies_together():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(128) % 2
    images = torch.rand(128, 1, 4, 4, generator=generator) * 0.2 + labels[:, None, None, None]
    mask = checkerboard_masks((4, 4))[1]
    spread = []
    for consistency in (0.0, 15.0):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        train_subclassifier(
            model,
            images,
            labels,
            mask=mask,
            sigma=1.0,
            consistency=consistency,
            copies=4,
            epochs=8,
            generator=torch.Generator().manual_seed(2),
        )
        assert not model.training
        view = SubImage(mask)
        assert (model(view(images)).argmax(1) == labels).float().mean() > 0.95
        noise = torch.randn(4, *images.shape, generator=torch.Generator().manual_seed(3))
        logits = torch.stack([model(view(images + each)) for each in noise])
        spread.append(consistency_penalty(logits, entropy=0.0).item())
    assert spread[1] < 0.7 * spread[0], spread


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="copies must be at least 2; got 1"):
        NoisyConsistency(0.5, consistency=1.0)
    with pytest.raises(ValueError, match="sigma must be finite and positive"):
        NoisyConsistency(0.0)
    with pytest.raises(ValueError, match=r"logits must have shape \(copies, N, K\)"):
        consistency_penalty(torch.zeros(2, 3))
