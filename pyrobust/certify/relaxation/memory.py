"""How many images of a batch to treat at a time, so that everything kept for them fits.

A bound keeps intervals and lines of every value, which grow with the images, and copies of the
weights, which do not; the rest of the memory is for coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyrobust.certify.relaxation.hidden import ALPHA_COPIES
from pyrobust.interval.type import Interval

__all__ = ["Split", "split_of"]

# Numbers in the working type kept per number of the values, measured: ends and lines, and in sound
# mode the sums of magnitudes and the narrow intervals; temporary ones of the largest value.
_KEPT = {False: 8, True: 11}
_PASSING = 12
# Copies of the weights in the working type: in sound mode wide ones and their magnitudes.
_WEIGHTS = {False: 1, True: 3}


@dataclass(frozen=True)
class Split:
    """A way to divide the work.

    Attributes:
        images: to treat at a time.
        coefficients: bytes left for coefficients.
    """

    images: int
    coefficients: int


def split_of(
    graph: fx.Graph, root: nn.Module, x: Interval, max_memory: int, optimised: bool
) -> Split:
    """The largest parts that fit ``max_memory`` bytes; the smallest parts where none fit.

    Half of what the weights leave is for what is kept per image, if need be. A model whose
    operations mix the images of a batch is not divided.
    """
    sound, batch = x.rounding != "nearest", len(x)
    item = 8 if sound else x.lower.element_size()
    weights = sum(p.numel() for p in root.parameters()) * item * _WEIGHTS[sound]
    free = max(max_memory - weights, 0)
    sizes = _sizes(graph, root, x) if batch > 0 else None
    if sizes is None:
        return Split(max(batch, 1), max(free // 2, 1))
    each = (sum(sizes) * _KEPT[sound] + max(sizes) * _PASSING) * item
    if optimised:  # room for at least one row
        each += ALPHA_COPIES * sum(sizes) * item
    images = min(max(free // 2 // each, 1), batch)
    return Split(images, max(free - images * each, 1))


@torch.no_grad()
def _sizes(graph: fx.Graph, root: nn.Module, x: Interval) -> list[int] | None:
    """Numbers in each value of one image, or None where images may depend on each other."""
    first, other = x.lower[:1], x.upper[:1]
    ramp = torch.linspace(0.1, 0.9, other.numel(), dtype=other.dtype, device=other.device)
    try:
        alone = _values(graph, root, first)
        pair = _values(graph, root, torch.cat([first, other + ramp.view_as(other)]))
    except Exception:  # a model for one size of batch; propagation names what is wrong otherwise
        return None
    for node, value in alone.items():
        both = pair[node]
        if both.shape[:1] != (2,) or both.shape[1:] != value.shape[1:] or len(value) != 1:
            return None
        if not torch.allclose(both[:1], value, rtol=1e-3, atol=1e-5, equal_nan=True):
            return None
    return [value.numel() for value in alone.values()]


def _values(graph: fx.Graph, root: nn.Module, point: Tensor) -> dict[str, Tensor]:
    """The tensors that depend on the input."""
    found: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op not in ("get_attr", "output") and isinstance(value, Tensor):
                found[n.name] = value
            return value

    Recorder(fx.GraphModule(root, graph)).run(point)
    return found
