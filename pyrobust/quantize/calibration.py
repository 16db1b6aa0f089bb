"""Calibration data: batches that a model is run on, read once, checked, and replayed in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Call", "StopForward", "named_errors", "read_calibration", "run_named"]


class StopForward(Exception):
    """Raised inside a hook when nothing behind it is needed any more."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def on(self, module: nn.Module) -> Any:
        """What ``module`` returns for these arguments."""
        return module(*self.args, **self.kwargs)


def read_calibration(subject: str, calibration: Any, model: nn.Module) -> list[Call]:
    """The batches of ``calibration`` as calls of ``model``, on its device.

    A batch is a tensor (the only argument), a mapping (keyword arguments), or a tuple or list whose
    first element is the input and whose others, labels say, are not used. The batches are kept: a
    loader that shuffles or runs dry gives the same data in every pass.

    Args:
        subject: who asks, for the errors.
        calibration: a tensor (one batch) or an iterable of batches.
        model: tells the device.

    Raises:
        TypeError: ``calibration`` is not iterable, or a batch is none of these.
        ValueError: there is no batch, one is empty, or one holds NaN or infinite values.
    """
    if isinstance(calibration, Tensor):
        calibration = [calibration]
    if isinstance(calibration, Mapping) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"{subject}: calibration must be an iterable of batches; got "
            f"{type(calibration).__name__}."
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    calls = [_read_batch(subject, i, batch, device) for i, batch in enumerate(calibration)]
    if not calls:
        raise ValueError(f"{subject}: calibration must hold at least one batch; got none.")
    return calls


def _read_batch(subject: str, index: int, batch: Any, device: torch.device) -> Call:
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        call = Call((batch,), {})
    elif isinstance(batch, Mapping):
        call = Call((), dict(batch))
    else:
        raise TypeError(
            f"{subject}: calibration batch {index} must be a tensor, a mapping, or a tuple that "
            f"starts with one; got {type(batch).__name__}."
        )
    values = [*call.args, *call.kwargs.values()]
    for value in values:
        _check_values(subject, index, value)
    if not any(isinstance(value, Tensor) for value in values):
        raise ValueError(f"{subject}: calibration batch {index} must hold a tensor; got none.")
    return Call(
        tuple(_moved(value, device) for value in call.args),
        {name: _moved(value, device) for name, value in call.kwargs.items()},
    )


def _check_values(subject: str, index: int, value: Any) -> None:
    if not isinstance(value, Tensor):
        return
    if value.numel() == 0:
        raise ValueError(
            f"{subject}: calibration batch {index} must not be empty; got shape "
            f"{tuple(value.shape)}."
        )
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(
            f"{subject}: calibration batch {index} must be finite; it holds NaN or infinite values."
        )


def _moved(value: Any, device: torch.device) -> Any:
    return value.detach().to(device) if isinstance(value, Tensor) else value


def run_named(subject: str, model: nn.Module, index: int, call: Call) -> Any:
    """Run ``model`` on one call; an error is told with the name of the layer that raised it.

    Raises:
        ValueError: the model does not accept the batch.
        StopForward: passed on from hooks.
    """
    with named_errors(subject, model, index):
        return call.on(model)


@contextmanager
def named_errors(subject: str, model: nn.Module, index: int) -> Iterator[None]:
    """Tell an error of ``model`` while it runs on batch ``index`` with the name of its layer.

    Raises:
        ValueError: in the place of any other exception of the model.
        StopForward: passed on from hooks.
    """
    running: list[str] = []
    handles = []

    def leave(*_: Any) -> None:  # a hook that returns anything would replace the output
        running.pop()

    for name, module in model.named_modules():
        # A hook that comes first sees a module before any other hook can raise.
        handles.append(
            module.register_forward_pre_hook(lambda *_, at=name: running.append(at), prepend=True)
        )
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    except (StopForward, CalibrationError):
        raise
    except Exception as error:
        where = f"'{running[-1]}'" if running and running[-1] else type(model).__name__
        raise CalibrationError(
            f"{subject}: calibration batch {index} must fit the model; {where} raised "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


class CalibrationError(ValueError):
    """Calibration data that the model cannot be run on."""
