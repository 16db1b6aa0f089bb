"""Noise and votes on a GPU against ``fill_``, torch's own noise and the targets."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_timing import Clock, Row, no_time, seconds_of

from pyrobust import ops

__all__ = ["measure"]

_PART = "sampling"
_SHAPES = ((1, 100_000, 3072), (1, 100_000, 784), (1, 1000, 150_528))
_COMPILED = (50_000, 3072)
_VOTES = ((100_000, 10), (10_000, 1000))


def measure(clock: Clock) -> Iterator[Row]:
    """Every shape and type, then votes."""
    for images, samples, elements in _SHAPES:
        if clock.left() < 5:
            yield no_time(_PART, f"every noise {samples} x {elements}")
            continue
        yield from _gaussian(images, samples, elements)
        torch.cuda.empty_cache()
    yield from _compiled()
    yield from _votes()


def _gaussian(images: int, samples: int, elements: int) -> Iterator[Row]:
    x = torch.rand(images, elements)
    sigma = torch.full((images,), 0.25)
    count = images * samples * elements
    shape = f"{samples} x {elements}"
    out = torch.empty(images, samples, elements)
    fill = seconds_of([lambda: out.fill_(1.0)])
    eager = seconds_of([lambda: x[:, None] + 0.25 * torch.randn_like(out)], graph=False)
    for name, kernel in (
        ("gaussian", ops.gaussian_samples),
        ("uniform", ops.uniform_samples),
        ("laplace", ops.laplace_samples),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            call = lambda k=kernel, d=dtype: k(x, sigma, samples, seed=0, dtype=d)  # noqa: E731
            seconds = seconds_of([call])
            detail = f"{seconds * 1e6:.0f} us, {count / seconds / 1e12:.2f}e12/s"
            what = f"{name} {str(dtype)[6:]} {shape}"
            if dtype == torch.float32:
                share = fill / seconds
                yield Row(_PART, what, share, "of fill_", 0.85, 0.95, detail)
            else:
                yield Row(_PART, what, count / seconds / 1e12, "1e12/s", 0.9, 1.2, detail)
            if name == "gaussian" and dtype == torch.float32:
                yield Row(_PART, what, eager / seconds, "x torch eager add", 4.0, 5.0, detail)


def _compiled() -> Iterator[Row]:
    samples, elements = _COMPILED
    x = torch.rand(1, elements)
    sigma = torch.full((1,), 0.25)

    @torch.compile
    def noisy(x: torch.Tensor) -> torch.Tensor:
        return x[:, None] + 0.25 * torch.randn(1, samples, elements, device="cuda")

    what = f"gaussian float32 {samples} x {elements}"
    try:
        with torch.device("cpu"):  # a default device is a mode, which cannot be traced
            theirs = seconds_of([lambda: noisy(x)], graph=False)
    except Exception as error:  # no compiler on the machine, say
        yield Row(_PART, what, float("nan"), "x torch.compile", 1.3, None, repr(error)[:80])
        return
    ours = seconds_of([lambda: ops.gaussian_samples(x, sigma, samples, seed=0)])
    yield Row(_PART, what, theirs / ours, "x torch.compile", 1.3, None, f"{ours * 1e6:.0f} us")


def _votes() -> Iterator[Row]:
    for samples, classes in _VOTES:
        logits = torch.randn(samples, classes)
        ours = seconds_of([lambda v=logits: ops.count_votes(v)])  # type: ignore[misc]

        def theirs(v: torch.Tensor = logits, k: int = classes) -> torch.Tensor:
            return torch.zeros(k, dtype=torch.int64).scatter_add_(
                0, v.argmax(1), torch.ones(len(v), dtype=torch.int64)
            )

        reference = seconds_of([theirs])
        what = f"votes float32 {samples} x {classes}"
        yield Row(_PART, what, reference / ours, "x torch", detail=f"{ours * 1e6:.1f} us")
