"""Products of two boxes and softmax in one native pass each, where it serves.

``csrc/transformer/transformer.h``: the formulas of :mod:`pyrobust.interval.box_products`; a softmax
divides exponentials instead of subtracting logarithms.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust.interval import box_products
from pyrobust.interval.outward import error_of_products
from pyrobust.interval.pass_operator import PassOperator, pass_serves
from pyrobust.interval.type import Interval, weakest, wrap
from pyrobust.ops._interval_checks import Ends, dense, is_deployed
from pyrobust.ops._kept_memory import new_ends

__all__ = ["matmul", "softmax"]


def _native_product(
    low_a: Tensor, high_a: Tensor, low_b: Tensor, high_b: Tensor, rounding: str
) -> Ends | None:
    terms = low_a.shape[-1]
    transposed = low_b.mT.is_contiguous() and high_b.mT.is_contiguous() and not low_b.is_neg()
    ends_b = (low_b.mT, high_b.mT) if transposed else (dense(low_b), dense(high_b))
    out = new_ends(low_a, (*low_a.shape[:2], low_b.shape[-1]))
    gain = error_of_products(terms + 4, torch.float32, rounding) if is_deployed(rounding) else 0.0
    threads = torch.get_num_threads()
    finite = _native.box_product(
        dense(low_a), dense(high_a), *ends_b, transposed, gain, *out, threads
    )
    return out if finite else None


def _product_rule(
    low_a: Tensor, high_a: Tensor, low_b: Tensor, high_b: Tensor, rounding: str
) -> Ends:
    result = box_products.matmul(wrap(low_a, high_a, rounding), wrap(low_b, high_b, rounding))
    return result.lower, result.upper


def _fake_product(low_a: Tensor, high_a: Tensor, low_b: Tensor, high_b: Tensor, _: str) -> Ends:
    out = low_a.new_empty((*low_a.shape[:2], low_b.shape[-1]))
    return out, torch.empty_like(out)


_product = PassOperator(
    "interval_product(Tensor low_a, Tensor high_a, Tensor low_b, Tensor high_b, str rounding)"
    " -> (Tensor, Tensor)",
    _native_product,
    _product_rule,
    _fake_product,
)


def matmul(input: Any, other: Any, *, out: None = None) -> Interval:
    """``A B`` where either or both are boxes."""
    if out is None and isinstance(input, Interval) and isinstance(other, Interval):
        done = _product_of_batches(input, other)
        if done is not None:
            return done
    return box_products.matmul(input, other, out=out)


def _product_of_batches(a: Interval, b: Interval) -> Interval | None:
    """The product of as many matrices on both sides, or None."""
    alike = a.ndim == b.ndim >= 2 and a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2]
    if not alike or not math.prod(a.shape) or not math.prod(b.shape):
        return None
    if not pass_serves(a, b.lower, b.upper) or not pass_serves(b):
        return None
    ends_a = [end.reshape(-1, *a.shape[-2:]) for end in (a.lower, a.upper)]
    ends_b = [end.reshape(-1, *b.shape[-2:]) for end in (b.lower, b.upper)]
    rounding = weakest(a, b)
    result = _product(rounding, *ends_a, *ends_b, rounding)
    return result.reshape(*a.shape[:-1], b.shape[-1])  # type: ignore[no-any-return]


def _native_softmax(lower: Tensor, upper: Tensor, rounding: str) -> Ends | None:
    lower, upper = dense(lower), dense(upper)
    out = new_ends(lower)
    threads = torch.get_num_threads()
    finite = _native.box_softmax(lower, upper, lower.shape[-1], rounding, *out, threads)
    return out if finite else None


def _softmax_rule(lower: Tensor, upper: Tensor, rounding: str) -> Ends:
    result = box_products.softmax(wrap(lower, upper, rounding), -1)
    return result.lower, result.upper


_softmax = PassOperator(
    "interval_softmax(Tensor lower, Tensor upper, str rounding) -> (Tensor, Tensor)",
    _native_softmax,
    _softmax_rule,
)


def softmax(
    input: Any,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: Any = None,
    *,
    log: bool = False,
) -> Interval:
    """Softmax, or its logarithm, along ``dim``."""
    if isinstance(input, Interval) and dim is not None and dtype is None and not log:
        last = input.ndim > 0 and dim in (-1, input.ndim - 1)
        if last and input.lower.numel() and pass_serves(input):
            return _softmax(input.rounding, input.lower, input.upper, input.rounding)
    return box_products.softmax(input, dim, _stacklevel, dtype, log=log)
