"""Sums in other orders and exact sums: what an operation of a random graph may be compared with."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

mpmath.mp.prec = 500  # products and sums of numbers between 1e-45 and 1e30 are exact
mp = mpmath.mpf


@dataclass(frozen=True)
class Operation:
    """One operation with its parameters drawn.

    Attributes:
        name: for reports.
        call: takes boxes or tensors, of either dtype.
        reordered: of a source of randomness and tensors: the same function with sums in another
            order or by another formula, as an evaluation may have it; None: ``call`` alone.
        exact: of arrays of exact numbers, one an operand, and the flat index of an element of the
            result; None: a float64 evaluation has to serve.
    """

    name: str
    call: Callable[..., Any]
    reordered: Callable[..., Tensor] | None = None
    exact: Callable[..., Any] | None = None


def numbers_of(tensor: Tensor) -> Any:
    """The same numbers exactly."""
    array = np.empty(tensor.numel(), dtype=object)
    array[:] = [mp(v) for v in tensor.detach().double().reshape(-1).tolist()]
    return array.reshape(tuple(tensor.shape))


def summed(rng: random.Random, terms: Tensor) -> Tensor:
    """The sum of ``terms`` over the last dimension in one of many orders."""
    count = terms.shape[-1]
    order = list(range(count))
    rng.shuffle(order)
    terms = terms[..., order]
    way = rng.choice(["torch", "one by one", "tree", "blocks", "largest last"])
    if count < 2 or way == "torch":
        return terms.sum(-1)
    if way == "largest last":
        terms = terms.gather(-1, terms.abs().argsort(-1))
    if way == "blocks":
        parts = terms.split(rng.randint(1, count), -1)
        return torch.stack([part.sum(-1) for part in parts], -1).sum(-1)
    if way == "tree":
        while terms.shape[-1] > 1:
            terms = F.pad(terms, (0, terms.shape[-1] % 2))
            terms = terms[..., ::2] + terms[..., 1::2]
        return terms[..., 0]
    total = terms[..., 0]
    for k in range(1, count):
        total = total + terms[..., k]
    return total


def products(rng: random.Random, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """``x matrix^T + bias`` for ``x (..., K)`` and ``matrix (..., N, K)``, one order for all."""
    if rng.random() < 0.4:  # with fused products
        order = list(range(x.shape[-1]))
        rng.shuffle(order)
        result = (x[..., None, order] @ matrix[..., order].mT).squeeze(-2)
        return result if bias is None else result + bias
    terms = x[..., None, :] * matrix
    if bias is not None and rng.random() < 0.7:
        shift = bias.expand(terms.shape[:-1])[..., None]
        return summed(rng, torch.cat([terms, shift], -1))
    result = summed(rng, terms)
    return result if bias is None else result + bias


def affine(
    name: str,
    linear_part: Callable[[Any], Any],
    call: Callable[[Any], Any],
    shape: tuple[int, ...],
    bias: Callable[[Any], Tensor] | None = None,
) -> Operation:
    """An affine map; its matrix is what it makes of unit vectors.

    Args:
        name: of the operation.
        linear_part: maps ``(B, *shape)`` without the bias.
        call: the whole map.
        shape: of one input, whose batch comes first.
        bias: from a tensor, for its dtype, to what broadcasts to one result; None: nothing is
            added.
    """
    count = math.prod(shape)

    def parts(like: Tensor) -> tuple[Tensor, Tensor | None]:
        units = torch.eye(count, dtype=like.dtype).reshape(count, *shape)
        images = linear_part(units)
        shift = None if bias is None else bias(like).expand(images.shape[1:]).reshape(-1)
        return images.reshape(count, -1).mT, shift

    def reordered(rng: random.Random, x: Tensor) -> Tensor:
        matrix, shift = parts(x)
        return products(rng, x.reshape(-1, count), matrix, shift).reshape(call(x).shape)

    def exact(points: Any, index: int) -> Any:
        matrix, shift = parts(torch.zeros((), dtype=torch.float64))
        item, row = divmod(index, len(matrix))
        start = mp(0) if shift is None else mp(float(shift[row]))
        source = points.reshape(-1, count)[item]
        return start + sum(
            (mp(a) * b for a, b in zip(matrix[row].tolist(), source, strict=True)), mp(0)
        )

    return Operation(name, call, reordered, exact)
