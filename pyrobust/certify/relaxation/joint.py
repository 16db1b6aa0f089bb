"""Which operations of several numbers have planes, by the name of their function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from pyrobust.certify.relaxation.log_sums import LogSum, log_sum_of_others
from pyrobust.certify.relaxation.maxima import (
    Maximum,
    adaptive_windows,
    axis_windows,
    pool_windows,
)
from pyrobust.certify.relaxation.planes import Relaxation
from pyrobust.certify.relaxation.products import Product, fits
from pyrobust.interval.type import Interval

__all__ = ["relaxation_of"]

Values = dict[fx.Node, Any]


def relaxation_of(
    name: str, node: fx.Node, values: Values, inputs: Sequence[fx.Node]
) -> Relaxation | None:
    """The relaxation of a call whose arguments are known; None where it has none."""
    if name == log_sum_of_others.__name__:
        dim: Any = node.args[1]
        return LogSum(dim, True, values[node.args[2]] if len(node.args) > 2 else None)  # type: ignore[index]
    if name in ("mul", "multiply", "imul", *_MATRICES) and len(inputs) == 2:
        return _product(name in _MATRICES, [values[n] for n in inputs])
    make = _OF_ONE.get(name)
    if make is None or len(inputs) != 1 or not node.args or node.args[0] is not inputs[0]:
        return None
    args = fx.node.map_arg(tuple(node.args[1:]), lambda n: values[n])
    kwargs = fx.node.map_arg(dict(node.kwargs), lambda n: values[n])
    return make(values[inputs[0]], *args, **kwargs)


_MATRICES = ("matmul", "bmm", "__matmul__")


def _product(matrices: bool, factors: list[Interval]) -> Relaxation | None:
    first, second = (torch.empty(f.shape, device="meta") for f in factors)
    result = (first @ second if matrices else first * second).shape
    if not fits(first.shape, second.shape, result, matrices):
        return None
    return Product(matrices)


def _pool(dimensions: int) -> Callable[..., Relaxation | None]:
    def make(
        box: Interval,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Relaxation | None:
        if return_indices or box.ndim != dimensions + 2:
            return None
        shape = box.shape[1:]
        table = pool_windows(shape, dimensions, kernel_size, stride, padding, dilation, ceil_mode)
        return Maximum(table.to(box.device))

    return make


def _adaptive(dimensions: int) -> Callable[..., Relaxation | None]:
    def make(box: Interval, output_size: Any, return_indices: bool = False) -> Relaxation | None:
        if return_indices or box.ndim != dimensions + 2:
            return None
        return Maximum(adaptive_windows(box.shape[1:], dimensions, output_size).to(box.device))

    return make


def _amax(box: Interval, dim: Any = (), keepdim: bool = False) -> Relaxation | None:
    dims = [dim] if isinstance(dim, int) else list(dim)
    axes = [d % box.ndim for d in dims]
    if not axes or 0 in axes:
        return None
    return Maximum(axis_windows(box.shape[1:], [a - 1 for a in axes]).to(box.device))


def _log_sum_exp(box: Interval, dim: Any, keepdim: bool = False) -> Relaxation | None:
    if not isinstance(dim, int) or not keepdim or dim % box.ndim == 0:
        return None
    return LogSum(dim, False)


_OF_ONE: dict[str, Callable[..., Relaxation | None]] = {
    "amax": _amax,
    "logsumexp": _log_sum_exp,
    **{f"max_pool{n}d": _pool(n) for n in (1, 2, 3)},
    **{f"_max_pool{n}d": _pool(n) for n in (1, 2, 3)},
    **{f"adaptive_max_pool{n}d": _adaptive(n) for n in (1, 2, 3)},
    **{f"_adaptive_max_pool{n}d": _adaptive(n) for n in (1, 2, 3)},
}
