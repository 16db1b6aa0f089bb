"""Convolutions that wait: what follows one is then done in the same pass over its outputs.

A rule of ``Interval`` says that it could wait (:data:`collector`). The operator, once it has
checked everything, hands its native call over as a :class:`Product` in place of running it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyrobust.ops import _interval_precision
from pyrobust.ops._interval_checks import Ends
from pyrobust.ops._kept_memory import new_ends

__all__ = ["Norm", "Product", "Sum", "Unchanged", "collector", "hand_over"]

Norm = tuple[Tensor, bool]  # (4, C) mean, scale, shift, gain; whether a ReLU stands before
Sum = tuple[Tensor, Tensor, bool, bool]  # ends of the other box, ReLUs before: own and other's

# A copy of the weights must be small beside the passes over the outputs that it saves, and these
# large beside the calls that wait for one another (Zen 4, one thread and two: with batch norm and a
# sum it loses 20% at 65536 values, 15% at 131072, and wins from 262144 on).
_LEAST_VALUES = 1 << 18
_VALUES_PER_COPIED = 2


class Unchanged:
    """Ends of a box that are read later, and must not change in place until then."""

    def __init__(self, ends: Sequence[Tensor]) -> None:
        self._ends, self._seen = ends, self._versions(ends)

    def check(self) -> None:
        """Raise RuntimeError where they changed."""
        if self._versions(self._ends) != self._seen:
            raise RuntimeError(
                "Interval: the ends of a box were changed in place before the result of a "
                "convolution or sum that needs them was read; change a copy of them."
            )

    @staticmethod
    def _versions(ends: Sequence[Tensor]) -> list[int]:
        """How often each was changed; nobody counts it for tensors of inference mode."""
        return [0 if end.is_inference() else end._version for end in ends]


class Product:
    """A native interval convolution that has been checked but not run.

    Args:
        native: the entry point.
        before: its arguments before the outputs, dense tensors among them.
        owned: places in ``before`` of tensors that belong to the layer, which may change them.
        shape: of the outputs.
    """

    def __init__(
        self,
        native: Callable[..., bool],
        before: Sequence[Any],
        owned: Sequence[int],
        shape: Sequence[int],
    ) -> None:
        self.native, self.before, self.owned = native, list(before), owned
        self.shape = torch.Size(shape)
        self.seen = (
            self.shape
        )  # in which its caller gives the outputs: more axes or fewer of size 1
        self._input = Unchanged(self.before[:2])
        self._coarse = _interval_precision.coarse  # a permission of the block that asks

    @property
    def form(self) -> Tensor:
        """A tensor like an output, without its memory."""
        end: Tensor = self.before[0].new_empty(()).expand(self.seen)
        return end

    def run(self, norm: Norm | None = None, total: Sum | None = None) -> tuple[Ends, bool]:
        """The ends after ``norm`` and ``total``, and whether all are finite.

        Raises:
            RuntimeError: the input was changed in place since the product was made.
        """
        self._input.check()
        lower, upper = new_ends(self.before[0], self.shape)
        if total is not None:
            total = total[0].view(self.shape), total[1].view(self.shape), *total[2:]
        late = None if norm is None and total is None else (norm, total)
        with _interval_precision.coarse_radii(self._coarse):
            finite = self.native(*self.before, lower, upper, torch.get_num_threads(), late)
        return (lower.view(self.seen), upper.view(self.seen)), finite

    def worth_waiting(self) -> bool:
        """Whether later passes over the outputs cost more than a copy of the weights."""
        values = self.shape.numel()
        copied = sum(part.numel() for at in self.owned for part in _tensors(self.before[at]))
        return values >= _LEAST_VALUES and values >= _VALUES_PER_COPIED * copied

    def keep_weights(self) -> None:
        """Copy what belongs to the layer, so that it may change before the product is run."""
        for at in self.owned:
            self.before[at] = _copied(self.before[at])


def _tensors(value: Any) -> list[Tensor]:
    parts = value if isinstance(value, tuple) else (value,)
    return [part for part in parts if isinstance(part, Tensor)]


def _copied(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_copied(part) for part in value)
    return value.detach().clone() if isinstance(value, Tensor) else value


class _Collector(threading.local):
    """Runs an operator that may hand its product over."""

    active: bool = False
    product: Product | None = None

    def _taken(self) -> Product | None:
        return self.product

    def run(self, call: Callable[[], Ends]) -> tuple[Ends, Product | None]:
        """What ``call`` gives, and the product that waits where those are no ends yet."""
        self.active, self.product = True, None
        try:
            ends = call()
            product = self._taken()
            if product is not None:
                product.seen = ends[0].shape
            return ends, product
        finally:
            self.active, self.product = False, None


collector = _Collector()


def hand_over(product: Product) -> bool:
    """Whether the caller of the operator takes ``product`` as it is, to run it later."""
    if not collector.active or not product.worth_waiting():
        return False
    product.keep_weights()
    collector.product = product
    return True
