"""Schedules: functions of the share of training that is done, in [0, 1]."""

from __future__ import annotations

import math

from pyrobust._checks import check_at_least, check_unit

__all__ = ["cosine_decay", "linear_ramp", "step_decay"]


def linear_ramp(
    done: float, *, begin: float = 0.0, end: float = 1.0, low: float = 0.0, high: float = 1.0
) -> float:
    """``low`` until ``begin``, ``high`` from ``end`` on, a straight line between.

    Args:
        done: share of training that is done, in [0, 1].
        begin: where the line starts, ``>= 0``.
        end: where it stops, ``>= begin``; equal to ``begin`` makes a step.
        low: value before.
        high: value after.

    Raises:
        ValueError: ``end < begin``.

    Example:
        >>> linear_ramp(0.25, begin=0.0, end=0.5, high=2.0)
        1.0
    """
    check_at_least("linear_ramp", "begin", begin, 0.0)
    check_at_least("linear_ramp", "end", end, begin)
    if done >= end:
        return high
    if done <= begin:
        return low
    return low + (high - low) * (done - begin) / (end - begin)


def step_decay(done: float, *, steps: tuple[float, ...] = (0.7, 0.9), factor: float = 0.2) -> float:
    """``factor`` to the power of the number of ``steps`` already passed.

    Args:
        done: share of training that is done, in [0, 1].
        steps: shares at which the value drops.
        factor: what each drop multiplies by.

    Example:
        >>> step_decay(0.5), step_decay(0.8)
        (1.0, 0.2)
    """
    return float(factor ** sum(done >= step for step in steps))


def cosine_decay(done: float, *, warmup: float = 0.0, end: float = 0.0) -> float:
    """A straight line up to 1 at ``warmup``, then half a cosine down to ``end``.

    Args:
        done: share of training that is done, in [0, 1].
        warmup: share that the rise takes, in [0, 1].
        end: value at the end.

    Raises:
        ValueError: ``warmup`` lies outside [0, 1].

    Example:
        >>> cosine_decay(0.05, warmup=0.1), cosine_decay(1.0, warmup=0.1, end=0.01)
        (0.5, 0.01)
    """
    check_unit("cosine_decay", "warmup", warmup)
    if done < warmup:
        return done / warmup
    share = (done - warmup) / (1 - warmup) if warmup < 1 else 1.0
    return end + (1 - end) * (1 + math.cos(math.pi * share)) / 2
