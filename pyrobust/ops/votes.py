"""Vote counting: the arg-max class of each noisy copy, and the histogram over the copies."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from pyrobust import _native
from pyrobust._checks import check_float_tensor
from pyrobust.ops import _cuda_sampling
from pyrobust.ops._library import define, dispatcher_needed, slice_by_slice
from pyrobust.ops._sampling_checks import FLOATS, check_place

__all__ = ["count_votes"]


def count_votes(logits: Tensor, *, num_classes: int | None = None) -> Tensor:
    """Histogram of the arg-max classes along the sample axis; ties go to the lowest class.

    Args:
        logits: ``(..., n, K)`` float32, bfloat16 or float16 on the CPU or a CUDA device. While a
            CUDA graph is captured, NaN is not reported: a sample with one votes for no class.
        num_classes: the expected ``K``; None accepts any.

    Returns:
        ``(..., K)`` int64 counts that sum to ``n``.

    Raises:
        TypeError: ``logits`` has another dtype.
        ValueError: ``K`` is 0 or not ``num_classes``, or a logit is NaN (the message names the
            sample).
        NotImplementedError: ``logits`` is on a device without kernels.

    Example:
        >>> count_votes(torch.tensor([[0.0, 1.0], [2.0, 2.0], [0.0, 3.0]]))
        tensor([1, 2])
    """
    if has_torch_function((logits,)):
        result: Tensor = handle_torch_function(
            count_votes, (logits,), logits, num_classes=num_classes
        )
        return result
    subject = "count_votes"
    check_float_tensor(subject, "logits", logits)
    if logits.dtype not in FLOATS:
        raise TypeError(
            f"{subject}: logits must have dtype float32, bfloat16 or float16; got {logits.dtype}."
        )
    check_place(subject, "logits", logits)
    if logits.ndim < 2:
        raise ValueError(
            f"{subject}: logits must have shape (..., n, K); got {tuple(logits.shape)}."
        )
    classes = logits.shape[-1]
    if num_classes is not None and classes != num_classes:
        raise ValueError(
            f"{subject}: logits must have {num_classes} classes on the last axis; "
            f"got shape {tuple(logits.shape)}."
        )
    if classes == 0:
        raise ValueError(f"{subject}: logits must have at least one class; got 0.")
    if not dispatcher_needed(logits):
        return _votes_cpu(logits)
    counts: Tensor = torch.ops.pyrobust.count_votes(logits)
    return counts


def _votes_cpu(logits: Tensor) -> Tensor:
    rows = logits.detach().reshape(-1, logits.shape[-1]).contiguous()
    votes = torch.empty(rows.shape[0], dtype=torch.int64)
    nan = _native.find_votes(rows, votes, torch.get_num_threads())
    if nan >= 0:
        _refuse_nan(logits, nan)
    counts = torch.zeros((*logits.shape[:-2], logits.shape[-1]), dtype=torch.int64)
    votes = votes.view(logits.shape[:-1])
    return counts.scatter_add_(-1, votes, torch.ones_like(votes))


def _refuse_nan(logits: Tensor, row: int) -> NoReturn:
    where: list[int] = []
    for size in reversed(logits.shape[:-1]):
        row, position = divmod(row, size)
        where.insert(0, position)
    raise ValueError(f"count_votes: logits must not be NaN; sample {tuple(where)} is.")


def _votes_cuda(logits: Tensor) -> Tensor:
    """The same by one launch; reading whether there was a NaN waits, but not within a graph."""
    counts, first_nan = _cuda_sampling.count_votes(logits)
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return counts
    before_end = int(first_nan)
    if before_end < 0:
        _refuse_nan(logits, logits.shape[:-1].numel() + before_end)
    return counts


def _votes_fake(logits: Tensor) -> Tensor:
    return logits.new_empty((*logits.shape[:-2], logits.shape[-1]), dtype=torch.int64)


define(
    "count_votes(Tensor logits) -> Tensor",
    _votes_cpu,
    _votes_fake,
    cuda=_votes_cuda,
    vmap=slice_by_slice("count_votes"),
)
