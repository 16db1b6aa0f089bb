"""The one place that words errors: subject, argument, what is accepted, what was seen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_at_least",
    "check_choice",
    "check_eval_mode",
    "check_finite",
    "check_float_tensor",
    "check_instance",
    "check_integer",
    "check_labels",
    "check_open_unit",
    "check_positive",
    "check_shape",
    "check_unit",
    "require_extra",
]


def check_choice(subject: str, name: str, value: Any, accepted: Iterable[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``accepted``."""
    options = accepted if isinstance(accepted, tuple) else list(accepted)
    if value not in options:
        listed = ", ".join(str(option) for option in options)
        raise ValueError(f"{subject}: {name} must be one of {listed}; got {value!r}.")


def check_integer(subject: str, name: str, value: Any, minimum: int) -> None:
    """Raise unless ``value`` is an integer ``>= minimum`` (booleans are refused)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{subject}: {name} must be an integer; got {type(value).__name__}.")
    if value < minimum:
        raise ValueError(f"{subject}: {name} must be at least {minimum}; got {value}.")


def check_instance(subject: str, name: str, value: Any, kind: type) -> None:
    """Raise TypeError unless ``value`` is an instance of ``kind``."""
    if not isinstance(value, kind):
        package = "torch.nn" if kind.__module__.startswith("torch.nn.") else kind.__module__
        wanted = f"{package}.{kind.__qualname__}"
        raise TypeError(f"{subject}: {name} must be a {wanted}; got {type(value).__name__}.")


def check_at_least(subject: str, name: str, value: float, minimum: float) -> None:
    """Raise ValueError unless ``value`` is finite and ``>= minimum``."""
    if not (math.isfinite(value) and value >= minimum):
        raise ValueError(f"{subject}: {name} must be finite and at least {minimum}; got {value}.")


def check_positive(subject: str, name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is finite and ``> 0``."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{subject}: {name} must be finite and positive; got {value}.")


def check_open_unit(subject: str, name: str, value: float) -> None:
    """Raise ValueError unless ``0 < value < 1``."""
    if not 0 < value < 1:
        raise ValueError(f"{subject}: {name} must lie in the open interval (0, 1); got {value}.")


def check_unit(subject: str, name: str, value: float) -> None:
    """Raise ValueError unless ``0 <= value <= 1``."""
    if not 0 <= value <= 1:
        raise ValueError(f"{subject}: {name} must lie in the interval [0, 1]; got {value}.")


def check_float_tensor(subject: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{subject}: {name} must be a torch.Tensor; got {type(value).__name__}.")
    if not value.is_floating_point():
        raise TypeError(f"{subject}: {name} must be a floating-point tensor; got {value.dtype}.")


def check_finite(subject: str, name: str, value: Tensor) -> None:
    """Raise ValueError where ``value`` holds a NaN or an infinity."""
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{subject}: {name} must be finite; it holds NaN or infinite values.")


def check_shape(subject: str, name: str, value: Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise ValueError unless the shape agrees with ``expected`` (None accepts any size)."""
    shape = tuple(value.shape)
    if shape == expected:
        return
    agrees = len(shape) == len(expected) and all(
        want is None or want == have for want, have in zip(expected, shape, strict=True)
    )
    if not agrees:
        wanted = "(" + ", ".join("*" if size is None else str(size) for size in expected) + ")"
        raise ValueError(f"{subject}: {name} must have shape {wanted}; got {tuple(value.shape)}.")


def check_labels(
    subject: str, name: str, labels: Tensor, count: int, classes: int | None = None
) -> None:
    """Raise unless ``labels`` are ``count`` integers in ``[0, classes)``; None sets no limit."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"{subject}: {name} must be an integer tensor; got {labels.dtype}.")
    check_shape(subject, name, labels, (count,))
    limit = math.inf if classes is None else classes
    wrong = labels[(labels < 0) | (labels >= limit)]
    if wrong.numel():
        raise ValueError(f"{subject}: {name} must lie in [0, {limit}); got {int(wrong[0])}.")


def check_eval_mode(subject: str, model: torch.nn.Module) -> None:
    """Raise ValueError when a module of ``model`` is in training mode."""
    for name, module in model.named_modules():
        if module.training:
            where = f"its module '{name}' is" if name else "it is"
            raise ValueError(
                f"{subject}: the model must be in evaluation mode, but {where} in training mode; "
                "call model.eval() first."
            )


def require_extra(subject: str, package: str, extra: str) -> ImportError:
    """The error to raise when an optional ``package`` is missing."""
    return ImportError(f'{subject} needs {package}: pip install "pyrobust[{extra}]"')
