"""Every rule of Interval around and below the smallest normal number: inclusion to the last bit."""

from __future__ import annotations

import pytest
import torch

from pyrobust import Interval

from .test_interval_rules import EACH

# Sums of centres and of radii round by themselves: boxes that are nearly the same are off by units.
OF_KERNELS = {"linear", "addmm", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))}
SCALES = [-149, -118]  # exponents of the last bits


def numbers(shape, sign):
    """Denormals, small normal numbers and zeros, of one sign or both."""
    whole = torch.randint(-(2**10), 2**10, shape).double()
    values = (whole * torch.exp2(torch.randint(*SCALES, shape).double() - 8)).float()
    return values if sign == 0 else sign * values.abs()


def nested(row, kind):
    """Ends of a box and of one inside it: far smaller, nearly the same, or a point."""
    sign = (row.low > 0) - (row.high < 0)
    drawn = torch.stack([numbers(row.shape, sign) for _ in range(4)]).sort(0).values
    outer, inner = (drawn[0], drawn[3]), (drawn[1], drawn[2])
    if kind == "nearly the same":
        up, down = (torch.nextafter(a, b) for a, b in (outer, outer[::-1]))
        kept = torch.rand(2, *row.shape) < 0.5
        lower = torch.where(kept[0], outer[0], up)
        inner = lower, torch.where(kept[1], outer[1], down).maximum(lower)
    if kind == "point":
        inner = inner[:1] * 2
    return outer, inner


@EACH
@pytest.mark.parametrize("rounding", ["real", "deployed"])
def test_a_smaller_box_has_a_smaller_image_below_the_normal_numbers(row, rounding):
    kinds = ["far smaller", "point"] + ["nearly the same"] * (row.name not in OF_KERNELS)
    for kind in kinds * 8:
        outer, inner = nested(row, kind)
        try:
            whole = row.call(Interval(*outer, rounding=rounding))
        except (OverflowError, ValueError):
            continue
        part = row.call(Interval(*inner, rounding=rounding))
        if row.name in OF_KERNELS:  # which add 2^-100 to each radius
            slack = 1e-6 * (whole.upper.double() - whole.lower.double())
        else:
            slack = torch.zeros(())
        assert bool((whole.lower.double() <= part.lower.double() + slack).all()), kind
        assert bool((part.upper.double() <= whole.upper.double() + slack).all()), kind
