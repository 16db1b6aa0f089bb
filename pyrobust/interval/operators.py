"""The operators of Python on boxes: each is a rule of the table, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from pyrobust.interval.application import apply_rule
from pyrobust.interval.errors import MissingRule, missing

__all__ = ["Operators"]


class Operators:
    """What :class:`pyrobust.Interval` answers to ``+``, ``@``, ``<`` and their kin."""

    if TYPE_CHECKING:

        def _assign(self, result: Any) -> Any: ...

        @classmethod
        def __torch_function__(
            cls,
            func: Callable[..., Any],
            types: Any,
            args: tuple[Any, ...] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any: ...

    def __bool__(self) -> bool:
        raise MissingRule(missing("the truth value (a branch on data)"))

    def __eq__(self, other: object) -> bool:
        raise MissingRule(missing("comparison"))

    __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__
    __hash__ = object.__hash__

    def __add__(self, other: Any) -> Any:
        return type(self).__torch_function__(torch.add, (type(self),), (self, other))

    def __radd__(self, other: Any) -> Any:
        return apply_rule(torch.add, other, self)

    def __sub__(self, other: Any) -> Any:
        return apply_rule(torch.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return apply_rule(torch.sub, other, self)

    def __mul__(self, other: Any) -> Any:
        return apply_rule(torch.mul, self, other)

    def __rmul__(self, other: Any) -> Any:
        return apply_rule(torch.mul, other, self)

    def __truediv__(self, other: Any) -> Any:
        return apply_rule(torch.div, self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return apply_rule(torch.div, other, self)

    def __matmul__(self, other: Any) -> Any:
        return apply_rule(torch.matmul, self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return apply_rule(torch.matmul, other, self)

    def __pow__(self, exponent: Any) -> Any:
        return apply_rule(torch.pow, self, exponent)

    def __neg__(self) -> Any:
        return apply_rule(torch.neg, self)

    def __abs__(self) -> Any:
        return apply_rule(torch.abs, self)

    def __iadd__(self, other: Any) -> Any:
        return self._assign(self + other)

    def __isub__(self, other: Any) -> Any:
        return self._assign(self - other)

    def __imul__(self, other: Any) -> Any:
        return self._assign(self * other)

    def __itruediv__(self, other: Any) -> Any:
        return self._assign(self / other)

    def __ipow__(self, exponent: Any) -> Any:
        return self._assign(self**exponent)

    def __imatmul__(self, other: Any) -> Any:
        return self @ other  # nor does torch work in place here

    def __pos__(self) -> Any:
        return self

    def __rpow__(self, base: Any) -> Any:
        return apply_rule(torch.pow, base, self)

    def __floordiv__(self, other: Any) -> Any:
        raise MissingRule(missing("the operator //"))

    def __mod__(self, other: Any) -> Any:
        raise MissingRule(missing("the operator %"))

    def __invert__(self) -> Any:
        raise MissingRule(missing("the operator ~"))

    def __and__(self, other: Any) -> Any:
        raise MissingRule(missing("a logical or bitwise operator"))

    __rfloordiv__ = __ifloordiv__ = __floordiv__
    __rmod__ = __imod__ = __mod__
    __or__ = __xor__ = __lshift__ = __rshift__ = __and__
    __rand__ = __ror__ = __rxor__ = __rlshift__ = __rrshift__ = __and__
