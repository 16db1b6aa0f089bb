"""The rounding of a layer's input while its weights are rounded: steps that learn, random dropping.

While rounding is learned, each element of a rounded input is left in float with some probability
(QDrop). Without it the weights fit themselves to the rounding errors of the calibration data; with
it they come to lie where errors of any such size do least harm.

Source: Wei et al., "QDrop: randomly dropping quantization for extremely low-bit post-training
quantization", ICLR 2022, arXiv 2203.05740; step sizes by Esser et al., "Learned step size
quantization", ICLR 2020, arXiv 1902.08153.
Departures: the lowest level is learned too, as a real number in place of an integer zero-point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pyrobust.nn.affine_rounding import AffineRounding

__all__ = ["LearnedActivation", "rounding_inputs"]

_FACTORS = 20  # ranges tried, from 0.2 to 1 of that of the data
_SAMPLE = 1 << 18  # elements that the search looks at


class LearnedActivation:
    """One step and one lowest level, found by search, then moved by an optimizer.

    Args:
        x: the inputs that the search fits, in the mean squared error.
        bits: 1 to 8.
        drop: probability that :meth:`dropped` leaves an element as it is.

    Attributes:
        log_step: change of the logarithm of the step.
        shift: change of the lowest level, in steps.
    """

    def __init__(self, x: Tensor, bits: int, drop: float) -> None:
        self.bits, self.drop = bits, drop
        self._step, self._low = _searched(x.detach().float().flatten(), 2**bits)
        self.log_step = torch.zeros_like(self._step).requires_grad_()
        self.shift = torch.zeros_like(self._low).requires_grad_()

    def __call__(self, x: Tensor) -> Tensor:
        """The rounded ``x``, differentiable in ``x`` and in the parameters."""
        from pyrobust.nn.affine_rounding import affine_round

        step = self._step * self.log_step.exp()
        wide = x.float()
        return affine_round(wide, step, self._low + self._step * self.shift, 2**self.bits).to(x)

    def dropped(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The rounded ``x``, in which some elements stay what they were."""
        kept = torch.rand(x.shape, generator=generator).to(x.device) < self.drop
        return torch.where(kept, x, self(x))

    def module(self, *, trained: bool = True) -> AffineRounding:
        """What it has come to, or where it started, as a module without gradients."""
        from pyrobust.nn.affine_rounding import AffineRounding

        with torch.no_grad():
            step = self._step * self.log_step.exp() if trained else self._step
            low = self._low + self._step * self.shift if trained else self._low
            return AffineRounding(self.bits).to(step.device).set(step, low)


@contextmanager
def rounding_inputs(
    layers: Mapping[str, nn.Module], roundings: Mapping[str, Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Give ``layers`` their inputs through ``roundings``, by name, for a while."""

    def hook(rounding: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def rounded(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (rounding(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "input": rounding(kwargs["input"])}

        return rounded

    handles = [
        layers[name].register_forward_pre_hook(hook(rounding), with_kwargs=True)
        for name, rounding in roundings.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _searched(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Step and lowest level of least squared error among shrunken ranges."""
    if x.numel() == 0:
        return torch.ones((), device=x.device), torch.zeros((), device=x.device)
    x = x[:: max(1, x.numel() // _SAMPLE)]
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    best = torch.ones_like(low), torch.zeros_like(low)
    least = float("inf")
    for factor in torch.linspace(1.0, 0.2, _FACTORS).tolist():
        step = (high - low) * factor / (levels - 1)
        if not float(step) > 0:
            break
        bottom = torch.round(low * factor / step) * step  # so that 0 is a level at the start
        error = float((torch.round((x - bottom) / step).clamp(0, levels - 1) * step + bottom - x)
                      .square().mean())  # fmt: skip
        if error < least:
            best, least = (step, bottom), error
    return best
