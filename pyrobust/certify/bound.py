"""Bounds of a network over a box, also of linear functions of its outputs.

``bound(model, x, spec)`` encloses ``spec @ model(x)`` for every point of the box ``x``. Where the
model ends in a linear layer, the specification is folded into its weights (``spec @ W``), so that
the differences of logits are bounded directly instead of through bounds of each logit.

Source: S. Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably
Robust Models", 2018, arXiv 1810.12715, section 3 (propagation, elision of the last layer).
Departures: every step is rounded outward, the folded weights included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyrobust._checks import (
    check_choice,
    check_finite,
    check_float_tensor,
    check_integer,
    check_shape,
)
from pyrobust.certify.relaxation import crown_bound
from pyrobust.certify.relaxation.graph import trace_graph
from pyrobust.certify.relaxation.memory import gradients_recorded, images_at_a_time
from pyrobust.interval import Interval
from pyrobust.interval.outward import UNIT, bound_of_roundings, enclose, error_of_products
from pyrobust.interval.product_pass import matmul
from pyrobust.interval.type import wrap
from pyrobust.nn._hooks import is_customised
from pyrobust.nn.packed_linear import PackedLinear
from pyrobust.ops._interval_checks import is_deployed

__all__ = ["bound", "interval_margins", "margin_specification"]

# From the fastest to the tightest.
METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown")
MEMORY = 1 << 30


def bound(
    model: nn.Module,
    x: Interval,
    spec: Tensor | None = None,
    method: str = "ibp",
    *,
    max_memory: int | None = None,
    iterations: int = 20,
    hidden_iterations: int | None = None,
    lower_only: bool = False,
) -> Interval:
    """Enclose ``model(x)``, or ``spec @ model(x)``, for every point of a box.

    Args:
        model: any module whose operations have interval rules.
        x: the box of inputs, batch first.
        spec: ``(S, K)`` or ``(B, S, K)`` linear specification of the ``K`` outputs; None bounds the
            outputs themselves. Converted to float64, taken as exact.
        method: ``"ibp"``, interval propagation; ``"crown-ibp"``, linear relaxation over interval
            bounds of the hidden values; ``"crown"``, relaxation throughout; ``"alpha-crown"``, with
            optimised slopes. Each is at least as tight as those before it, up to rounding
            ("crown-ibp" and "crown" are intersected with "ibp"), and takes longer.
        max_memory: bytes to use at a time, beyond the model and the box, as torch's allocator
            counts them, by default 2**30: images, specifications and neurons are split accordingly,
            down to one of each, and the limit is kept within 10%. Not to be given where gradients
            are recorded (the box or a weight requires one, outside ``torch.no_grad()``): everything
            stays in memory until they are taken. ``"ibp"`` splits images of models that torch.fx
            can trace, for limits below the default.
        iterations: optimisation steps of ``"alpha-crown"``, ``>= 1``.
        hidden_iterations: those for each hidden value that stays undecided, ``>= 0``, by far the
            most work on a large network; by default as many, 0 leaves the intervals of "crown".
        lower_only: bound upper ends by intervals only, which halves the work of the relaxation on
            the specification; margins need no more.

    Returns:
        The box of outputs, or of ``(B, S)`` values of the specification; it carries the promise of
        ``x.rounding`` and is differentiable in the box and the weights.

    Raises:
        TypeError: ``x`` is not an Interval.
        ValueError: ``method`` is unknown, ``spec`` does not fit the output, or a relaxation is
            asked of a box with ``rounding="deployed"``, for which only "ibp" holds; one image and
            one function do not fit ``max_memory``, or it is given while gradients are recorded.
        NotImplementedError: an operation of the model has no rule.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
        >>> box = Interval(torch.zeros(1, 2), torch.ones(1, 2))
        >>> bounds = bound(model, box, spec=torch.tensor([[1.0, -1.0]]))
        >>> bool(bounds.lower > -1e-5)  # the two logits alone would allow -1
        True
    """
    check_choice("bound", "method", method, METHODS)
    if not isinstance(x, Interval):
        raise TypeError(f"bound: x must be an Interval; got {type(x).__name__}.")
    if max_memory is None:
        max_memory = MEMORY
    else:
        check_integer("bound", "max_memory", max_memory, 1)
        _check_no_gradients(model, x, max_memory)
    check_integer("bound", "iterations", iterations, 1)
    if hidden_iterations is not None:
        check_integer("bound", "hidden_iterations", hidden_iterations, 0)
    if method != "ibp" and is_deployed(x.rounding):
        raise ValueError(
            f'bound: method must be "ibp" for a box with rounding="{x.rounding}"; got {method!r}.'
        )
    if spec is not None:
        check_float_tensor("bound", "spec", spec)
        if spec.is_cpu and not torch.compiler.is_compiling():  # looking would stop a GPU
            check_finite("bound", "spec", spec)
    if method == "ibp":
        return _in_parts(model, x, spec, max_memory)
    return crown_bound(
        model,
        x,
        spec,
        method=method,
        max_memory=max_memory,
        iterations=iterations,
        hidden_iterations=hidden_iterations,
        lower_only=lower_only,
        plain=_of_output,
    )


def _check_no_gradients(model: nn.Module, x: Interval, max_memory: int) -> None:
    if gradients_recorded(model, x):
        raise ValueError(
            "bound: max_memory must not be given where gradients are recorded, which keep every "
            f"value until they are taken; got {max_memory}. Call bound under torch.no_grad(), or "
            "on fewer images at a time without it."
        )


def _in_parts(model: nn.Module, x: Interval, spec: Tensor | None, max_memory: int) -> Interval:
    """Interval propagation, of as many images at a time as fit a limit below the default."""
    if max_memory >= MEMORY or x.ndim == 0:
        return _interval_bound(model, x, spec)
    try:
        graph, root = trace_graph(model, "bound")
    except TypeError:
        return _interval_bound(model, x, spec)
    images = images_at_a_time(graph, root, x, max_memory)
    if images >= len(x):
        return _interval_bound(model, x, spec)
    found = []
    for first in range(0, len(x), images):
        part = slice(first, first + images)
        own = spec if spec is None or spec.ndim == 2 else spec[part]
        found.append(_interval_bound(model, x[part], own))
    lower, upper = torch.cat([f.lower for f in found]), torch.cat([f.upper for f in found])
    return wrap(lower, upper, found[0].rounding)


def _interval_bound(model: nn.Module, x: Interval, spec: Tensor | None) -> Interval:
    if spec is None:
        result: Interval = model(x)
        return result
    output, last = _run(model, x)
    layer, entering = last or (None, None)
    return _of_output(output, layer, entering, spec)


def _of_output(
    output: Interval, layer: nn.Module | None, entering: Interval | None, spec: Tensor | None
) -> Interval:
    """The specification's values, folded into the last layer where it is a plain linear one."""
    if spec is None:
        return output
    _check_spec(spec, output)
    linear = type(layer) in (nn.Linear, PackedLinear)
    if isinstance(layer, PackedLinear) and layer.activations is not None:
        linear = False
    if not linear or entering is None or (layer is not None and is_customised(layer)):
        column = matmul(spec.to(output.device, torch.float64), output.unsqueeze(-1))
        kind: Interval = column.squeeze(-1).to(output.dtype)
        return kind
    assert isinstance(layer, nn.Linear | PackedLinear)
    return _folded(layer, entering, spec)


def margin_specification(labels: Tensor, num_classes: int) -> Tensor:
    """The specification whose values are the margins of the labels over the other classes.

    Args:
        labels: ``(B,)`` int64 in ``[0, num_classes)``.
        num_classes: ``K >= 2``.

    Returns:
        ``(B, K - 1, K)`` float32; row ``j`` takes the ``j``-th other class from the label.

    Raises:
        ValueError: ``num_classes`` below 2.
    """
    check_integer("margin_specification", "num_classes", num_classes, 2)
    identity = torch.eye(num_classes, device=labels.device)
    place = torch.arange(num_classes - 1, device=labels.device)
    mine = labels.unsqueeze(1)
    return identity[mine] - identity[place + (place >= mine)]


def interval_margins(model: nn.Module, x: Interval, labels: Tensor) -> Interval:
    """``bound(model, x, margin_specification(labels, K))`` by intervals, for any ``K``."""
    output, last = _run(model, x)
    layer, entering = last or (None, None)
    return _of_output(output, layer, entering, margin_specification(labels, output.shape[-1]))


Linear = nn.Linear | PackedLinear


def _run(model: nn.Module, x: Interval) -> tuple[Interval, tuple[Linear, Interval] | None]:
    """The output box, and the linear layer that made it with its input, where one did."""
    calls: list[tuple[Linear, Interval, int, Any]] = []

    def record(layer: Any, inputs: tuple[Any, ...], named: dict[str, Any], made: Any) -> None:
        entering = next(iter((*inputs, *named.values())))
        if isinstance(entering, Interval):
            calls.append((layer, entering, entering._memory[0], made))

    handles = [
        module.register_forward_hook(record, with_kwargs=True)
        for module in model.modules()
        if type(module) in (nn.Linear, PackedLinear) and not is_customised(module)
    ]
    try:
        output: Interval = model(x)
    finally:
        for handle in handles:
            handle.remove()
    for layer, entering, changes, made in calls:
        # the same objects, not changed in place since
        plain = isinstance(layer, nn.Linear) or layer.activations is None
        same = made is output and output._memory[0] == 0 and entering._memory[0] == changes
        if same and plain:
            return output, (layer, entering)
    return output, None


def _check_spec(spec: Tensor, output: Interval) -> None:
    if output.ndim != 2:
        raise ValueError(
            f"bound: a spec needs a model with (B, K) outputs; got {tuple(output.shape)}."
        )
    batch, classes = output.shape
    check_shape("bound", "spec", spec, (*((batch,) if spec.ndim == 3 else ()), None, classes))


def _folded(layer: Linear, x: Interval, spec: Tensor) -> Interval:
    """``spec (W x + b)`` over the box, with ``spec W`` formed first, in float64."""
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.dequantize()
    wide = x.dtype if x.rounding == "nearest" else torch.float64
    matrix, rows = weight.to(wide), spec.to(weight.device, wide)
    bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias
    shift = bias.to(weight.device, wide)
    low, high = x.lower.to(wide), x.upper.to(wide)
    centre, radius = (low + high) * 0.5, (high - low) * 0.5
    folded = rows @ matrix
    middle = _times(folded, centre) + rows @ shift
    reach = _times(folded.abs(), radius)
    lower, upper = middle - reach, middle + reach
    if x.rounding == "nearest":
        return wrap(lower, upper, x.rounding)
    with torch.no_grad():
        largest, packed = torch.maximum(low.abs(), high.abs()), not isinstance(layer, nn.Linear)
        error = _error_of_folding(matrix, shift, rows, largest, x, packed)
    return wrap(*enclose(lower, upper, error, x.dtype), x.rounding)


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    """``(S, K)`` or ``(B, S, K)`` times ``(B, K)``, giving ``(B, S)``."""
    return x @ matrix.mT if matrix.ndim == 2 else (matrix @ x.unsqueeze(-1)).squeeze(-1)


def _error_of_folding(
    matrix: Tensor, shift: Tensor, rows: Tensor, largest: Tensor, x: Interval, packed: bool
) -> Tensor:
    """Bound of every rounding above, and in deployed mode of those of the layer itself.

    A term of the result passes at most ``K + N + 8`` roundings: the sum over the ``N`` logits, the
    sum over the ``K`` features, centre and radius. So their error is ``gamma`` of that, times the
    sum of magnitudes ``|spec| (|W| |x| + |b|)``.
    """
    terms = matrix.shape[0] + matrix.shape[1] + 8
    logits = largest @ matrix.abs().mT + shift.abs()
    error = 3 * bound_of_roundings(terms, torch.float64) * _times(rows.abs(), logits)
    if is_deployed(x.rounding):
        flushed = 8 * torch.finfo(x.dtype).tiny * terms * (1 + largest.amax(-1, keepdim=True))
        relative = error_of_products(matrix.shape[1] + 2, x.dtype, x.rounding)
        if packed:  # csrc/matmul/matmul.h; scales that are flushed have factors up to 511
            flushed, relative = 512 * flushed, max(relative, 1.1e-6)
        own = relative * logits + flushed
        error = error + _times(rows.abs(), own) * (1 + 8 * UNIT[x.dtype])
    return error
