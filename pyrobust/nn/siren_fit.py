"""Fitting a sine network to a signal, and what its start holds: activations and tangent kernel.

Source: as :mod:`pyrobust.nn.siren_square`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyrobust._checks import check_integer, check_positive
from pyrobust.nn.siren_square import SIREN

__all__ = ["activation_spectrum", "empirical_ntk", "fit_signal", "ntk_spectrum"]


@torch.no_grad()
def activation_spectrum(model: SIREN, coords: Tensor, *, layer: int = 1) -> Tensor:
    """Mean magnitude spectrum of the activations after a sine layer.

    Args:
        model: the network.
        coords: ``(N, 1)`` equidistant coordinates.
        layer: 1-based sine layer.

    Returns:
        ``(N // 2 + 1,)`` magnitudes from frequency 0 to Nyquist, mean over the units, each unit
        taken without its mean.
    """
    h = model.hidden(coords, layer)
    magnitude: Tensor = torch.fft.rfft(h - h.mean(0, keepdim=True), dim=0).abs().mean(-1)
    return magnitude


def empirical_ntk(model: nn.Module, coords: Tensor) -> Tensor:
    """Neural tangent kernel ``J J^T / n^2`` of a scalar-output network on ``n`` coordinates.

    Args:
        model: maps ``(n, d)`` to ``(n, 1)``.
        coords: ``(n, d)``.

    Returns:
        ``(n, n)`` symmetric positive semi-definite matrix.

    Raises:
        ValueError: more than one output channel.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    output = model(coords)
    if output.shape != (len(coords), 1):
        raise ValueError(
            f"empirical_ntk: the model must give shape ({len(coords)}, 1); got "
            f"{tuple(output.shape)}."
        )
    rows = []
    for value in output.flatten():
        grads = torch.autograd.grad(value, parameters, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.T / len(coords) ** 2


def ntk_spectrum(model: nn.Module, coords: Tensor) -> Tensor:
    """Frequency content of the tangent kernel: ``sum_i lambda_i |FFT(v_i)|^2 / n``.

    Args:
        model: as in :func:`empirical_ntk`.
        coords: ``(n, 1)`` equidistant coordinates.

    Returns:
        ``(n // 2 + 1,)`` non-negative numbers from frequency 0 to Nyquist.
    """
    eigenvalues, vectors = torch.linalg.eigh(empirical_ntk(model, coords))
    power = torch.fft.rfft(vectors, dim=0).abs().square()
    weighted: Tensor = power @ eigenvalues.clamp_min(0)
    return weighted / len(coords)


def fit_signal(
    model: nn.Module,
    coords: Tensor,
    target: Tensor,
    *,
    steps: int = 1000,
    lr: float = 1e-4,
    decay: float = 0.99,
    decay_every: int = 20,
    max_points: int = 2**18,
    generator: torch.Generator | None = None,
    progress: bool = False,
    callback: Callable[[int, float], Any] | None = None,
) -> list[float]:
    """Fit ``model(coords)`` to ``target`` with Adam; the best state by PSNR is kept.

    Args:
        model: maps ``(N, d)`` to ``(N, C)``; trained in place and left in its best state.
        coords: ``(N, d)``.
        target: ``(N, C)``, scaled to [-1, 1].
        steps: optimizer steps, ``>= 1``.
        lr: initial learning rate.
        decay: factor of the learning rate every ``decay_every`` steps.
        decay_every: steps between decays.
        max_points: above this many points a step sees a random subset of that size.
        generator: source of the subsets.
        progress: show a bar.
        callback: called with ``(step, psnr)``.

    Returns:
        PSNR in dB (``-10 log10 MSE``) seen before each step.

    Raises:
        ValueError: shapes disagree, or an argument is out of range.
    """
    check_integer("fit_signal", "steps", steps, 1)
    check_positive("fit_signal", "lr", lr)
    if len(coords) != len(target):
        raise ValueError(
            f"fit_signal: coords and target must agree on axis 0; got {tuple(coords.shape)} and "
            f"{tuple(target.shape)}."
        )
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, decay_every, decay)
    history: list[float] = []
    best, best_state = -math.inf, copy.deepcopy(model.state_dict())
    for step in tqdm(range(steps), disable=not progress, desc="fit_signal"):
        x, y = coords, target
        if len(coords) > max_points:
            chosen = torch.randint(len(coords), (max_points,), generator=generator)
            x, y = coords[chosen.to(coords.device)], target[chosen.to(target.device)]
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        psnr = -10 * math.log10(max(loss.item(), 1e-30))
        if psnr > best:
            best, best_state = psnr, copy.deepcopy(model.state_dict())
        history.append(psnr)
        if callback is not None:
            callback(step, psnr)
        loss.backward()
        optimizer.step()
        schedule.step()
    model.load_state_dict(best_state)
    return history
