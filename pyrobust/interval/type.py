"""``Interval``: a box of tensors that ordinary torch functions and modules accept.

An Interval is not a tensor: it implements ``__torch_function__`` and looks every torch function up
in one table of rules (:mod:`pyrobust.interval.table`). An operation without a rule raises
NotImplementedError with its name and the module that called it; nothing falls back to a point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pyrobust import _native
from pyrobust._checks import check_choice
from pyrobust.interval.application import QUICK, RULES, apply_rule
from pyrobust.interval.errors import (
    MissingRule,
    check_ends,
    check_float,
    missing,
    where,
)
from pyrobust.interval.finite import refuse_infinite_ends
from pyrobust.interval.operators import Operators
from pyrobust.interval.outward import sum_ends
from pyrobust.interval.reader_modes import reader_watches, without_modes_of_reader
from pyrobust.ops._interval_checks import Ends, is_deployed
from pyrobust.ops._interval_fallback import round_outward
from pyrobust.ops._library import (
    autocasting,
    dispatcher_watched,
    function_modes,
    plain_eager,
)
from pyrobust.ops._visible_numbers import visible

__all__ = [
    "ROUNDINGS",
    "Interval",
    "adopt",
    "assign",
    "hold",
    "put_off",
    "rectify",
    "settle",
    "unclipped",
    "wait_for",
    "weakest",
    "with_flushed",
    "wrap",
]

# from the weakest promise to the strongest
ROUNDINGS = ("nearest", "real", "deployed", "deployed-tf32", "deployed-bfloat16")


class Interval(Operators):
    """The box of all tensors ``t`` with ``lower <= t <= upper``, element by element.

    Any torch model can be called on it; the result contains the image of the box. What "contains"
    promises is ``rounding``:

    - ``"real"`` (default): the exact real-number image, for the weights as stored.
    - ``"deployed"``: also what any float32 evaluation returns, in any order of summation.
    - ``"deployed-tf32"``, ``"deployed-bfloat16"``: also what products (linear, convolution, matmul)
      return whose operands are rounded to TF32 or bfloat16 first and summed in float32 (not what
      packed layers do with bfloat16 or float16 inputs).
    - ``"nearest"``: plain floating point, fast and unsound, for training.

    Where intervals meet, the result carries the weakest of their promises.

    Args:
        lower: lower ends, float32 or float64, finite.
        upper: upper ends, same shape, dtype and device, ``>= lower``.
        rounding: the promise, see above.

    Raises:
        TypeError: an end is not a float32 or float64 tensor, or the dtypes differ.
        ValueError: the shapes differ, an end is NaN or infinite, ``lower > upper``, or ``rounding``
            is unknown.
        OverflowError: an operation on a box leaves the range of its dtype (RuntimeError from
            compiled code; on a GPU ends become infinite instead, see :meth:`check_finite`).

    Example:
        >>> box = Interval(torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 3.0]))
        >>> torch.relu(box)
        Interval(lower=tensor([0., 2.]), upper=tensor([1., 3.]), rounding='real')
    """

    rounding: str
    _lower: Tensor
    _upper: Tensor
    # the same after all that waits; to set them sets those: csrc/bindings/settled_ends.cpp
    _settled_lower: Tensor
    _settled_upper: Tensor
    # memory and shape of both ends, in place of tensors, until somebody asks for those
    _kept: tuple[bytearray, tuple[int, ...]] | None
    # what gives both ends on first use, in place of tensors: interval/deferred.py
    _deferred: Any = None
    _source: Any = None  # the same once they are made
    _memory: list[int]  # shared with views: how often the memory was changed in place
    _seen: int  # the count at which this object is current
    _rectified: bool  # whether a ReLU of the ends is still to come: layers do it on the way in
    _graded: bool  # whether gradients were on when it was asked for
    finite_by_kernel: bool = False  # what made the ends has told that they are

    def __init__(self, lower: Tensor, upper: Tensor, *, rounding: str = "real") -> None:
        if not dispatcher_watched() and _native.hold_ends(self, lower, upper, rounding):
            return
        check_choice("Interval", "rounding", rounding, ROUNDINGS)
        check_ends(lower, upper)
        _set(self, lower, upper, rounding, None)

    @classmethod
    def ball(
        cls,
        x: Tensor,
        eps: float | Tensor,
        *,
        clamp: tuple[float, float] | None = None,
        rounding: str = "real",
    ) -> Interval:
        """The box of all tensors within ``eps`` of ``x``, rounded outward.

        Args:
            x: ``(...)`` centre, float32 or float64.
            eps: radius, ``>= 0``, in the units of ``x``; a tensor broadcasts against ``x``.
            clamp: lowest and highest value of the data; the box is cut to them.
            rounding: see :class:`Interval`. With ``"nearest"`` the numbers of ``x`` on a GPU are
                not checked, which would stop it.

        Raises:
            ValueError: ``eps`` is negative or NaN, ``clamp`` is out of order, an end is NaN or
                infinite, or no point of the clamp range lies within ``eps`` of ``x``.
        """
        if cls is Interval and not (dispatcher_watched() or function_modes()):
            threads, graded = torch.get_num_threads(), torch.is_grad_enabled()
            done: Interval | None = _native.ball(x, eps, clamp, rounding, threads, graded)
            if done is not None:
                return done
        check_choice("Interval.ball", "rounding", rounding, ROUNDINGS)
        check_float("Interval.ball", "x", x)
        # a number stays on the CPU: nothing then waits for a GPU
        place = x.device if isinstance(eps, Tensor) else torch.device("cpu")
        radius = torch.as_tensor(eps, dtype=torch.float64, device=place)
        if visible(radius) and not bool((radius >= 0).all()):
            raise ValueError(f"Interval.ball: eps must be at least 0; got {eps}.")
        centre = x.double()
        if rounding == "nearest":
            low, high = (centre - radius).to(x.dtype), (centre + radius).to(x.dtype)
        else:
            low, high = sum_ends((centre, -radius), (centre, radius), x.dtype)
        looked_at = not (rounding == "nearest" and x.is_cuda)
        if clamp is not None:
            if looked_at and visible(x) and bool(x.isnan().any()):  # cut, its ends would be numbers
                raise ValueError("Interval.ball: x must not be NaN; it holds NaN values.")
            low, high = _clamped(low, high, clamp, looked_at)
        return cls(low, high, rounding=rounding) if looked_at else wrap(low, high, rounding)

    @classmethod
    def hull(cls, values: Tensor | Interval, dim: int, *, rounding: str = "real") -> Interval:
        """The smallest box that contains every slice of ``values`` along ``dim``.

        With the embeddings of a set of tokens per position, ``(B, T, S, D)``, ``dim=2`` gives the
        box ``(B, T, D)`` of all sentences that can be chosen.

        Args:
            values: the candidates, float32 or float64, or already a box.
            dim: the dimension of the candidates, at least one of them.
            rounding: see :class:`Interval`; that of ``values`` where it is a box.
        """
        if isinstance(values, Interval):
            return wrap(values.lower.amin(dim), values.upper.amax(dim), values.rounding)
        return cls(values.amin(dim), values.amax(dim), rounding=rounding)

    # -- what it holds -------------------------------------------------------------------------

    @property
    def lower(self) -> Tensor:
        """The lower ends, not to be changed in place: results may still read them."""
        if torch.compiler.is_compiling():
            _check_current(self)
        return self._settled_lower

    @property
    def upper(self) -> Tensor:
        """The upper ends, not to be changed in place: results may still read them."""
        if torch.compiler.is_compiling():
            _check_current(self)
        return self._settled_upper

    @property
    def center(self) -> Tensor:
        """Midpoint, rounded to nearest."""
        return self.lower * 0.5 + self.upper * 0.5

    @property
    def radius(self) -> Tensor:
        """Half the width, rounded to nearest; for a rounded-up one see :meth:`width`."""
        return self.upper * 0.5 - self.lower * 0.5

    def width(self) -> Tensor:
        """``upper - lower``, rounded up unless ``rounding`` is ``"nearest"``."""
        if self.rounding == "nearest":
            return self.upper - self.lower
        ends = self.upper.double(), -self.lower.double()
        return sum_ends(ends, ends, self.dtype)[1]

    def check_finite(self) -> Interval:
        """Raise OverflowError where an end is infinite; returns self.

        On the CPU every operation does so by itself. On a GPU, which looking stops, ends that
        overflow become infinite, and this is how to ask, once for a whole model.
        """
        refuse_infinite_ends(self.lower, self.upper)
        return self

    def contains(self, value: Tensor | Interval) -> Tensor:
        """Element by element, whether a tensor (or box) lies inside; a bool tensor.

        The comparison is exact: values are compared as float64, whatever their dtype.
        """
        low, high = (value.lower, value.upper) if isinstance(value, Interval) else (value, value)
        return (self.lower.double() <= low.double()) & (high.double() <= self.upper.double())

    @property
    def shape(self) -> torch.Size:
        """Shape of either end."""
        return self._form.shape

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64."""
        return self._form.dtype

    @property
    def device(self) -> torch.device:
        """Device of the ends."""
        return self._form.device

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self._form.ndim

    @property
    def requires_grad(self) -> bool:
        """Whether either end takes part in differentiation."""
        if torch.compiler.is_compiling():
            return self._settled_lower.requires_grad or self._settled_upper.requires_grad
        if self._deferred is not None or (self._rectified and not self._graded):
            return False
        return self._lower.requires_grad or self._upper.requires_grad

    @property
    def is_nested(self) -> bool:
        """Always False; torch's transformer modules ask."""
        return False

    @property
    def is_cuda(self) -> bool:
        """Whether the ends lie on a CUDA device."""
        return self._form.is_cuda

    @property
    def T(self) -> Interval:
        """Transpose of a matrix."""
        return wrap(self.lower.T, self.upper.T, self.rounding, base=self)

    @property
    def mT(self) -> Interval:
        """Transpose of the last two dimensions."""
        return wrap(self.lower.mT, self.upper.mT, self.rounding, base=self)

    def size(self, dim: int | None = None) -> Any:
        """Shape, or the size of one dimension."""
        return self._form.shape if dim is None else self._form.shape[dim]

    def dim(self) -> int:
        """Number of dimensions."""
        return self._form.ndim

    def numel(self) -> int:
        """Number of elements."""
        return self._form.numel()

    def is_floating_point(self) -> bool:
        """Always True."""
        return True

    def is_contiguous(self, **_: Any) -> bool:
        """Whether both ends are contiguous."""
        return self.lower.is_contiguous() and self.upper.is_contiguous()

    def requires_grad_(self, requires_grad: bool = True) -> Interval:
        """Let both ends take part in differentiation; returns self."""
        self.lower.requires_grad_(requires_grad)
        self.upper.requires_grad_(requires_grad)
        return self

    def __len__(self) -> int:
        return len(self._form)

    @property
    def _form(self) -> Tensor:
        """A tensor of the shape, dtype and device of the ends."""
        if torch.compiler.is_compiling():
            return self._settled_lower
        form: Tensor = self._lower if self._deferred is None else self._deferred.form
        return form

    def __getstate__(self) -> dict[str, Any]:
        if self._deferred is not None:
            _make_tensors(self)
        return {name: value for name, value in self.__dict__.items() if name != "_source"}

    def __iter__(self) -> Iterator[Interval]:
        for low, high in zip(self.lower, self.upper, strict=True):
            yield wrap(low, high, self.rounding, base=self)

    def __repr__(self) -> str:
        if self._rectified:
            settle(self)
        return f"Interval(lower={self._lower!r}, upper={self._upper!r}, rounding={self.rounding!r})"

    # -- operations ----------------------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Look ``func`` up in the table of rules and apply its rule."""
        quick = QUICK.get(func)
        if quick is not None and not (dispatcher_watched() or autocasting()):
            done = quick(*args, **kwargs) if kwargs else quick(*args)
            if done is not None:
                return done
        return apply_rule(func, *args, **kwargs) if kwargs else apply_rule(func, *args)

    def __getattr__(self, name: str) -> Any:
        """Methods of ``torch.Tensor`` that have a rule; ends that were kept, as tensors."""
        if name.startswith("_"):
            if name in ("_lower", "_upper"):
                _make_tensors(self)
                if name in self.__dict__:
                    return self.__dict__[name]
            raise AttributeError(f"Interval has no attribute {name!r}")
        method = getattr(torch.Tensor, name, None)
        if method is None:
            raise AttributeError(f"Interval has no attribute {name!r}")
        if method not in RULES:
            raise MissingRule(missing(f"Tensor.{name}"))

        def bound(*args: Any, **kwargs: Any) -> Any:
            return apply_rule(method, self, *args, **kwargs)

        return bound

    def __getitem__(self, index: Any) -> Interval:
        return wrap(self.lower[index], self.upper[index], self.rounding, base=self)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise MissingRule(missing("assignment to an index"))

    def _assign(self, result: Interval) -> Interval:
        return assign(self, result)


def wrap(lower: Tensor, upper: Tensor, rounding: str, *, base: Interval | None = None) -> Interval:
    """An Interval of ends that are known to be in order.

    Args:
        lower: lower ends.
        upper: upper ends.
        rounding: the promise they carry.
        base: the interval that these are a view of, where they are one.
    """
    box = Interval.__new__(Interval)
    _set(box, lower, upper, rounding, base)
    return box


def adopt(lower: Any, upper: Any, rounding: str) -> Interval:
    """An Interval of ends as the kernels make them: in order, and ready for flushed denormals.

    Args:
        lower: lower ends; or the memory of both, a bytearray that nobody else has, and then
        upper: their shape, instead of upper ends.
        rounding: the promise they carry.
    """
    box = Interval.__new__(Interval)
    if type(lower) is bytearray:
        box._kept = lower, upper
    else:
        box._kept, box._lower, box._upper = None, lower, upper
    box.rounding = rounding
    box._memory, box._seen = [0], 0
    box._rectified, box._graded = False, False
    return box


def wait_for(deferred: Any, rounding: str) -> Interval:
    """An Interval whose ends are ``deferred.ends()``, made on first use."""
    box = Interval.__new__(Interval)
    box._kept, box._deferred, box.rounding = None, deferred, rounding
    box._memory, box._seen = [0], 0
    box._rectified, box._graded = False, False
    return box


def _make_tensors(box: Interval) -> None:
    """Give ``box`` tensors for ends that it keeps or waits for, if it does."""
    kept = box.__dict__.get("_kept")  # absent where an object is only being made
    if kept is not None:
        with without_modes_of_reader() if reader_watches() else nullcontext():
            made = _native.tensors_of_kept(*kept)
        assert made is not None
        box._lower, box._upper = made
        box._kept = None
    elif box._deferred is not None:
        box._lower, box._upper = box._deferred.ends()
        # what follows this box and waits finds its ends by that
        box._source, box._deferred = box._deferred, None


def assign(box: Interval, result: Interval) -> Interval:
    """What an operation in place does to ``box``: it becomes ``result``.

    Views of the same memory would change with a tensor. They do not here, so they become unusable
    instead of silently keeping the old values.
    """
    if box.shape != result.shape or box.dtype != result.dtype:
        raise ValueError(
            f"Interval: an operation in place must keep shape and dtype, {tuple(box.shape)} and "
            f"{box.dtype}; got {tuple(result.shape)} and {result.dtype}."
        )
    _check_current(box)
    box._memory[0] += 1
    box._seen = box._memory[0]
    if torch.compiler.is_compiling():
        hold(box, result.lower, result.upper, result.rounding)
        return box
    box._kept, box._deferred, box.rounding = None, result._deferred, result.rounding
    box._source = result._source
    if result._deferred is None:
        box._lower, box._upper = result._lower, result._upper
    else:
        for name in ("_lower", "_upper"):
            box.__dict__.pop(name, None)
    box._rectified, box._graded = result._rectified, result._graded
    box.finite_by_kernel = result.finite_by_kernel
    return box


def rectify(box: Interval) -> Interval:
    """``max(0, x)``. In plain eager mode the next layer clips on its way in, or the first user."""
    if not _may_put_off(box):
        return wrap(box.lower.relu(), box.upper.relu(), box.rounding)
    if box._deferred is not None:
        _check_current(box)
        result = wait_for(box._deferred, box.rounding)
    else:
        lower, upper, _ = unclipped(box, kept=True)
        result = adopt(lower, upper, box.rounding)
    result._rectified, result._graded = True, torch.is_grad_enabled()
    return result


def _may_put_off(box: Interval) -> bool:
    """Whether a ReLU of ``box`` may wait: compiled code never asks what else may wait."""
    if not plain_eager():
        return False
    no_tensors = box._kept is not None or box._deferred is not None
    return no_tensors or plain_eager(box._lower, box._upper)


def unclipped(box: Interval, *, kept: bool = False) -> tuple[Any, Any, bool]:
    """The ends, and whether their ReLU is still to come.

    With ``kept``, ends that are no tensors yet are given as their memory and shape.
    """
    if torch.compiler.is_compiling():
        return box.lower, box.upper, False
    _check_current(box)
    if kept and box._kept is not None:
        return *box._kept, box._rectified
    if box._rectified and box._graded != torch.is_grad_enabled():
        settle(box)
    return box._lower, box._upper, box._rectified


def put_off(box: Interval, like: Interval) -> Interval:
    """Tell ``box``, made of the ends of ``like`` before its ReLU, that the ReLU is to come."""
    if not torch.compiler.is_compiling():
        box._rectified, box._graded = like._rectified, like._graded
    return box


def weakest(*values: Any) -> str:
    """The weakest promise among the intervals of ``values``."""
    ranks = [ROUNDINGS.index(v.rounding) for v in values if isinstance(v, Interval)]
    return ROUNDINGS[min(ranks)]


def _set(box: Interval, lower: Tensor, upper: Tensor, rounding: str, base: Interval | None) -> None:
    if is_deployed(rounding) and base is None:
        lower, upper = with_flushed(lower, upper, lower.dtype)
    box._memory = [0] if base is None else base._memory
    box._seen = box._memory[0]
    hold(box, lower, upper, rounding)


def hold(box: Interval, lower: Tensor, upper: Tensor, rounding: str) -> None:
    """Let ``box`` hold these ends, and nothing wait."""
    box._kept, box._deferred, box._source, box.rounding = None, None, None, rounding
    box._settled_lower, box._settled_upper = lower, upper
    box._rectified, box._graded = False, False
    box.finite_by_kernel = False


def with_flushed(lower: Tensor, upper: Tensor, dtype: torch.dtype) -> Ends:
    """The ends, moved to zero where flushing hardware may read zero for numbers of ``dtype``."""
    if not _may_be_flushed(lower, upper):
        return lower, upper
    tiny = torch.finfo(dtype).tiny
    low = torch.where((lower > 0) & (lower < tiny), 0.0, lower)
    return low, torch.where((upper < 0) & (upper > -tiny), 0.0, upper)


def _may_be_flushed(lower: Tensor, upper: Tensor) -> bool:
    """Whether an end may be a denormal whose loss would cut zero off, or cannot be looked at."""
    return not plain_eager(lower, upper) or _native.box_ends_in_denormals(lower, upper) is not False


def settle(box: Interval) -> None:
    """Carry out a ReLU that was put off; what reading the ends calls where they are not settled.

    Raises:
        NotImplementedError: the memory was changed in place.
    """
    _check_current(box)
    if box._rectified:
        plain = not reader_watches()
        mode = torch.set_grad_enabled if plain else without_modes_of_reader
        lower, upper = box._lower, box._upper
        with mode(box._graded):
            box._lower, box._upper = lower.relu(), upper.relu()
        box._rectified = False


def _check_current(box: Interval) -> None:
    if box._seen != box._memory[0]:
        raise NotImplementedError(
            "Interval: this box shares memory with one that was changed in place; use the "
            f"operation that is not in place{where()}."
        )


def _clamped(low: Tensor, high: Tensor, clamp: tuple[float, float], looked_at: bool) -> Ends:
    least, most = clamp
    if not least <= most:
        raise ValueError(f"Interval.ball: clamp must be (lowest, highest); got {clamp}.")
    bounds = torch.tensor([least, most], dtype=torch.float64)
    first, last = (float(end) for end in round_outward(bounds[0], bounds[1], low.dtype))
    if looked_at and visible(low) and bool(((high < first) | (low > last)).any()):
        raise ValueError(
            f"Interval.ball: x must lie within eps of the clamp range {clamp}; it does not."
        )
    return low.clamp(first, last), high.clamp(first, last)
