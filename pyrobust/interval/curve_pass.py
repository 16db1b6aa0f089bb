"""The image of a box under a curve: one native pass forwards and one backwards, where they serve.

``csrc/interval/curves.h``. Elsewhere torch operations on float64, with the errors of
:mod:`pyrobust.interval.curves`, and rounded outward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust.interval.curves import Curve, error_of, image, native_curve
from pyrobust.interval.operands import working
from pyrobust.interval.outward import enclose
from pyrobust.interval.pass_operator import (
    NativeGradients,
    PassOperator,
    ends_like,
    pass_serves,
)
from pyrobust.interval.type import Interval, wrap
from pyrobust.ops._interval_checks import Ends, dense, finite_ends
from pyrobust.ops._kept_memory import new_ends

__all__ = ["passed", "trace"]


def _native_ends(
    lower: Tensor,
    upper: Tensor,
    curve: str,
    numbers: Sequence[float],
    deployed: Sequence[float],
    rounding: str,
) -> Ends:
    """The ends of the image; those that are not finite are infinite on their outer side.

    Args:
        lower: lower ends, float32 on the CPU.
        upper: upper ends, of the same shape.
        curve: the function, as ``csrc/bindings/interval_curves.cpp`` lists them.
        numbers: what that function takes besides.
        deployed: error of a float32 evaluation in units of 2^-24 of the value, of ``min(|x|, 8)``,
            and of 1.
        rounding: the promise.
    """
    flat = dense(lower).view(-1), dense(upper).view(-1)
    low, high = new_ends(flat[0])
    threads = torch.get_num_threads()
    finite = _native.interval_curve(*flat, curve, numbers, deployed, rounding, low, high, threads)
    finite_ends.note(finite)
    return low.view(lower.shape), high.view(lower.shape)


def _native_gradients(
    of_lower: Tensor,
    of_upper: Tensor,
    lower: Tensor,
    upper: Tensor,
    curve: str,
    numbers: Sequence[float],
) -> Ends:
    """Gradients of a box's ends from those of its image's."""
    grads = dense(of_lower).view(-1), dense(of_upper).view(-1)
    ends = dense(lower).view(-1), dense(upper).view(-1)
    to_lower, to_upper = torch.empty_like(ends[0]), torch.empty_like(ends[0])
    threads = torch.get_num_threads()
    _native.interval_curve_backward(*grads, *ends, curve, numbers, to_lower, to_upper, threads)
    return to_lower.view(lower.shape), to_upper.view(lower.shape)


def _rule(lower: Tensor, upper: Tensor, curve: str, numbers: tuple[float, ...], *_: Any) -> Ends:
    """The image as computed: the pass never declines, so that only gradients are taken of it."""
    low, high = image(native_curve(curve, numbers), lower.double(), upper.double())
    return low.to(lower.dtype), high.to(lower.dtype)


_curve = PassOperator(
    "interval_curve(Tensor lower, Tensor upper, str curve, float[] numbers, float[] deployed,"
    " str rounding) -> (Tensor, Tensor)",
    _native_ends,
    _rule,
    gradients=NativeGradients(
        "interval_curve_gradients(Tensor of_lower, Tensor of_upper, Tensor lower, Tensor upper,"
        " str curve, float[] numbers) -> (Tensor, Tensor)",
        _native_gradients,
        lambda of_lower, of_upper, lower, *_: ends_like(lower),
    ),
    by_elements=True,
)


def passed(curve: Curve, x: Interval) -> Interval | None:
    """The image of ``x`` under ``curve`` by the native pass, or None where it does not serve."""
    if curve.native is None or not pass_serves(x, nearest=True):
        return None
    deployed = curve.deployed, curve.deployed_input, curve.deployed_absolute
    return _curve(x.rounding, x.lower, x.upper, *curve.native, deployed, x.rounding)


def trace(curve: Curve, x: Interval) -> Interval:
    """The image of ``x`` under ``curve``."""
    done = passed(curve, x)
    if done is not None:
        return done
    low, high = working(x)
    ends = image(curve, low, high)
    if x.rounding != "nearest":
        with torch.no_grad():
            error = error_of(curve, x, low, high, ends)
        ends = enclose(*ends, error, x.dtype, floor=curve.floor, ceiling=curve.ceiling)
    return wrap(*ends, x.rounding)
