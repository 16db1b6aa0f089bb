"""Fine-tuning of a noise-conditioned encoder into the base of a smoothed classifier.

Source: Lei et al., ICLR 2025, arXiv 2501.13094 (:mod:`pyrobust.train.rrcm`), section 3.3; the
consistency terms: Jeong, Shin, NeurIPS 2020, arXiv 2006.04062.
Departures: the weight of the consistency term rises over the first third of training; from the
start, weight 10 at noise 0.5 makes a classifier trained from scratch collapse to one class.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from pyrobust._checks import (
    check_at_least,
    check_integer,
    check_positive,
    check_shape,
    check_unit,
)
from pyrobust.nn.noise_conditioned import NoiseConditionedClassifier
from pyrobust.train.noise_levels import KarrasSchedule
from pyrobust.train.schedules import cosine_decay, linear_ramp
from pyrobust.train.smoothing_losses import consistency_terms

__all__ = ["NoiseConsistencyLoss", "fit_smoothed_classifier"]

_STD = 0.5  # pixels in [0, 1] are normalised to [-1, 1], so noise counts twice there


class NoiseConsistencyLoss(nn.Module):
    """``CE(all copies) + lam mean_i KL(mean || p_i) + eta H(mean)``.

    Args:
        lam: weight of the divergence, ``>= 0`` (the paper: 10 at noise 0.25, 20 above).
        eta: weight of the entropy of the mean prediction, ``>= 0``.
        m: noisy copies per input, ``>= 2``.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, lam: float = 10.0, eta: float = 0.5, m: int = 2) -> None:
        super().__init__()
        check_at_least("NoiseConsistencyLoss", "lam", lam, 0.0)
        check_at_least("NoiseConsistencyLoss", "eta", eta, 0.0)
        check_integer("NoiseConsistencyLoss", "m", m, 2)
        self.lam, self.eta, self.m = lam, eta, m

    def forward(self, logits: Tensor, labels: Tensor, *, ramp: float = 1.0) -> Tensor:
        """Scalar loss.

        Args:
            logits: ``(m, N, K)`` float, one slice per copy.
            labels: ``(N,)`` int64.
            ramp: factor of ``lam``, in [0, 1].

        Raises:
            ValueError: shapes that disagree or ``ramp`` out of range.
        """
        check_shape("NoiseConsistencyLoss", "logits", logits, (self.m, len(labels), None))
        check_unit("NoiseConsistencyLoss", "ramp", ramp)
        plain = F.cross_entropy(logits.flatten(0, 1), labels.repeat(self.m))
        divergence, entropy = consistency_terms(logits)
        return plain + ramp * self.lam * divergence + self.eta * entropy


def fit_smoothed_classifier(
    encoder: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    sigma: float,
    features: int,
    num_classes: int,
    loss: NoiseConsistencyLoss | None = None,
    schedule: KarrasSchedule | None = None,
    levels: int = 81,
    epochs: int = 100,
    learning_rate: float = 1.5e-4,
    weight_decay: float = 0.0,
    layer_decay: float = 1.0,
    warmup: float = 0.1,
    ramp: float = 1 / 3,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> NoiseConditionedClassifier:
    """A classifier of inputs with Gaussian noise ``sigma``, from a pre-trained encoder.

    Works on a copy of the encoder whose ``projection`` is dropped. In a process group the copy is
    trained under ``DistributedDataParallel``; give each process its own part of the data.

    Args:
        encoder: ``encoder(x, sigma)`` returns projection and feature, for images in [-1, 1].
        loader: batches of ``(N, C, H, W)`` pixels in [0, 1] and ``(N,)`` int64 labels, iterated
            once per epoch; it must have a length.
        sigma: standard deviation of the smoothing noise, ``> 0``, for pixels in [0, 1].
        features: width of the encoder's feature.
        num_classes: ``K >= 2``.
        loss: None takes :class:`NoiseConsistencyLoss` with its defaults.
        schedule: noise levels of pre-training; None takes the defaults.
        levels: how many of them; the nearest to ``2 sigma`` is told to the encoder.
        epochs: passes over the data, ``>= 1`` (the paper: 100 for CIFAR-10).
        learning_rate: of AdamW, ``> 0`` (1e-4 to 2e-4).
        weight_decay: ``>= 0``.
        layer_decay: factor of the rate per block towards the input, in (0, 1] (0.65 to 0.85); below
            1 the encoder must have ``blocks``.
        warmup: share of training in which the rate rises, in [0, 1].
        ramp: share of training in which the weight of the divergence rises, in [0, 1].
        generator: source of the noise.
        progress: show a progress bar.

    Returns:
        The classifier in evaluation mode: the base of :class:`pyrobust.nn.SmoothedClassifier`.

    Raises:
        ValueError: an argument out of range, or ``2 sigma`` outside the noise levels.
        FloatingPointError: the loss is no longer finite.
    """
    subject = "fit_smoothed_classifier"
    check_integer(subject, "epochs", epochs, 1)
    check_positive(subject, "learning_rate", learning_rate)
    check_at_least(subject, "weight_decay", weight_decay, 0.0)
    check_unit(subject, "warmup", warmup)
    check_unit(subject, "ramp", ramp)
    check_positive(subject, "sigma", sigma)
    schedule = schedule or KarrasSchedule()
    level = float(schedule.sigmas(levels)[schedule.nearest(sigma / _STD, levels)])
    inner = copy.deepcopy(encoder)
    if isinstance(getattr(inner, "projection", None), nn.Module):
        inner.projection = nn.Identity()
    model = NoiseConditionedClassifier(inner, features, num_classes, level, mean=_STD, std=_STD)
    model.to(next(encoder.parameters()).device)
    loss = loss or NoiseConsistencyLoss()
    groups = _groups(subject, model, learning_rate, layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay)
    running = _distributed(model).train()
    total, step = epochs * len(loader), 0  # type: ignore[arg-type]
    with tqdm(total=total, disable=not progress, unit="step", desc=subject) as bar:
        for _ in range(epochs):
            for images, labels in loader:
                done = step / total
                factor = cosine_decay(done, warmup=warmup)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * max(factor, 1 / total)
                copies = images.repeat(loss.m, 1, 1, 1)
                noise = torch.randn(copies.shape, generator=generator, dtype=copies.dtype)
                logits = running(copies + sigma * noise.to(copies.device))
                weight = linear_ramp(done, end=ramp)
                value = loss(logits.unflatten(0, (loss.m, len(images))), labels, ramp=weight)
                if not torch.isfinite(value):
                    raise FloatingPointError(f"{subject}: the loss became {value.item()}.")
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                step += 1
                bar.update()
    return model.eval()


def _distributed(model: nn.Module) -> nn.Module:
    """The model under ``DistributedDataParallel`` where a process group stands."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return nn.parallel.DistributedDataParallel(model)
    return model


def _groups(
    subject: str, model: NoiseConditionedClassifier, rate: float, decay: float
) -> list[dict[str, Any]]:
    """Parameter groups whose rates fall by ``decay`` per block from the head to the input."""
    if not 0 < decay <= 1:
        raise ValueError(f"{subject}: layer_decay must lie in (0, 1]; got {decay}.")
    blocks = getattr(model.encoder, "blocks", None)
    if decay < 1 and blocks is None:
        raise ValueError(
            f"{subject}: layer_decay below 1 needs an encoder with blocks; "
            f"{type(model.encoder).__name__} has none."
        )
    depth = 0 if blocks is None else len(blocks)
    groups: dict[int, list[nn.Parameter]] = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            parts = name.split(".")
            inside = parts[:2] == ["encoder", "blocks"]
            last = parts[0] == "head" or parts[1] == "norm"
            layer = int(parts[2]) + 1 if inside else depth + 1 if last else 0
            groups.setdefault(layer, []).append(value)
    return [
        {"params": values, "peak": rate * decay ** (depth + 1 - layer)}
        for layer, values in groups.items()
    ]
