"""auto_LiRPA as a peer of the linear relaxations; absent where it is not importable."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

Bounds = Callable[[], tuple[Tensor, Tensor]]


def auto_lirpa(
    model: nn.Module, x: Tensor, eps: float, spec: Tensor, method: str, lower_only: bool = False
) -> Bounds | None:
    """A call that bounds ``spec @ model`` over the balls around ``x``, or None if not installed."""
    try:
        from auto_LiRPA import BoundedModule, BoundedTensor
        from auto_LiRPA.perturbations import PerturbationLpNorm
    except ImportError:
        return None
    bounded = BoundedModule(copy.deepcopy(model), torch.zeros_like(x))
    norm = float("inf")
    ball = PerturbationLpNorm(norm=norm, x_L=(x - eps).clamp(0, 1), x_U=(x + eps).clamp(0, 1))

    def run() -> tuple[Tensor, Tensor]:
        point = BoundedTensor(x, ball)
        lower, upper = bounded.compute_bounds(
            x=(point,), C=spec, method=method, bound_upper=not lower_only
        )
        return lower, upper

    run.module = bounded  # type: ignore[attr-defined]
    return run
