"""Schedules: functions of the share of training that is done, in [0, 1]."""

from __future__ import annotations

from pyrobust._checks import check_at_least

__all__ = ["linear_ramp", "step_decay"]


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
