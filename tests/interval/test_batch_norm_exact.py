"""Batch norm against 60 digits: tiny variances, means that cancel, denormal inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyrobust import Interval

mpmath = pytest.importorskip("mpmath")

EPS = 1e-12


def channels():
    """``(x, mean, variance, weight, bias)``, each ``(C,)``, float32."""
    variance = torch.tensor([0.0, 1e-38, 1e-30, 1e-20, 1e-12, 1.0, 1e20]).repeat(6)
    mean = torch.tensor([0.0, 1.0, -1e6, 3e-39, 1e20, -0.1]).repeat_interleave(7)
    near = mean * (1 + 2.0**-22 * torch.randn(42))
    weight, bias = torch.randn(42), torch.randn(42) * 10.0 ** torch.randint(-30, 8, (42,))
    return near, mean, variance, weight, bias


@pytest.mark.parametrize("rounding", ["real", "deployed"])
@pytest.mark.parametrize("width", [0.0, 1e-40, 1e-3])
def test_attained_corners_lie_inside(rounding, width):
    for seed in range(5):
        torch.manual_seed(seed)
        x, mean, variance, weight, bias = channels()
        box = Interval((x - width)[None], (x + width)[None], rounding=rounding)
        result = F.batch_norm(box, mean, variance, weight, bias, eps=EPS)
        for corner in (box.lower[0], box.upper[0]):
            for i in range(len(x)):
                with mpmath.workdps(60):
                    at, centre, spread, slope, shift = (
                        mpmath.mpf(float(t[i])) for t in (corner, mean, variance, weight, bias)
                    )
                    exact = (at - centre) / mpmath.sqrt(spread + mpmath.mpf(EPS)) * slope + shift
                    assert mpmath.mpf(float(result.lower[0, i])) <= exact
                    assert exact <= mpmath.mpf(float(result.upper[0, i]))


def test_deployed_contains_torch_and_its_folded_form():
    for seed in range(20):
        torch.manual_seed(seed)
        x, mean, variance, weight, bias = channels()
        box = Interval((x - 1e-3)[None], (x + 1e-3)[None], rounding="deployed")
        result = F.batch_norm(box, mean, variance, weight, bias, eps=EPS)
        scale = weight * (variance + EPS).rsqrt()
        point = torch.minimum(torch.maximum(x[None], box.lower), box.upper)
        for y in (
            F.batch_norm(point, mean, variance, weight, bias, eps=EPS),
            point * scale + (bias - mean * scale),
        ):
            assert bool(result.contains(y).all())
