"""Propagation tightness: how close interval bounds come to the true range, from 0 to 1.

The true output range of the network, linearised at an input, divided by the range that interval
propagation computes for it. It falls exponentially with depth at initialisation, rises with
interval training, and is 1 only under a strict condition on the signs of the weights. A diagnostic
for certified training; it proves nothing about a class (use :func:`certified_margin`).

Source: Mao, Mueller, Fischer, Vechev, "Understanding Certified Training with Interval Bound
Propagation", ICLR 2024, arXiv 2306.10426, sections 3 and 4 (definitions, theorems on invariance
and on initialisation).
Departures: networks with branches (residual ones) are measured too, by interval propagation through
the network with its ReLUs fixed; each of them must be an ``nn.ReLU`` module. Bounds need no network
of special layers: any module is called on an :class:`~pyrobust.Interval`, rounded outward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyrobust._checks import (
    check_at_least,
    check_choice,
    check_eval_mode,
    check_float_tensor,
    check_integer,
    check_labels,
    check_shape,
    require_extra,
)
from pyrobust.certify._linearised_chain import (
    layer_chain,
    linearisation_point,
    linearised_chain,
    weight_of,
)
from pyrobust.certify._linearised_graph import graph_ranges, has_branches
from pyrobust.certify.bound import bound, margin_specification
from pyrobust.interval import Interval
from pyrobust.nn.packed_conv import PackedConv
from pyrobust.nn.packed_linear import PackedLinear

__all__ = [
    "TightnessProfile",
    "certified_margin",
    "expected_init_tightness",
    "interval_bounds",
    "is_propagation_invariant",
    "propagation_tightness",
    "tightness_by_layer",
]

_FLOOR = 1e-8
_WEIGHTED = (nn.Linear, PackedLinear, nn.Conv1d, nn.Conv2d, PackedConv)


def interval_bounds(model: nn.Module, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of a box that holds ``model(x)`` for every ``lower <= x <= upper``.

    Args:
        model: any module whose operations have interval rules.
        lower: ``(N, ...)`` float32 or float64.
        upper: same shape and dtype, nowhere below ``lower``.

    Returns:
        Lower and upper ends, rounded outward, differentiable.
    """
    box = model(Interval(lower, upper))
    return box.lower, box.upper


def certified_margin(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    clamp: tuple[float, float] | None = (0.0, 1.0),
) -> Tensor:
    """Lower bounds of ``z_y - z_j`` over l-infinity balls, the last layer folded into them.

    Args:
        model: classifier in evaluation mode, ``(N, ...)`` to ``(N, K)``.
        x: ``(N, ...)`` float inputs.
        y: ``(N,)`` int64 classes in ``[0, K)``.
        eps: radius, ``>= 0``, in the units of ``x``.
        clamp: range of valid inputs; None for any.

    Returns:
        ``(N, K - 1)``; the class ``y`` is proven where a whole row is positive.

    Raises:
        ValueError: ``eps`` is negative, ``y`` out of range, the model is in training mode or its
            output is not ``(N, K)``.
    """
    subject = "certified_margin"
    _check_inputs(subject, model, x, eps)
    with torch.no_grad():
        classes = _classes(subject, model(x[:1]))
    check_labels(subject, "y", y, len(x), classes)
    box = Interval.ball(x, eps, clamp=clamp)
    return bound(model, box, margin_specification(y, classes)).lower


def propagation_tightness(
    model: nn.Module,
    x: Tensor,
    eps: float,
    y: Tensor | None = None,
    relu: str = "local",
    *,
    clamp: tuple[float, float] | None = (0.0, 1.0),
) -> Tensor:
    """True range over interval range of each output, for the network linearised at the input.

    The true range costs one backward pass per output, the interval range one forward pass.

    Args:
        model: ``nn.Sequential`` of linear layers and convolutions (float, or packed without
            rounding of activations), BatchNorm, ReLU, average pooling and shape layers, or any
            module that is affine but for ``nn.ReLU`` modules and whose operations have interval
            rules; in evaluation mode; ``(N, ...)`` to ``(N, K)``.
        x: ``(N, ...)`` float inputs.
        eps: radius of the box, ``>= 0``, in the units of ``x``.
        y: ``(N,)`` int64 classes: measures the margins ``z_j - z_y`` with the last layer folded;
            None measures the outputs.
        relu: ``"local"`` replaces each ReLU by what it does at ``x``, ``"center"`` by what it does
            at the centre of the clamped box, ``"identity"`` ignores it.
        clamp: range of valid inputs, cut from the box; None for any.

    Returns:
        ``(N, K)``, or ``(N, K - 1)`` with ``y``; in (0, 1] up to rounding. Both ranges are raised
        to 1e-8 first, so that a dead output counts as tight.

    Raises:
        NotImplementedError: a layer is not supported (the message names it), or something but the
            ReLU modules is not affine.
        ValueError: ``eps`` is negative, ``y`` out of range, the model is in training mode or its
            output is not ``(N, K)``.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> for layer in model:
        ...     _ = layer.weight.data.fill_(1.0)
        >>> propagation_tightness(model.eval(), torch.full((1, 2), 0.5), 0.1).detach()
        tensor([[1.]])
    """
    subject = "propagation_tightness"
    _check_inputs(subject, model, x, eps)
    check_choice(subject, "relu", relu, ("local", "identity", "center"))
    if has_branches(layer_chain(subject, model)):
        return _graph_tightness(subject, model, x, eps, y, relu, clamp)
    steps, radius, point, output = linearised_chain(subject, model, x, eps, relu, clamp)
    classes = _classes(subject, output)
    spec = torch.eye(classes, dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    if y is not None:
        check_labels(subject, "y", y, len(x), classes)
        spec = -margin_specification(y, classes).to(x)
        if not isinstance(steps[-1].layer, (nn.Linear, PackedLinear)):
            raise NotImplementedError(
                f"{subject}: y needs a model that ends in a linear layer; it ends in "
                f"{type(steps[-1].layer).__name__}."
            )
    true = _true_ranges(output, point, radius, spec)
    for step in steps[:-1]:
        radius = step.widen(radius)
    if y is None:
        wide = steps[-1].widen(radius)
    else:
        wide = torch.einsum("nsk,nk->ns", (spec @ weight_of(steps[-1].layer).to(x)).abs(), radius)
    return true.clamp_min(_FLOOR) / wide.clamp_min(_FLOOR)


@dataclass(frozen=True)
class TightnessProfile:
    """Mean tightness of the network up to each of its weighted layers.

    Attributes:
        names: names of the layers, input first.
        values: mean tightness up to each, in (0, 1].
    """

    names: tuple[str, ...]
    values: tuple[float, ...]

    def plot(self, ax: Any = None, *, label: str | None = None) -> Any:
        """Draw tightness against depth on a logarithmic axis; needs matplotlib."""
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise require_extra("TightnessProfile.plot", "matplotlib", "plot") from error
        if ax is None:
            ax = pyplot.subplots()[1]
        ax.semilogy(self.names, self.values, marker="o", label=label)
        ax.set_xlabel("layer")
        ax.set_ylabel("propagation tightness")
        return ax


def tightness_by_layer(
    model: nn.Module,
    x: Tensor,
    eps: float,
    relu: str = "local",
    *,
    max_units: int = 32,
    clamp: tuple[float, float] | None = (0.0, 1.0),
) -> TightnessProfile:
    """Tightness of each prefix of the network that ends in a weighted layer.

    Args:
        model: as in :func:`propagation_tightness`.
        x: ``(N, ...)`` float inputs.
        eps: radius of the box, ``>= 0``.
        relu: as in :func:`propagation_tightness`.
        max_units: outputs of a layer that are measured, evenly spaced, ``>= 1``.
        clamp: range of valid inputs; None for any.
    """
    subject = "tightness_by_layer"
    _check_inputs(subject, model, x, eps)
    check_choice(subject, "relu", relu, ("local", "identity", "center"))
    check_integer(subject, "max_units", max_units, 1)
    layers = layer_chain(subject, model)
    names, values = [], []
    if has_branches(layers):
        point, radius = linearisation_point(x, eps, relu, clamp)
        ranges = graph_ranges(subject, model, point, radius, relu, None, _WEIGHTED)
        for found in ranges[:-1]:
            names.append(found.name)
            values.append(_mean_ratio(found.output, point, radius, found.radius, max_units))
        return TightnessProfile(tuple(names), tuple(values))
    for i, (name, layer) in enumerate(layers):
        if not isinstance(layer, _WEIGHTED):
            continue
        prefix = nn.Sequential(*(module for _, module in layers[: i + 1]))
        steps, radius, point, output = linearised_chain(subject, prefix, x, eps, relu, clamp)
        wide = radius
        for step in steps:
            wide = step.widen(wide)
        names.append(name)
        values.append(_mean_ratio(output, point, radius, wide, max_units))
    return TightnessProfile(tuple(names), tuple(values))


def expected_init_tightness(widths: Sequence[int]) -> float:
    """Tightness of a deep linear network with independent Gaussian weights.

    The expected true range over the expected interval range; about ``sqrt(pi / (2 d))`` for each
    hidden width ``d``. With a ReLU after one hidden layer the local tightness is ``sqrt(2)`` times
    as large.

    Args:
        widths: the hidden widths, each ``>= 1``; empty for a single layer.

    Returns:
        The product over the widths of ``sqrt(pi) Gamma((d + 1) / 2) / (d Gamma(d / 2))``.

    Example:
        >>> round(expected_init_tightness([64]), 3)
        0.156
    """
    result = 1.0
    for width in widths:
        check_integer("expected_init_tightness", "widths", width, 1)
        growth = math.lgamma((width + 1) / 2) - math.lgamma(width / 2)
        result *= math.sqrt(math.pi) * math.exp(growth) / width
    return result


def is_propagation_invariant(w2: Tensor, w1: Tensor, tol: float = 1e-6) -> bool:
    """Whether intervals lose nothing in ``w2 @ w1``: ``|w2 @ w1| = |w2| @ |w1|``.

    True exactly where for every output and input all products ``w2[i, k] w1[k, j]`` share one sign.

    Args:
        w2: ``(p, k)`` float.
        w1: ``(k, q)`` float.
        tol: relative difference that counts as rounding, ``>= 0``.

    Raises:
        ValueError: the shapes do not chain or ``tol`` is negative.
    """
    subject = "is_propagation_invariant"
    check_at_least(subject, "tol", tol, 0.0)
    check_shape(subject, "w1", w1, (w2.shape[-1], None))
    second, first = w2.detach().double(), w1.detach().double()
    wide = second.abs() @ first.abs()
    return bool((wide - (second @ first).abs() <= tol * wide).all())


def _graph_tightness(
    subject: str,
    model: nn.Module,
    x: Tensor,
    eps: float,
    y: Tensor | None,
    relu: str,
    clamp: tuple[float, float] | None,
) -> Tensor:
    """:func:`propagation_tightness` of a network with branches."""
    with torch.no_grad():
        classes = _classes(subject, model(x[:1]))
    fold: Tensor | None = None
    spec = torch.eye(classes, dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    if y is not None:
        check_labels(subject, "y", y, len(x), classes)
        fold = spec = -margin_specification(y, classes).to(x)
    point, radius = linearisation_point(x, eps, relu, clamp)
    whole = graph_ranges(subject, model, point, radius, relu, fold)[-1]
    true = _true_ranges(whole.output, point, radius, spec)
    return true.clamp_min(_FLOOR) / whole.radius.clamp_min(_FLOOR)


def _mean_ratio(
    output: Tensor, point: Tensor, radius: Tensor, wide: Tensor, max_units: int
) -> float:
    """Mean tightness of up to ``max_units`` evenly spaced units of a layer."""
    flat = output.flatten(1)
    units = torch.linspace(0, flat.shape[1] - 1, min(max_units, flat.shape[1])).long()
    units = units.to(flat.device)
    spec = torch.eye(len(units), dtype=flat.dtype, device=flat.device).expand(len(flat), -1, -1)
    true = _true_ranges(flat[:, units], point, radius, spec)
    ratio = true.clamp_min(_FLOOR) / wide.flatten(1)[:, units].clamp_min(_FLOOR)
    return float(ratio.mean())


def _true_ranges(output: Tensor, point: Tensor, radius: Tensor, spec: Tensor) -> Tensor:
    """``sum |d (spec output) / d x| r`` for each row of the spec, one backward pass each."""
    values = torch.einsum("nsk,nk->ns", spec, output)
    ranges = []
    for s in range(values.shape[1]):
        (slope,) = torch.autograd.grad(values[:, s].sum(), point, retain_graph=True)
        ranges.append((slope.abs() * radius).flatten(1).sum(1))
    return torch.stack(ranges, 1)


def _check_inputs(subject: str, model: nn.Module, x: Tensor, eps: float) -> None:
    check_float_tensor(subject, "x", x)
    check_at_least(subject, "eps", eps, 0.0)
    check_eval_mode(subject, model)


def _classes(subject: str, output: Tensor) -> int:
    if output.ndim != 2:
        raise ValueError(
            f"{subject}: the model must return shape (N, K); got {tuple(output.shape)}."
        )
    return int(output.shape[1])
