"""Checks on state dicts that every kind of weight arithmetic here shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pyrobust._checks import check_finite

__all__ = ["check_names", "check_no_ties", "check_same_state", "check_state_finite", "shorten"]

_SHOWN = 5


def shorten(names: Iterable[str]) -> str:
    """The first few names as text, and how many more there are."""
    listed = [str(name) for name in names]
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def check_names(subject: str, expected: Iterable[str], got: Iterable[str]) -> None:
    """Raise ValueError naming the keys that are missing or unexpected."""
    want, have = list(expected), list(got)
    missing = [name for name in want if name not in set(have)]
    extra = [name for name in have if name not in set(want)]
    if missing or extra:
        parts = [f"missing {shorten(missing)}"] if missing else []
        parts += [f"unexpected {shorten(extra)}"] if extra else []
        raise ValueError(f"{subject}: names must be the same on both sides; {'; '.join(parts)}.")


def check_same_state(
    subject: str, first: Mapping[str, Tensor], second: Mapping[str, Tensor]
) -> None:
    """Raise unless both states hold the same names, shapes and dtypes."""
    check_names(subject, first, second)
    for name, value in first.items():
        other = second[name]
        if value.shape != other.shape:
            raise ValueError(
                f"{subject}: '{name}' must have one shape on both sides; "
                f"got {tuple(value.shape)} and {tuple(other.shape)}."
            )
        if value.dtype != other.dtype:
            raise TypeError(
                f"{subject}: '{name}' must have one dtype on both sides; "
                f"got {value.dtype} and {other.dtype}."
            )


def check_state_finite(subject: str, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming the first tensor with a NaN or an infinity."""
    for name, value in state.items():
        if value.is_floating_point():
            check_finite(subject, f"'{name}'", value)


def check_no_ties(subject: str, model: nn.Module) -> dict[str, Tensor]:
    """The state of ``model``; raises ValueError when two names share one tensor's memory."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    seen: dict[tuple[torch.device, int], str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.numel() == 0:
            continue
        place = (value.device, value.data_ptr())
        if place in seen:
            raise ValueError(
                f"{subject}: weights must not be tied; '{seen[place]}' and '{name}' share memory."
            )
        seen[place] = name
    return state
