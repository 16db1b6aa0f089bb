"""Straight lines between two states of one architecture."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from pyrobust.weights._state import check_same_state

__all__ = ["interpolate"]


def interpolate(
    state_a: Mapping[str, Tensor], state_b: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """The state ``(1 - alpha) * state_a + alpha * state_b``.

    Args:
        state_a: names to tensors; the result at ``alpha=0``, to the bit.
        state_b: the same names, shapes and dtypes; the result at ``alpha=1``, to the bit.
        alpha: finite; outside ``[0, 1]`` the line is extended.

    Returns:
        New tensors. Integer and boolean entries (counters) are those of ``state_a``.

    Raises:
        TypeError: dtypes differ.
        ValueError: names or shapes differ, or ``alpha`` is not finite.

    Example:
        >>> import torch
        >>> interpolate({"w": torch.tensor([0.0])}, {"w": torch.tensor([2.0])}, 0.25)
        {'w': tensor([0.5000])}
    """
    if not math.isfinite(alpha):
        raise ValueError(f"interpolate: alpha must be finite; got {alpha}.")
    check_same_state("interpolate", state_a, state_b)
    result: dict[str, Tensor] = {}
    for name, a in state_a.items():
        b = state_b[name].detach()
        mixed = a.detach().clone()
        if a.is_floating_point() or a.is_complex():
            # lerp is exact at 0; at 1 it may round, so the end point is copied.
            mixed = b.clone() if alpha == 1 else mixed.lerp_(b.to(mixed.device), alpha)
        result[name] = mixed
    return result
