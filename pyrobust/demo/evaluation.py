"""One variant's figures: size, speed, clean accuracy, certified accuracy in both norms."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyrobust.data import ImageSet
from pyrobust.demo.settings import DemoSettings
from pyrobust.interval import Interval
from pyrobust.nn import SmoothedClassifier
from pyrobust.train import worst_logits

__all__ = ["evaluate_variant", "interval_certified", "model_bytes"]

_BATCH = 256
_TIMED_PASSES = 20


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def interval_certified(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Which images are classified right on the whole l-infinity ball, by interval propagation.

    The statement holds for the exact real function of the stored weights on the valid images
    (pixels in [0, 1]) within ``eps``; the bounds are rounded outward.

    Args:
        model: the classifier, float or packed, in evaluation mode.
        images: ``(N, C, H, W)`` in [0, 1].
        labels: ``(N,)`` int64.
        eps: radius, ``>= 0``.

    Returns:
        ``(N,)`` bool.
    """
    parts = []
    with torch.no_grad():
        for x, y in zip(images.split(_BATCH), labels.split(_BATCH), strict=True):
            box = model(Interval.ball(x, eps, clamp=(0.0, 1.0)))
            worst = worst_logits(box.lower, box.upper, y)
            mine = worst.gather(1, y[:, None])
            others = worst.scatter(1, y[:, None], -torch.inf)
            parts.append(mine[:, 0] > others.amax(1))
    return torch.cat(parts)


def evaluate_variant(
    model: nn.Module, name: str, bits: int, data: ImageSet, settings: DemoSettings, progress: bool
) -> dict[str, Any]:
    """The entry of one variant in ``report.json``; certified means certified and correct."""
    images, labels = data.test_images, data.test_labels
    linf = [
        {
            "eps": eps,
            "certified_accuracy": _share(interval_certified(model, images, labels, eps)),
        }
        for eps in settings.eps_grid
    ]
    return {
        "name": name,
        "bits": bits,
        "bytes": model_bytes(model),
        "seconds_per_1000": _seconds_per_1000(model, images),
        "clean_accuracy": _clean_accuracy(model, images, labels),
        "linf": linf,
        "l2": _smoothed(model, name, data, settings, progress),
    }


def _share(hits: Tensor) -> float:
    """Share of True, as exactly as a float can hold it."""
    return int(hits.sum()) / len(hits)


def _clean_accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        logits = torch.cat([model(x) for x in images.split(_BATCH)])
    return _share(logits.argmax(1) == labels)


def _seconds_per_1000(model: nn.Module, images: Tensor) -> float:
    """Best of several forward passes over 1,000 images in batches."""
    copies = -(-1000 // len(images))
    batches = images.repeat(copies, 1, 1, 1)[:1000].split(_BATCH)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(_TIMED_PASSES + 1):
            start = time.perf_counter()
            for batch in batches:
                model(batch)
            best = min(best, time.perf_counter() - start)
    return best


def _smoothed(
    model: nn.Module, name: str, data: ImageSet, settings: DemoSettings, progress: bool
) -> list[dict[str, float]]:
    """Certified accuracy of the smoothed variant over the grid of l2 radii."""
    smoothed = SmoothedClassifier(model, settings.sigma, data.num_classes).eval()
    prediction, radius = [], []
    with tqdm(
        total=len(data.test_images), desc=f"smooth {name}", leave=False, disable=not progress
    ) as bar:
        for first in range(0, len(data.test_images), 20):
            certificate = smoothed.certify(
                data.test_images[first : first + 20],
                n0=settings.selection_samples,
                n=settings.samples,
                alpha=settings.alpha,
                seed=settings.seed,
                first_index=first,
                batch_size=settings.samples,
            )
            prediction.append(certificate.prediction)
            radius.append(certificate.radius)
            bar.update(len(certificate))
    correct = torch.cat(prediction) == data.test_labels
    return _certified_curve(correct, torch.cat(radius), settings.radius_grid)


def _certified_curve(
    correct: Tensor, radius: Tensor, grid: Sequence[float]
) -> list[dict[str, float]]:
    return [{"radius": r, "certified_accuracy": _share(correct & (radius >= r))} for r in grid]
