"""Unrolled fine-tuning against the same computation by hand, on one linear layer."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyrobust.train import LoRA, LoRAWatermark, UnrolledFineTuning, adapters, apply_adapter

X, Y, GOAL = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))


def adapted():
    model = apply_adapter(nn.Sequential(nn.Linear(6, 6)), LoRA(("0",), r=2, alpha=4))
    with torch.no_grad():
        model[0].lora_B.normal_()
    return model


def tuning_loss(model):
    return F.mse_loss(model(X), Y)


def goal_loss(model):
    return F.mse_loss(model(X), GOAL)


def tuned_by_hand(model, steps, lr):
    adapter = model[0]
    plain = nn.Sequential(copy.deepcopy(adapter.base)).requires_grad_(True)
    with torch.no_grad():
        plain[0].weight += adapter.delta_weight()
    optimizer = torch.optim.AdamW(plain.parameters(), lr, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        tuning_loss(plain).backward()
        optimizer.step()
    return plain


def test_gradient_is_that_of_the_goal_at_the_fine_tuned_weights():
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = UnrolledFineTuning(steps=3, lr=0.05, weight=2.0).add_gradient_(
        model, tuning_loss, goal_loss
    )
    plain = tuned_by_hand(model, 3, 0.05)
    assert loss == pytest.approx(goal_loss(plain).item(), rel=1e-5)
    gradient = torch.autograd.grad(goal_loss(plain), plain[0].weight)[0]
    a, b = model[0].lora_A, model[0].lora_B
    torch.testing.assert_close(b.grad, 2 * 2 * gradient @ a.detach().T)  # alpha / r is 2 as well
    torch.testing.assert_close(a.grad, 2 * 2 * b.detach().T @ gradient)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert model[0].base.weight.grad is None
    assert not model[0].base.weight.requires_grad
    assert not model[0].merged


def test_gradients_add_up():
    model, job = adapted(), {"steps": 2, "lr": 0.05}
    UnrolledFineTuning(**job).add_gradient_(model, tuning_loss, goal_loss)
    once = model[0].lora_B.grad.clone()
    UnrolledFineTuning(**job).add_gradient_(model, tuning_loss, goal_loss)
    torch.testing.assert_close(model[0].lora_B.grad, 2 * once)


def test_fine_tuning_goes_on_between_calls_up_to_the_horizon():
    model = adapted()
    unrolled = UnrolledFineTuning(steps=2, horizon=5, lr=0.05)
    losses = [unrolled.add_gradient_(model, tuning_loss, goal_loss) for _ in range(4)]
    expected = [goal_loss(tuned_by_hand(model, steps, 0.05)).item() for steps in (2, 4)]
    assert losses == pytest.approx(expected + expected, rel=1e-4)


def test_weight_noise_alone():
    model, losses = adapted(), []
    for seed, noise in ((0, 0.1), (0, 0.1), (1, 0.1), (0, 1e-9)):
        shaken = UnrolledFineTuning(steps=0, noise=noise, seed=seed)
        losses.append(shaken.add_gradient_(model, tuning_loss, goal_loss))
    assert losses[0] == losses[1] != losses[2]
    assert losses[3] == pytest.approx(goal_loss(model).item(), rel=1e-5)
    assert losses[0] != pytest.approx(losses[3], rel=1e-3)


def test_the_watermark_calls_it_every_so_many_steps():
    class Counting(UnrolledFineTuning):
        calls = 0

        def add_gradient_(self, *arguments):
            self.calls += 1
            return super().add_gradient_(*arguments)

    decoder = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)).eval()
    extractor = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).eval()
    message, counting = torch.tensor([1, 0, 0, 1]), Counting(steps=1, every=3)
    plain = LoRAWatermark(copy.deepcopy(decoder), ["0"], message, extractor, r=2)
    mark = LoRAWatermark(decoder, ["0"], message, extractor, r=2, fine_tuning=counting)
    for one in adapters(plain.decoder).values():
        one.load_state_dict(adapters(mark.decoder)["0"].state_dict())
    batches = torch.randn(8, 5, 2, 6, 6)
    assert plain.fit(batches[:3]) == mark.fit(batches[:3])
    plain.fit(batches[3:])
    mark.fit(batches[3:])
    assert counting.calls == 2
    assert not torch.equal(plain.decoder[0].lora_B, mark.decoder[0].lora_B)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps must be"),
        ({"steps": 5, "horizon": 4}, "horizon must be"),
        ({"every": 0}, "every must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"weight": 0.0}, "weight must be"),
        ({"noise": -0.1}, "noise must be"),
        ({"steps": 0}, "steps or noise must be above 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        UnrolledFineTuning(**options)
