"""First-order unrolled fine-tuning: train adapters so that a goal outlives clean fine-tuning.

Every few steps a copy of the model with its adapters merged is fine-tuned as the one who receives
the weights would do it, for some steps and without the goal; the gradient of the goal's loss at the
fine-tuned weights is then taken as the gradient at the merged weights (the fine-tuning itself is
not differentiated) and passed on to the factors of the adapters. Gaussian noise on the weights is
the cheap variant, without fine-tuning.

Source: the first-order approximation of Finn et al., "Model-Agnostic Meta-Learning", ICML 2017,
arXiv 1703.03400, section 5.2, used against fine-tuning as in Tamirisa et al., "Tamper-Resistant
Safeguards for Open-Weight LLMs", ICLR 2025, arXiv 2408.00761. Departures: one goal, adapters only;
the copy's displacement is carried over to the next call until ``horizon`` steps have been made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyrobust._checks import check_at_least, check_integer, check_positive
from pyrobust.train.adapters import adapters, merge_adapters

__all__ = ["UnrolledFineTuning"]


class UnrolledFineTuning:
    """Adds the gradient of a loss at fine-tuned (and shaken) weights to that of the adapters.

    Args:
        steps: fine-tuning steps of a call, ``>= 0``; 0 leaves the weight noise alone.
        horizon: fine-tuning steps before the copy starts again from the merged weights,
            ``>= steps``.
        every: the trainer calls every so many of its own steps, ``>= 1``.
        lr: AdamW learning rate of the fine-tuning, ``> 0``.
        weight: factor of the added gradient, ``> 0``.
        noise: standard deviation of Gaussian noise on the adapted weights, relative to the root
            mean square of each, ``>= 0``.
        seed: of the noise.

    Raises:
        ValueError: a value out of range, or neither steps nor noise.
    """

    def __init__(
        self,
        *,
        steps: int = 5,
        horizon: int = 50,
        every: int = 2,
        lr: float = 1e-4,
        weight: float = 1.0,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        subject = "UnrolledFineTuning"
        check_integer(subject, "steps", steps, 0)
        check_integer(subject, "horizon", horizon, max(1, steps))
        check_integer(subject, "every", every, 1)
        check_positive(subject, "lr", lr)
        check_positive(subject, "weight", weight)
        check_at_least(subject, "noise", noise, 0.0)
        if steps == 0 and noise == 0:
            raise ValueError(f"{subject}: steps or noise must be above 0; got 0 and 0.")
        self.steps, self.horizon, self.every, self.lr = steps, horizon, every, lr
        self.weight, self.noise = weight, noise
        self._generator = torch.Generator().manual_seed(seed)
        self._displacement: dict[str, Tensor] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._made = 0

    def add_gradient_(
        self,
        model: nn.Module,
        tuning_loss: Callable[[nn.Module], Tensor],
        goal_loss: Callable[[nn.Module], Tensor],
    ) -> float:
        """Add to the ``grad`` of the adapters' factors in ``model``.

        Args:
            model: with unmerged adapters.
            tuning_loss: what the fine-tuning lowers, of a plain copy of the model.
            goal_loss: what must stay low.

        Returns:
            ``goal_loss`` at the fine-tuned weights.
        """
        tuned = self._fine_tuned(model, tuning_loss)
        layers = {name: adapter.base.weight for name, adapter in adapters(tuned).items()}
        with torch.no_grad():
            for weight in layers.values():
                self._shake_(weight)
        loss = goal_loss(tuned)
        gradients = torch.autograd.grad(loss, list(layers.values()))
        own = adapters(model)
        updates = [own[name].delta_weight() for name in layers]
        torch.autograd.backward(updates, [self.weight * g for g in gradients])
        return loss.item()

    def _fine_tuned(
        self, model: nn.Module, tuning_loss: Callable[[nn.Module], Tensor]
    ) -> nn.Module:
        """A merged copy, displaced as the calls before left it, after ``steps`` more steps."""
        tuned = merge_adapters(copy.deepcopy(model)).requires_grad_(True)
        if self._made + self.steps > self.horizon:
            self._displacement, self._optimizer, self._made = {}, None, 0
        start = {name: p.detach().clone() for name, p in tuned.named_parameters()}
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if name in self._displacement:
                    parameter.add_(self._displacement[name])
        optimizer = torch.optim.AdamW(tuned.parameters(), self.lr, weight_decay=0.0)
        if self._optimizer is not None:
            optimizer.load_state_dict(self._optimizer.state_dict())
        for _ in range(self.steps):
            optimizer.zero_grad()
            tuning_loss(tuned).backward()
            optimizer.step()
        self._optimizer, self._made = optimizer, self._made + self.steps
        self._displacement = {
            name: p.detach() - start[name] for name, p in tuned.named_parameters()
        }
        return tuned

    def _shake_(self, weight: Tensor) -> None:
        if self.noise:
            scale = self.noise * weight.square().mean().sqrt()
            shake = torch.randn(weight.shape, generator=self._generator).to(weight)
            weight.add_(scale * shake)
