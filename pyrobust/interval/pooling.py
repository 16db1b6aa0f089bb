"""Rules of pooling and resizing: maxima are exact, averages are rounded once outward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyrobust.interval.operands import Rule, on_ends, refuse, require_box, working
from pyrobust.interval.outward import bound_of_roundings, enclose, infinite_where_beyond
from pyrobust.interval.type import Interval, wrap
from pyrobust.ops._interval_checks import is_deployed

__all__ = ["RULES", "averaged"]


def averaged(
    box: Interval,
    average: Callable[[Tensor], Tensor],
    terms: int,
    size: Callable[[Tensor], Tensor] | None = None,
) -> Interval:
    """Image under a weighted average with weights that are not negative.

    Args:
        box: the input.
        average: linear with nonnegative coefficients.
        terms: roundings that a term passes, at most; so many averages are at least the sum.
        size: bound of the sum of magnitudes behind each output, from the magnitudes of the input;
            their average where the coefficients themselves are exact.
    """
    low, high = working(box)
    lower, upper = average(low), average(high)
    if box.rounding == "nearest":
        return wrap(lower, upper, box.rounding)
    reach_of = average if size is None else size
    with torch.no_grad():
        gamma = bound_of_roundings(terms + 4, torch.float64)
        errors = [reach_of(end.abs()) * gamma for end in (low, high)]
        if is_deployed(box.rounding):
            reach = reach_of(torch.maximum(low.abs(), high.abs()))
            slack = bound_of_roundings(terms + 4, box.dtype) * reach
            slack = slack + torch.finfo(box.dtype).tiny * (terms + 4)
            slack = slack + infinite_where_beyond(terms * reach, box.dtype)
            errors = [error + slack for error in errors]
    return wrap(*enclose(lower, upper, (errors[0], errors[1]), box.dtype), box.rounding)


def _count(size: Any, dimensions: int) -> int:
    sizes = [size] * dimensions if isinstance(size, int) else list(size)
    total = 1
    for entry in sizes if len(sizes) == dimensions else sizes * dimensions:
        total *= entry
    return total


def _average(name: str, dimensions: int) -> Rule:
    function = getattr(F, name)

    def rule(input: Any, kernel_size: Any, *args: Any, **options: Any) -> Interval:
        box = require_box(input, name)
        divisor = options.get("divisor_override") or (args[4] if len(args) > 4 else None) or 1
        return averaged(
            box,
            lambda x: function(x, kernel_size, *args, **options),
            max(_count(kernel_size, dimensions), int(divisor)),
        )

    return rule


def _adaptive(name: str, dimensions: int) -> Rule:
    function = getattr(F, name)

    def rule(input: Any, output_size: Any) -> Interval:
        box = require_box(input, name)
        terms = _count(tuple(box.shape[-dimensions:]), dimensions)
        return averaged(box, lambda x: function(x, output_size), terms)

    return rule


def _maximum(name: str) -> Rule:
    function = getattr(F, name)

    def rule(input: Any, *args: Any, **options: Any) -> Interval:
        if options.pop("return_indices", False):
            raise refuse(f"{name} with return_indices")
        box = require_box(input, name)
        low, high = (function(end, *args, **options) for end in (box.lower, box.upper))
        return wrap(low, high, box.rounding)

    return rule


_EXACT_RESIZING = ("nearest", "nearest-exact")
_AVERAGING = ("linear", "bilinear", "trilinear", "area")


def _interpolate(
    input: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Interval:
    """Copies are exact; linear modes average with coefficients that are rounded themselves.

    A coefficient errs by some units of the position it comes from, at most the size of the image,
    and so may reach a neighbour: errors count against the largest magnitude of the image.
    """
    box = require_box(input, "interpolate")
    options = {
        "mode": mode,
        "align_corners": align_corners,
        "antialias": antialias,
        "recompute_scale_factor": recompute_scale_factor,
    }

    def resized(x: Tensor) -> Tensor:
        return F.interpolate(x, size, scale_factor, **options)  # type: ignore[arg-type]

    if mode in _EXACT_RESIZING:
        return on_ends(resized)(box)  # type: ignore[no-any-return]
    if mode not in _AVERAGING:
        raise refuse(f"interpolate with mode {mode!r}")
    spatial = tuple(range(2, box.ndim))
    if mode == "area" and not antialias:
        return averaged(box, resized, _count(tuple(box.shape[2:]), len(spatial)))
    sizes = [
        entry for shape in (box.shape, resized(box.lower.detach()).shape) for entry in shape[2:]
    ]
    terms = 64 + 8 * sum(sizes)
    return averaged(box, resized, terms, lambda x: x.amax(spatial, keepdim=True))


RULES: dict[str, Rule] = {
    **{f"avg_pool{n}d": _average(f"avg_pool{n}d", n) for n in (1, 2, 3)},
    **{f"adaptive_avg_pool{n}d": _adaptive(f"adaptive_avg_pool{n}d", n) for n in (1, 2, 3)},
    **{f"max_pool{n}d": _maximum(f"max_pool{n}d") for n in (1, 2, 3)},
    **{f"adaptive_max_pool{n}d": _maximum(f"adaptive_max_pool{n}d") for n in (1, 2, 3)},
    "interpolate": _interpolate,
}
