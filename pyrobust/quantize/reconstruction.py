"""Reconstruction: move rounding variables until quantized outputs meet those of the float model.

The loop of learned rounding: a loss between outputs, a penalty that drives the variables to
integers, an optimizer, and the hardening at the end.

Source: Nagel et al., "Up or down? Adaptive rounding for post-training quantization", ICML 2020,
arXiv 2004.10568 (penalty and its annealing); Cheng et al., "Optimize weight rounding via signed
gradient descent for the quantization of LLMs", arXiv 2309.05516 (sign descent).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from pyrobust.quantize.learned_activation import LearnedActivation
from pyrobust.quantize.qtensor import QTensor
from pyrobust.quantize.rounding_grid import RoundingGrid
from pyrobust.quantize.rounding_variable import RoundingVariable

__all__ = [
    "LOSSES",
    "OPTIMIZERS",
    "LearnedWeight",
    "Rounded",
    "Schedule",
    "output_loss",
    "reconstruct",
]

LOSSES = ("mse", "l1", "cosine", "kl")
OPTIMIZERS = ("adam", "sgd", "sign")
_BETAS = (20.0, 2.0)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        iterations: steps.
        optimizer: ``"adam"``, ``"sgd"`` (momentum 0.9) or ``"sign"`` (linear decay).
        learning_rate: of the rounding variables.
        scale_rate: of the logarithms of the scales.
        regularization: weight of the penalty.
        warmup: share of the steps without it.
    """

    iterations: int
    optimizer: str
    learning_rate: float
    scale_rate: float
    regularization: float
    warmup: float

    def beta(self, done: float) -> float | None:
        """The exponent of the penalty at a share of the steps; None while it is off."""
        if done < self.warmup:
            return None
        share = (done - self.warmup) / max(1e-9, 1 - self.warmup)
        high, low = _BETAS
        return low + (high - low) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class Rounded:
    """Integer steps on a grid.

    Attributes:
        grid: with its scales.
        steps: ``(rows, cols)``.
    """

    grid: RoundingGrid
    steps: Tensor

    def qtensor(self) -> QTensor:
        """As packed codes."""
        return self.grid.qtensor(self.steps)


class LearnedWeight:
    """The weight of one layer while its rounding is learned.

    Args:
        weight: ``(rows, cols)`` float32.
        grid: its levels.
        variable: its offsets.
        learn_scale: whether scales move.

    Attributes:
        log_scale: change of the logarithm of each scale, or None where scales are fixed.
    """

    def __init__(
        self, weight: Tensor, grid: RoundingGrid, variable: RoundingVariable, learn_scale: bool
    ) -> None:
        self.weight, self.grid, self.variable = weight, grid, variable
        self.log_scale = torch.zeros_like(grid.scale).requires_grad_() if learn_scale else None

    @property
    def scale(self) -> Tensor:
        """The present scales."""
        if self.log_scale is None:
            return self.grid.scale
        return self.grid.scale * self.log_scale.exp()

    def soft(self) -> Tensor:
        """The weight with its offsets as they are: differentiable."""
        steps = self.variable.floor + self.variable.offsets()
        return self.grid.values(self._inside(steps), self.scale)

    def hard(self) -> Rounded:
        """Where it ends, with the learned scales."""
        grid = replace(self.grid, scale=self.scale.detach())
        return Rounded(grid, self._inside(self.variable.floor + self.variable.hard()))

    def nearest(self) -> Rounded:
        """Rounding to nearest, with the scales it started from."""
        return Rounded(self.grid, self.grid.nearest(self.weight))

    def _inside(self, steps: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(steps, self.grid.low), self.grid.high)


def output_loss(output: Tensor, reference: Tensor, kind: str) -> Tensor:
    """Distance of outputs ``(rows, channels)``: summed over channels, averaged over rows.

    Args:
        output: of the quantized layer.
        reference: of the float one.
        kind: ``"mse"``, ``"l1"``, ``"cosine"`` (1 - cosine, times channels) or ``"kl"`` (of the
            softmax over channels, reference first, times channels).
    """
    if kind == "mse":
        return (output - reference).square().sum(1).mean()
    if kind == "l1":
        return (output - reference).abs().sum(1).mean()
    channels = output.shape[1]
    if kind == "cosine":
        return channels * (1 - F.cosine_similarity(output, reference, dim=1)).mean()
    logs = (output.log_softmax(1), reference.log_softmax(1))
    return channels * F.kl_div(*logs, reduction="batchmean", log_target=True)


def reconstruct(
    weights: dict[str, LearnedWeight],
    loss: Callable[[dict[str, Tensor]], Tensor],
    schedule: Schedule,
    activations: Sequence[LearnedActivation] = (),
) -> None:
    """Move the variables (and scales) of ``weights`` down the loss.

    Args:
        weights: by name.
        loss: of the soft weights by name, on a new minibatch at each call.
        schedule: how.
        activations: whose parameters move too, at the rate of scales.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    optimizer = _optimizer(weights, schedule, activations)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(schedule.iterations):
        done = step / schedule.iterations
        with torch.enable_grad():
            total = loss({name: each.soft() for name, each in weights.items()})
            beta = schedule.beta(done)
            if beta is not None:
                penalties = [each.variable.penalty(beta) for each in weights.values()]
                total = total + schedule.regularization * torch.stack(penalties).sum()
        if not bool(torch.isfinite(total)):
            raise FloatingPointError(f"reconstruct: the loss became {float(total)} at step {step}.")
        optimizer.zero_grad()
        total.backward(inputs=[p for group in optimizer.param_groups for p in group["params"]])
        if schedule.optimizer == "sign":
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - done)
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.sign_()
        optimizer.step()


def _optimizer(
    weights: dict[str, LearnedWeight],
    schedule: Schedule,
    activations: Sequence[LearnedActivation],
) -> torch.optim.Optimizer:
    scales = [each.log_scale for each in weights.values() if each.log_scale is not None]
    scales += [parameter for each in activations for parameter in (each.log_step, each.shift)]
    groups = [
        {
            "params": [each.variable.parameter for each in weights.values()],
            "lr": schedule.learning_rate,
        },
        {"params": scales, "lr": schedule.scale_rate},
    ]
    if not scales:
        del groups[1]
    if schedule.optimizer == "adam":
        return torch.optim.Adam(groups)
    return torch.optim.SGD(groups, momentum=0.9 if schedule.optimizer == "sgd" else 0.0)
