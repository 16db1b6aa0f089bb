"""Boxes of convolutions that wait for what follows: batch norm, the sum with another box.

In plain eager mode without gradients the rule of a large convolution gives a box whose ends are
made when somebody reads them. Batch norm and a sum with another box give such a box too, so that
``relu(bn(conv(x)) + identity)`` is one product whose epilogue does the rest while ends are in
cache; the ReLU is carried out by whoever reads the result, as always. The bits are those of
separate passes.

Nobody can tell, but by time: weights are copied when they are given, statistics are read then,
errors name the place where a step was asked for. A step whose input somebody still holds does not
join it, since that input would be computed twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from pyrobust.interval.errors import Place, at_place, place
from pyrobust.interval.finite import check_result, infinite_ends_allowed
from pyrobust.interval.reader_modes import without_modes_of_reader
from pyrobust.interval.type import Interval, adopt, wait_for
from pyrobust.ops._interval_checks import Ends
from pyrobust.ops._late_products import Norm, Product, Sum, Unchanged, collector

__all__ = ["Deferred", "may_wait", "run_or_wait"]

Step = tuple[Callable[[Interval], Interval], Place]  # by itself, and where it was asked for


class Deferred:
    """The ends of a convolution and of what followed it, made on first use and then kept.

    Args:
        product: the convolution.
        name: its name, for errors.
        rounding: the promise of the ends.
        steps: what follows it, as functions that do them one by one.
        before: for each step the ends before it, as long as somebody holds a box of those.
        norm: the same steps for the product's epilogue.
        total: likewise.
        at: where the convolution was asked for.

    Attributes:
        form: a tensor like an end, without its memory.
    """

    def __init__(
        self,
        product: Product,
        name: str,
        rounding: str,
        at: Place,
        *,
        steps: tuple[Step, ...] = (),
        before: tuple[weakref.ref[Deferred], ...] = (),
        norm: Norm | None = None,
        total: Sum | None = None,
    ) -> None:
        self.form = product.form
        self._product: Product | None = product
        self._name, self._rounding, self._at = name, rounding, at
        self._steps, self._before = steps, before
        self._norm, self._sum = norm, total
        self._other = Unchanged(() if total is None else total[:2])
        self._ends: Ends | None = None

    @property
    def takes_norm(self) -> bool:
        """Whether a norm can still join the product."""
        return self._product is not None and self._norm is None and self._sum is None

    @property
    def takes_sum(self) -> bool:
        """Whether a sum can still join it."""
        return self._product is not None and self._sum is None

    def followed(
        self,
        step: Callable[[Interval], Interval],
        *,
        norm: Norm | None = None,
        total: Sum | None = None,
    ) -> Interval:
        """The box after one more step: ``step`` by itself, ``norm`` or ``total`` with the rest."""
        assert self._product is not None
        later = Deferred(
            self._product,
            self._name,
            self._rounding,
            self._at,
            steps=(*self._steps, (step, place())),
            before=(*self._before, weakref.ref(self)),
            norm=norm or self._norm,
            total=total,
        )
        return wait_for(later, self._rounding)

    def ends(self) -> Ends:
        """The ends.

        Raises:
            OverflowError: a step leaves the range of float32.
            RuntimeError: the ends of a box that a step was called on were changed in place.
        """
        if self._ends is None:
            assert self._product is not None
            self._other.check()
            with without_modes_of_reader():
                self._ends = self._from_before() or self._at_once(self._product)
            self._product = self._norm = self._sum = None
            self._steps = self._before = ()
            self._other = Unchanged(())
        return self._ends

    def _from_before(self) -> Ends | None:
        """From the last ends before a step that somebody holds, which are needed anyway."""
        for index in reversed(range(len(self._steps))):
            held = self._before[index]()
            if held is not None:
                held.ends()
                return self._one_by_one(wait_for(held, self._rounding), self._steps[index:])
        return None

    def _at_once(self, product: Product) -> Ends:
        ends, finite = product.run(self._norm, self._sum)
        if finite:
            return ends
        ends, finite = product.run()
        if not finite:
            lower, upper = product.before[:2]
            operands = (adopt(lower, upper, self._rounding),)
            with at_place(self._at):
                check_result(self._name, *ends, operands, takes_infinity=False)
        return self._one_by_one(adopt(*ends, self._rounding), self._steps)

    def _one_by_one(self, box: Interval, steps: tuple[Step, ...]) -> Ends:
        """To do no work twice, or to say which step overflows, and where."""
        for step, modules in steps:
            with at_place(modules):
                box = step(box)
        return box.lower, box.upper


def may_wait() -> bool:
    """Whether a convolution in plain eager mode may wait."""
    return not infinite_ends_allowed()


def run_or_wait(
    call: Callable[[], Ends], name: str, rounding: str
) -> tuple[Ends | None, Interval | None]:
    """The ends that the operator ``call`` gives, or the box that waits for them."""
    ends, product = collector.run(call)
    if product is None:
        return ends, None
    return None, wait_for(Deferred(product, name, rounding, place()), rounding)
