"""How many images of a batch to treat at a time, so that everything kept for them fits.

A bound keeps intervals and lines of every value, which grow with the images, and copies of the
weights, which do not; the rest of the memory is for coefficients. Where gradients are recorded all
of it is kept until they are taken, so nothing is divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyrobust.certify.relaxation.hidden import ALPHA_COPIES, COPIES
from pyrobust.interval.type import Interval
from pyrobust.nn.packed_conv import PackedConv
from pyrobust.nn.packed_linear import PackedLinear

__all__ = ["Split", "gradients_recorded", "images_at_a_time", "split_of"]

# Numbers in the working type kept per number of the values, measured: ends and lines, and in sound
# mode the sums of magnitudes and the narrow intervals; temporary ones of the largest value.
_KEPT = {False: 8, True: 11}
_PASSING = 12
# Numbers per number of the two largest values that interval propagation has at once, measured.
_INTERVALS = 8
# Rows of coefficients treated together at least: a function and its negation.
_FEWEST = 2
# Copies of a specification: itself, its negation, their values, and those of intervals.
_SPECIFICATIONS = 6


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
    graph: fx.Graph,
    root: nn.Module,
    x: Interval,
    spec: Tensor | None,
    max_memory: int,
    optimised: bool,
) -> Split:
    """The largest parts that fit ``max_memory`` bytes.

    Half of what the weights leave is for what is kept per image, if need be. A model whose
    operations mix the images of a batch is not divided.

    Raises:
        ValueError: one image and one function do not fit.
    """
    batch = len(x)
    if batch == 0 or gradients_recorded(root, x):
        return Split(max(batch, 1), max_memory)
    sound = x.rounding != "nearest"
    item = 8 if sound else x.lower.element_size()
    sizes = _sizes(graph, root, x)
    whole = _sizes_together(graph, root, x) if sizes is None else None
    numbers = sizes or whole
    if numbers is None:  # the model refuses even points: propagation names what is wrong
        return Split(batch, max_memory)
    weights = _weights(root, torch.float64 if sound else x.dtype, item)
    together = 1 if whole is None else batch
    outputs = max(numbers[-1] // together, 1)
    functions = outputs if spec is None else spec.shape[-2]
    each = (sum(numbers) * _KEPT[sound] + max(numbers) * _PASSING) * item
    each += _SPECIFICATIONS * functions * outputs * item * together
    row = max(numbers) * item * COPIES[sound]
    if optimised:
        each += ALPHA_COPIES * sum(numbers) * item  # room for at least one row
    least = weights + each + _FEWEST * row
    if least > max_memory:
        raise ValueError(
            f"bound: max_memory must be at least {least} bytes for this model, {weights} of them "
            f"for copies of weights; got {max_memory}."
        )
    free = max_memory - weights
    images = batch if whole is not None else min(max(free // 2 // each, 1), batch)
    kept = each if whole is not None else images * each
    return Split(images, max(free - kept, _FEWEST * row))


def images_at_a_time(graph: fx.Graph, root: nn.Module, x: Interval, max_memory: int) -> int:
    """How many images interval propagation may treat together.

    Raises:
        ValueError: one image does not fit.
    """
    if len(x) == 0 or gradients_recorded(root, x):
        return max(len(x), 1)
    sizes = _sizes(graph, root, x)
    if sizes is None:
        return len(x)
    # rules outside the kernels compute in float64
    item = x.lower.element_size() if x.rounding == "nearest" else 8
    least = sum(sorted(sizes)[-2:]) * _INTERVALS * item
    if least > max_memory:
        raise ValueError(
            f"bound: max_memory must be at least {least} bytes for this model; got {max_memory}."
        )
    return min(max_memory // least, len(x))


def gradients_recorded(root: nn.Module, x: Interval) -> bool:
    """Whether gradients are recorded, by the model's weights or the box."""
    wanted = x.requires_grad or any(p.requires_grad for p in root.parameters())
    return torch.is_grad_enabled() and wanted


def _weights(root: nn.Module, dtype: torch.dtype, item: int) -> int:
    """Bytes of the weights in the working type, and of the magnitudes or parts of one of them."""
    copied = largest = 0
    for module in root.modules():
        if isinstance(module, PackedLinear | PackedConv):
            count = module.dequantize().numel()
            copied += count * item
            largest = max(largest, count)
    for parameter in root.parameters():
        copied += 0 if parameter.dtype == dtype else parameter.numel() * item
        largest = max(largest, parameter.numel())
    return copied + largest * item


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


def _sizes_together(graph: fx.Graph, root: nn.Module, x: Interval) -> list[int] | None:
    """Numbers in each value of the whole batch, or None where the model does not take it."""
    try:
        with torch.no_grad():
            return [value.numel() for value in _values(graph, root, x.lower).values()]
    except Exception:
        return None


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
