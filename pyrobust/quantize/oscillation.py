"""OscillationTracker: how often the codes of weights go back to where they came from.

Source: Nagel et al., "Overcoming oscillations in quantization-aware training", ICML 2022,
arXiv 2203.11086, section 3.1, as used by Liu, Liu, Cheng, ICML 2023, arXiv 2302.02210.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyrobust._checks import check_open_unit
from pyrobust.quantize.quantized_weights import quantized_weights

__all__ = ["OscillationTracker"]


@dataclass
class _Track:
    codes: Tensor
    direction: Tensor
    frequency: Tensor
    reversals: Tensor


class OscillationTracker:
    """Counts reversals: a code changed, in the direction opposite to its previous change.

    Call :meth:`update` after every optimizer step.

    Args:
        momentum: of the moving average of reversals per weight, in (0, 1).

    Raises:
        ValueError: ``momentum`` lies outside (0, 1).

    Example:
        >>> tracker = OscillationTracker(momentum=0.5)
        >>> for code in (0, 1, 0):
        ...     tracker.update({"w": torch.tensor([code])})
        >>> tracker.frequency["w"], tracker.rate()
        (tensor([0.5000]), 500.0)
    """

    def __init__(self, momentum: float = 0.01) -> None:
        check_open_unit("OscillationTracker", "momentum", momentum)
        self.momentum = momentum
        self._tracks: dict[str, _Track] = {}
        self._weight_steps = 0

    @torch.no_grad()
    def update(self, source: nn.Module | Mapping[str, Tensor]) -> None:
        """Look at the codes once more.

        Args:
            source: a model with simulated low-bit weights, or integer codes by name.

        Raises:
            ValueError: the codes of a name changed their shape, or the model has none.
        """
        codes = quantized_weights(source) if isinstance(source, nn.Module) else source
        for name, value in codes.items():
            self._update_one(name, value.to(torch.int16))

    def _update_one(self, name: str, codes: Tensor) -> None:
        track = self._tracks.get(name)
        if track is None:
            still = torch.zeros_like(codes, dtype=torch.int8)
            zeros = torch.zeros(codes.shape, device=codes.device)
            self._tracks[name] = _Track(codes, still, zeros, torch.zeros_like(zeros).long())
            return
        if track.codes.shape != codes.shape:
            raise ValueError(
                f"OscillationTracker: the codes of '{name}' must keep the shape "
                f"{tuple(track.codes.shape)}; got {tuple(codes.shape)}."
            )
        change = torch.sign(codes - track.codes).to(torch.int8)
        reversed_ = change * track.direction == -1
        track.frequency.lerp_(reversed_.to(track.frequency.dtype), self.momentum)
        track.reversals += reversed_
        track.direction = torch.where(change != 0, change, track.direction)
        track.codes = codes
        self._weight_steps += codes.numel()

    @property
    def frequency(self) -> dict[str, Tensor]:
        """The moving average of reversals, by name, in [0, 1], of the shape of the codes."""
        return {name: track.frequency for name, track in self._tracks.items()}

    @property
    def reversals(self) -> dict[str, Tensor]:
        """Reversals since the start or :meth:`reset`, by name, int64."""
        return {name: track.reversals for name, track in self._tracks.items()}

    def rate(self) -> float:
        """Reversals per 1,000 weights and steps since the start or :meth:`reset`; 0 before any."""
        total = sum(int(track.reversals.sum()) for track in self._tracks.values())
        return 1000 * total / self._weight_steps if self._weight_steps else 0.0

    def reset(self) -> None:
        """Count anew; codes, directions and moving averages stay."""
        self._weight_steps = 0
        for track in self._tracks.values():
            track.reversals.zero_()
