"""CROWN, CROWN-IBP and alpha-CROWN bounds of a specification.

- ``"crown-ibp"``: intervals for the hidden values, one backward pass for the specification.
- ``"crown"``: a backward pass for the inputs of every activation too, where intervals leave it
  undecided.
- ``"alpha-crown"``: the slopes of the lines are optimised, for each end of the hidden values that
  stay undecided, layer by layer, and then for each function of the specification.

Each result is intersected with interval propagation, so it is never looser.

Source: H. Zhang et al., NeurIPS 2018, arXiv 1811.00866 (CROWN); H. Zhang et al., "Towards Stable
and Efficient Training of Verifiably Robust Neural Networks", ICLR 2020, arXiv 1906.06316
(CROWN-IBP); K. Xu et al., "Fast and Complete", ICLR 2021, arXiv 2011.13824 (optimised slopes).
Departures: the slopes for hidden values serve their own bounds and not the specification's at once.
Since each bound has slopes of its own and tighter hidden intervals never loosen it, the best bounds
are the same; and only one layer's slopes are in memory, in parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyrobust.certify.relaxation.backward import Box, Problem, lower_bounds
from pyrobust.certify.relaxation.compositions.parts import meet
from pyrobust.certify.relaxation.decomposition import decomposed
from pyrobust.certify.relaxation.frames import Frame
from pyrobust.certify.relaxation.graph import Affine, Step, step_of, trace_graph
from pyrobust.certify.relaxation.hidden import (
    ALPHA_COPIES,
    hidden_bounds,
    rows_that_fit,
    searched_bounds,
)
from pyrobust.certify.relaxation.lines import Bend, best_lines
from pyrobust.certify.relaxation.memory import split_of
from pyrobust.certify.relaxation.slopes import Search, best_bounds
from pyrobust.interval.outward import straight_through
from pyrobust.interval.type import Interval, wrap
from pyrobust.ops._interval_fallback import round_outward

__all__ = ["crown_bound"]

Plain = Callable[[Interval, nn.Module | None, Interval | None, Tensor | None], Interval]


def crown_bound(
    model: nn.Module,
    x: Interval,
    spec: Tensor | None,
    *,
    method: str,
    max_memory: int,
    iterations: int = 20,
    hidden_iterations: int | None = None,
    learning_rate: float = 0.5,
    intersect: bool = True,
    lower_only: bool = False,
    plain: Plain | None = None,
) -> Interval:
    """Bounds of ``spec @ model(x)`` by linear relaxation alone; see :func:`pyrobust.certify.bound`.

    Args:
        model: as in ``bound``.
        x: the box, rounding ``"real"`` or ``"nearest"``.
        spec: ``(S, K)``, ``(B, S, K)`` or None.
        method: ``"crown-ibp"``, ``"crown"`` or ``"alpha-crown"``.
        max_memory: bytes to use at a time; images, rows and neurons are split accordingly.
        iterations: of ``"alpha-crown"``.
        hidden_iterations: for hidden values; by default as many.
        learning_rate: of its Adam optimiser, in ranges of a ReLU's slope.
        intersect: cut hidden intervals by those of interval propagation; without, they are those
            of the relaxation alone, to compare with other implementations.
        lower_only: leave the upper ends infinite, which halves the last backward pass.
        plain: gives the interval bounds of the specification from the output's box, the last
            layer, its input's box and the specification; the result is cut by them, which saves a
            pass of its own.
    """
    graph, root = trace_graph(model, "bound")
    graph = decomposed(graph, root, x.lower[:1])
    split = split_of(graph, root, x, spec, max_memory, method == "alpha-crown")
    hidden = iterations if hidden_iterations is None else hidden_iterations
    work = Work(
        method,
        split.coefficients,
        iterations,
        hidden if method == "alpha-crown" else 0,
        learning_rate,
        intersect,
        lower_only,
        plain,
    )
    if split.images >= len(x):
        return _bound_part(graph, root, x, spec, work)
    found = []
    for first in range(0, len(x), split.images):
        part = slice(first, first + split.images)
        box = wrap(x.lower[part], x.upper[part], x.rounding)
        own = spec if spec is None or spec.ndim == 2 else spec[part]
        found.append(_bound_part(graph, root, box, own, work))
    lower, upper = torch.cat([f.lower for f in found]), torch.cat([f.upper for f in found])
    return wrap(lower, upper, x.rounding)


@dataclass(frozen=True)
class Work:
    """The arguments of :func:`crown_bound` that every part of a batch shares."""

    method: str
    max_memory: int
    iterations: int
    hidden: int
    learning_rate: float
    intersect: bool
    lower_only: bool
    plain: Plain | None


def _bound_part(
    graph: fx.Graph, root: nn.Module, x: Interval, spec: Tensor | None, work: Work
) -> Interval:
    sound, tight = x.rounding != "nearest", work.method != "crown-ibp"
    problem, output, values_of = _forward(graph, root, x, tight, work)
    rows = _rows(problem.boxes[output], spec)
    both = rows if work.lower_only else torch.cat([rows, -rows])
    if work.method == "alpha-crown":
        values = _searched(problem, output, both, work)
    else:
        values = _chunked(problem, output, both, work.max_memory)
    lower = values[: len(rows)].mT
    upper = torch.full_like(lower, torch.inf) if work.lower_only else -values[len(rows) :].mT
    shape = (len(x), *problem.boxes[output].lower.shape[1:]) if spec is None else lower.shape
    lower, upper = lower.reshape(shape), upper.reshape(shape)
    if not sound:
        found = wrap(lower.to(x.dtype), torch.maximum(lower, upper).to(x.dtype), x.rounding)
    else:
        with torch.no_grad():
            ends = round_outward(lower.detach(), upper.detach(), x.dtype)
        found = wrap(
            straight_through(lower.to(x.dtype), ends[0]),
            straight_through(upper.to(x.dtype), ends[1]),
            x.rounding,
        )
    if work.hidden > 0:
        # tighter hidden intervals move the fixed lines, which may lose by it
        before = _bound_part(graph, root, x, spec, replace(work, method="crown", hidden=0))
        found = meet(found, before)
    if work.plain is not None:
        box = work.plain(values_of[output], *_last_layer(root, output, values_of), spec)
        found = meet(box, found)
    return found


def _last_layer(
    root: nn.Module, output: fx.Node, values: dict[fx.Node, Any]
) -> tuple[nn.Module | None, Interval | None]:
    """The module that made the output and what entered it, where that is one value."""
    if output.op != "call_module" or len(output.all_input_nodes) != 1:
        return None, None
    return root.get_submodule(str(output.target)), values[output.all_input_nodes[0]]


def _rows(box: Box, spec: Tensor | None) -> Tensor:
    """``(S, 1 or B, *output)`` coefficients."""
    shape = box.lower.shape[1:]
    if spec is None:
        count = shape.numel()
        eye = torch.eye(count, dtype=box.lower.dtype, device=box.lower.device)
        return eye.reshape(count, 1, *shape)
    rows = spec.to(box.lower)
    return rows.unsqueeze(1) if rows.ndim == 2 else rows.transpose(0, 1)


# -- forward -------------------------------------------------------------------------------------


def _forward(
    graph: fx.Graph, root: nn.Module, x: Interval, tight: bool, work: Work
) -> tuple[Problem, fx.Node, dict[fx.Node, Any]]:
    sound = x.rounding != "nearest"
    dtype = torch.float64 if sound else x.dtype
    values: dict[fx.Node, Any] = {}
    problem = Problem([], {}, {}, sound)
    first = True
    for node in graph.nodes:
        if node.op == "output":
            result = node.args[0]
            if not isinstance(result, fx.Node) or not isinstance(values[result], Interval):
                raise TypeError(
                    "bound: the model must return one tensor that depends on its input."
                )
            return problem, result, values
        if node.op == "placeholder":
            values[node] = x if first else node.args[0]
            step = Step(node, [], lambda: x)
            first = False
        elif node.op == "get_attr":
            values[node] = _attribute(root, str(node.target))
            continue
        else:
            step = step_of(node, root, values, dtype)
            if tight:
                _tighten_inputs(problem, values, step, work)
            values[node] = step.run(*(values[n] for n in step.inputs))
        if isinstance(values[node], Interval):
            _enter(problem, step, values[node], len(x), dtype)
    raise AssertionError("a graph ends in its output")


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _enter(problem: Problem, step: Step, value: Interval, batch: int, dtype: torch.dtype) -> None:
    """Record a value; what mixes the images of a batch cannot be pulled back image by image."""
    mixes = value.ndim == 0 or value.shape[0] != batch
    if mixes or not _keeps_images_apart(problem, step):
        raise NotImplementedError(
            f"bound: {step.node.name} must keep the batch as its first axis, image by image; its "
            f"result has shape {tuple(value.shape)} for a batch of {batch}."
        )
    problem.steps.append(step)
    problem.boxes[step.node] = Box(value.lower.to(dtype), value.upper.to(dtype))
    if step.bend is not None:
        box = problem.boxes[step.inputs[0]]
        problem.lines[step.node] = best_lines(step.bend, box.lower, box.upper, problem.sound)
    elif step.planes is not None:
        problem.planes[step.node] = step.planes.planes(_ends(problem, step), problem.sound)


@torch.no_grad()
def _keeps_images_apart(problem: Problem, step: Step) -> bool:
    """Whether no image's value depends on another; notes operations tied to the batch's size."""
    affine = step.affine
    if affine is None or affine.per_image:
        return True
    boxes = [problem.boxes[n].lower for n in step.inputs]
    base = affine.apply(*[torch.zeros_like(b) for b in boxes])
    if len(boxes[0]) == 1:
        problem.separable &= _serves_two(affine, boxes, base)
        return True
    moved = [torch.zeros_like(b) for b in boxes]
    for z in moved:
        z[0] = 1.0
    try:
        alone = affine.apply(*[torch.zeros_like(b[:1]) for b in boxes])
        # one image gives what it gives in the batch, and the constants are those of every image
        alike = alone.shape == base[:1].shape and bool((base == alone).all())
    except (RuntimeError, IndexError, ValueError):
        alike = False  # as a reshape to a fixed batch
    problem.separable &= alike
    return torch.equal(base[1:], affine.apply(*moved)[1:])


def _serves_two(affine: Affine, boxes: list[Tensor], base: Tensor) -> bool:
    """Whether an operation on one image does the same to two, as a reshape to one does not."""
    try:
        twice = affine.apply(*[torch.zeros_like(torch.cat([b, b])) for b in boxes])
    except (RuntimeError, IndexError, ValueError):
        return False
    return twice.shape == (2, *base.shape[1:]) and bool((twice == base).all())


# -- hidden values -------------------------------------------------------------------------------


def _tighten_inputs(problem: Problem, values: dict[fx.Node, Any], step: Step, work: Work) -> None:
    """Replace the intervals of a relaxed operation's inputs by those of backward passes.

    With optimised slopes those that stay undecided have a search for each end.
    """
    for place, node in enumerate(step.inputs):
        producer = problem.step_of(node)
        known = _is_first(problem, producer)  # the interval is exact there
        if known or (producer.affine is None and producer.planes is None):
            continue
        new = _undecided(problem, step)
        if not new:
            return
        done = problem.tightened.get(node, torch.zeros_like(new[place]))
        chosen = new[place] & ~done
        problem.tightened[node] = done | chosen
        if not bool(chosen.any()):
            continue
        _cut(
            problem,
            values,
            node,
            hidden_bounds(problem, node, chosen, work.max_memory),
            work.intersect,
        )
        chosen = chosen & _undecided(problem, step)[place]
        if work.hidden > 0 and bool(chosen.any()):
            search = Search(work.hidden, work.learning_rate)
            ends = searched_bounds(problem, node, chosen, work.max_memory, search)
            _cut(problem, values, node, ends, True)


def _undecided(problem: Problem, step: Step) -> list[Tensor]:
    """For each input ``(B, N)``, true where an element needs lines that a tighter interval may
    change.
    """
    if step.bend is not None:
        return [_undecided_bend(step.bend, problem.boxes[step.inputs[0]])]
    if step.planes is None:
        return []
    return step.planes.undecided(_ends(problem, step))


def _ends(problem: Problem, step: Step) -> list[tuple[Tensor, Tensor]]:
    return [(problem.boxes[n].lower, problem.boxes[n].upper) for n in step.inputs]


def _undecided_bend(bend: Bend, box: Box) -> Tensor:
    low, high = box.lower.detach(), box.upper.detach()
    if bend.curved:
        open_ = high > low
    else:
        open_ = torch.zeros_like(low, dtype=torch.bool)
        for border in bend.borders:
            open_ |= (low < border) & (high > border)
    return open_.flatten(1)


def _cut(
    problem: Problem,
    values: dict[fx.Node, Any],
    node: fx.Node,
    ends: tuple[Tensor, Tensor],
    intersect: bool,
) -> None:
    """Replace the interval of a value, by what it shares with the present one where wanted."""
    box = problem.boxes[node]
    lower, upper = ends
    if intersect:
        low, high = box.lower.flatten(1), box.upper.flatten(1)
        lower, upper = torch.maximum(low, lower), torch.minimum(high, upper)
    low, high = lower.reshape(box.lower.shape), upper.reshape(box.upper.shape)
    high = torch.maximum(low, high)  # rounding in nearest mode can cross the ends
    problem.boxes[node] = Box(low, high)
    value = values[node]
    out = (low, high) if not problem.sound else round_outward(low, high, value.dtype)
    values[node] = wrap(out[0].to(value.dtype), out[1].to(value.dtype), value.rounding)


def _is_first(problem: Problem, producer: Step) -> bool:
    linear = producer.affine is not None and not producer.closed
    return linear and all(n is problem.steps[0].node for n in producer.inputs)


# -- the specification ---------------------------------------------------------------------------


def _chunked(problem: Problem, output: fx.Node, rows: Tensor, max_memory: int) -> Tensor:
    """``(S, B)`` bounds of ``(S, 1 or B, *output)`` rows, by parts of images and of rows."""
    batch, count = len(problem.boxes[output].lower), len(rows)
    fit = rows_that_fit(problem, max_memory)
    images = max(fit // count, 1) if problem.separable else batch
    results = []
    for first in range(0, batch, images):
        part = slice(first, first + images)
        own = rows if rows.shape[1] == 1 else rows[:, part]
        width = min(images, batch - first)
        bounds = [
            lower_bounds(problem, output, some, problem.lines, Frame(part)).expand(-1, width)
            for some in own.split(max(fit // width, 1))
        ]
        results.append(torch.cat(bounds))
    return torch.cat(results, 1)


def _searched(problem: Problem, output: fx.Node, rows: Tensor, work: Work) -> Tensor:
    numbers = sum(box.lower.numel() for box in problem.boxes.values())
    size = max(work.max_memory // (ALPHA_COPIES * numbers * rows.element_size()), 1)
    plain = _chunked(problem, output, rows, work.max_memory)
    batch = len(problem.boxes[output].lower)
    search = Search(work.iterations, work.learning_rate)
    found = [
        best_bounds(problem, output, part, search).expand(-1, batch) for part in rows.split(size)
    ]
    return torch.maximum(plain, torch.cat(found))
