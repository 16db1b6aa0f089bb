"""Batch-norm statistics of a model whose weights were changed by arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["has_batchnorm", "recalibrate_batchnorm", "reset_batchnorm"]


def _tracking(model: nn.Module) -> list[_BatchNorm]:
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


def has_batchnorm(model: nn.Module) -> bool:
    """Whether ``model`` holds batch norms with running statistics."""
    return bool(_tracking(model))


def recalibrate_batchnorm(model: nn.Module, loader: Iterable[Any], *, blend: float = 1.0) -> None:
    """Re-estimate the running statistics of every batch norm in one pass over data.

    The new statistics are the cumulative average over batches, weighted by their size; the weights
    do not change. Only the batch norms are switched to training mode, so dropout stays off.

    Args:
        model: changed in place; all training flags are restored.
        loader: batches: a tensor, or a tuple or list whose first entry is the input.
        blend: in ``[0, 1]``; the share of the new statistics, the rest stays as it was.

    Raises:
        ValueError: ``blend`` lies outside ``[0, 1]``, or the loader is empty.
    """
    if not 0 <= blend <= 1:
        raise ValueError(f"recalibrate_batchnorm: blend must lie in [0, 1]; got {blend}.")
    norms = _tracking(model)
    if not norms:
        return
    before = [_statistics(norm) for norm in norms]
    flags = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    try:
        model.eval()
        new = _cumulative(model, norms, loader)
    finally:
        for module, training in flags:
            module.training = training
        for norm, momentum, old in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            _write(norm, old)
    for norm, old, fresh in zip(norms, before, new, strict=True):
        _write(norm, tuple(o.lerp(f, blend) for o, f in zip(old, fresh, strict=True)))


def reset_batchnorm(model: nn.Module, loader: Iterable[Any]) -> None:
    """Forget the running statistics and estimate them anew (``recalibrate_batchnorm``, blend 1).

    Needed after averaging networks: the average's activations have other statistics than either
    end point's.

    Raises:
        ValueError: the loader is empty.
    """
    recalibrate_batchnorm(model, loader, blend=1.0)


def _statistics(norm: _BatchNorm) -> tuple[Tensor, ...]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.clone(), norm.running_var.clone()


def _write(norm: _BatchNorm, values: tuple[Tensor, ...]) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(values[0])
    norm.running_var.copy_(values[1])


@torch.no_grad()
def _cumulative(
    model: nn.Module, norms: list[_BatchNorm], loader: Iterable[Any]
) -> list[tuple[Tensor, ...]]:
    count = 0
    counters = [norm.num_batches_tracked for norm in norms]
    saved = [None if counter is None else counter.clone() for counter in counters]
    for norm in norms:
        norm.train()
    try:
        for batch in loader:
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
            count += len(inputs)
            for norm in norms:
                norm.momentum = len(inputs) / count
            model(inputs)
    finally:
        for counter, old in zip(counters, saved, strict=True):
            if counter is not None and old is not None:
                counter.copy_(old)
    if count == 0:
        raise ValueError("recalibrate_batchnorm: the loader must yield at least one batch; got 0.")
    return [_statistics(norm) for norm in norms]
