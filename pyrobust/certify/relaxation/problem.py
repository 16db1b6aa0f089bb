"""A traced model with the intervals of its values: what backward passes read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from pyrobust.certify.relaxation.graph import Step
from pyrobust.certify.relaxation.layers import Layer
from pyrobust.certify.relaxation.lines import Lines
from pyrobust.certify.relaxation.planes import Planes

__all__ = ["Box", "Problem", "layer_of", "numbers_of", "offset_of"]


@dataclass
class Box:
    """Ends ``(B, ...)`` in the working dtype."""

    lower: Tensor
    upper: Tensor

    @property
    def magnitude(self) -> Tensor:
        """The largest magnitude of a point."""
        return torch.maximum(self.lower.abs(), self.upper.abs()).detach()


@dataclass
class Problem:
    """A traced model with the intervals of its values.

    Attributes:
        steps: operations in order, the input first.
        boxes: intervals by node.
        lines: of each bending operation, by its node.
        planes: of each operation of several numbers that has them, by its node.
        sound: account for rounding.
        offsets: values of affine operations at 0, filled on demand.
        reaches: sums of magnitudes of affine operations, filled on demand.
        separable: whether every operation can be applied to a part of the batch.
        tightened: ``(B, N)`` bool, the elements that have had a backward pass, by node.
    """

    steps: list[Step]
    boxes: dict[fx.Node, Box]
    lines: dict[fx.Node, Lines]
    sound: bool
    offsets: dict[fx.Node, Tensor | None] = field(default_factory=dict)
    reaches: dict[fx.Node, Tensor] = field(default_factory=dict)
    separable: bool = True
    planes: dict[fx.Node, Planes] = field(default_factory=dict)
    tightened: dict[fx.Node, Tensor] = field(default_factory=dict)

    def step_of(self, node: fx.Node) -> Step:
        """The step that computes a node's value."""
        return next(step for step in self.steps if step.node is node)

    def readers(self, node: fx.Node) -> int:
        """How many times a node's value enters a step."""
        return sum(entering is node for step in self.steps for entering in step.inputs)

    def shape(self, node: fx.Node) -> torch.Size:
        """Of a node's value for one image."""
        return self.boxes[node].lower.shape[1:]


def offset_of(problem: Problem, step: Step) -> Tensor | None:
    """The value at 0, ``(1 or B, ...)``, or None where it is 0."""
    assert step.affine is not None
    if step.node not in problem.offsets and step.affine.offset is not None:
        problem.offsets[step.node] = step.affine.offset(problem.boxes[step.node].lower)
    if step.node not in problem.offsets:
        zeros = [torch.zeros_like(problem.boxes[n].lower) for n in step.inputs]
        if step.affine.weight is not None:
            zeros = [zero[:1] for zero in zeros]
        offset = step.affine.apply(*zeros)
        empty = not offset.requires_grad and not bool(offset.any())
        problem.offsets[step.node] = None if empty else offset
    return problem.offsets[step.node]


def layer_of(problem: Problem, step: Step) -> Layer | None:
    """The step as a layer, where it is one of vectors or a convolution of images."""
    affine = step.affine
    if affine is None or affine.weight is None or step.closed:
        return None
    if affine.options is None and len(problem.shape(step.node)) > 1:
        return None
    places = problem.shape(step.node)[1:].numel()
    return Layer(affine.options, tuple(problem.shape(step.inputs[0])[1:]), places)


def numbers_of(problem: Problem, step: Step) -> tuple[Tensor, Tensor | None]:
    """Weights and ``(K,)`` biases of a layer."""
    offset = offset_of(problem, step)
    assert step.affine is not None
    assert step.affine.weight is not None
    return step.affine.weight, None if offset is None else offset.flatten()[: offset.shape[1]]
