"""Operations of random graphs with their parameters drawn: every kind of rule that computes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import mpmath
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrobust import Interval, pack

from .random_orders import Operation, affine, mp, products, summed


class Parameters:
    """Random parameters for operations on a box, of all sizes and in any layout."""

    def __init__(self, rng: random.Random, dtype: torch.dtype, scale: float) -> None:
        self.rng, self.dtype, self.scale = rng, dtype, scale

    def tensor(self, *shape: int, positive: bool = False) -> Callable[[Any], Tensor]:
        """A function that gives the same numbers in the dtype of its operand."""
        seeded = torch.Generator().manual_seed(self.rng.getrandbits(32))
        values = torch.randn(shape, generator=seeded, dtype=torch.float64)
        values = values * self.rng.choice([1.0, 1.0, 1.0, self.scale])
        kind = self.rng.choice(["all", "all", "few", "small integers"])
        if kind == "few":
            values = torch.where(torch.rand(shape, generator=seeded) < 0.6, 0.0, values)
        if kind == "small integers":
            values = values.sign() * torch.randint(1, 4, shape, generator=seeded)
        values = (values.abs() + 1e-3 if positive else values).to(self.dtype)
        if self.rng.random() < 0.3 and values.ndim > 1:
            values = values.mT.contiguous().mT
        return lambda x: values.to(x.dtype)

    @property
    def may_be_packed(self) -> bool:
        """Whether scales of packed weights are normal numbers: nothing covers them flushed."""
        return self.dtype == torch.float32 and self.scale > 1e-30

    def number(self) -> float:
        """A number that float32 may not hold."""
        return self.rng.choice([0.1, -1.7, 3.0, 0.5, -0.3, 1e-3])


Draw = Parameters
Maker = Callable[[Draw, Interval], "Operation | None"]


def reference(function: Callable[..., Any]) -> Callable[..., Any]:
    """``exact`` of a function of one number."""
    return lambda points, index: function(points.reshape(-1)[index])


# -- affine ----------------------------------------------------------------------------------


def linear(p: Draw, x: Interval) -> Operation | None:
    if x.ndim == 0 or x.shape[-1] == 0:
        return None
    rows, terms = p.rng.choice([1, 2, 3, 5, 17]), x.shape[-1]
    weight, bias = p.tensor(rows, terms), p.tensor(rows) if p.rng.random() < 0.6 else None
    if p.rng.random() < 0.3 and x.ndim == 2:
        shift = p.tensor(rows)
        return affine(
            "addmm",
            lambda x: x @ weight(x).mT,
            lambda x: torch.addmm(shift(x), x, weight(x).mT),
            (terms,),
            shift,
        )
    return affine(
        "linear",
        lambda x: F.linear(x, weight(x)),
        lambda x: F.linear(x, weight(x), None if bias is None else bias(x)),
        (terms,),
        bias,
    )


def packed_linear(p: Draw, x: Interval) -> Operation | None:
    if x.ndim == 0 or x.shape[-1] == 0 or not p.may_be_packed:
        return None
    layer = nn.Linear(x.shape[-1], p.rng.choice([1, 4, 9]), bias=p.rng.random() < 0.5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(p.tensor(*parameter.shape)(parameter))
    group = p.rng.choice([8, 32])
    packed = pack(nn.Sequential(layer), bits=p.rng.choice([2, 3, 4, 8]), group_size=group)[0]
    weight = packed.dequantize()
    shift = None if packed.bias is None else packed.bias.detach()
    whole = affine(
        "packed linear",
        lambda x: F.linear(x, weight.to(x.dtype)),
        lambda x: F.linear(x, weight.to(x.dtype), None if shift is None else shift.to(x.dtype)),
        (x.shape[-1],),
        None if shift is None else lambda x: shift.to(x.dtype),
    )

    def call(x: Any) -> Any:
        narrow = isinstance(x, Interval) or x.dtype == torch.float32
        return packed(x) if narrow else whole.call(x)

    return Operation(whole.name, call, lambda rng, x: packed(x), whole.exact)


def convolution(p: Draw, x: Interval) -> Operation | None:
    n = x.ndim - 2
    if n not in (1, 2, 3) or 0 in x.shape:
        return None
    transposed = p.rng.random() < 0.3
    groups = p.rng.choice([g for g in (1, 2, 3) if x.shape[1] % g == 0])
    inputs, outputs = x.shape[1], groups * p.rng.choice([1, 2])
    window = [p.rng.choice([1, 2, 3]) for _ in range(n)]
    shape = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
    weight, bias = p.tensor(*shape, *window), p.tensor(outputs) if p.rng.random() < 0.5 else None
    options = {"stride": p.rng.choice([1, 2]), "padding": p.rng.choice([0, 1]), "groups": groups}
    options["dilation"] = p.rng.choice([1, 1, 2])
    reach = [options["dilation"] * (w - 1) + 1 for w in window]
    if any(s + 2 * options["padding"] < r for s, r in zip(x.shape[2:], reach, strict=True)):
        return None
    function = getattr(F, f"conv{'_transpose' * transposed}{n}d")
    if transposed and any(
        (s - 1) * options["stride"] + r <= 2 * options["padding"]
        for s, r in zip(x.shape[2:], reach, strict=True)
    ):
        return None
    return affine(
        function.__name__,
        lambda x: function(x, weight(x), None, **options),
        lambda x: function(x, weight(x), None if bias is None else bias(x), **options),
        tuple(x.shape[1:]),
        None if bias is None else lambda x: bias(x).reshape(-1, *[1] * n),
    )


def packed_convolution(p: Draw, x: Interval) -> Operation | None:
    if x.ndim != 4 or 0 in x.shape or not p.may_be_packed:
        return None
    window = tuple(min(p.rng.choice([1, 2, 3]), size) for size in x.shape[2:])
    layer = nn.Conv2d(x.shape[1], p.rng.choice([1, 3, 8]), window, p.rng.choice([1, 2]))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(p.tensor(*parameter.shape)(parameter))
    packed = pack(nn.Sequential(layer), bits=p.rng.choice([2, 4, 8]), group_size=16)[0]
    weight, bias, stride = packed.dequantize(), layer.bias.detach(), layer.stride
    whole = affine(
        "packed conv2d",
        lambda x: F.conv2d(x, weight.to(x.dtype), None, stride),
        lambda x: F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), stride),
        tuple(x.shape[1:]),
        lambda x: bias.to(x.dtype).reshape(-1, 1, 1),
    )

    def call(x: Any) -> Any:
        narrow = isinstance(x, Interval) or x.dtype == torch.float32
        return packed(x) if narrow else whole.call(x)

    return Operation(whole.name, call, lambda rng, x: packed(x), whole.exact)


def sums(p: Draw, x: Interval) -> Operation | None:
    if x.ndim == 0 or 0 in x.shape:
        return None
    dim, keep = p.rng.randrange(x.ndim), p.rng.random() < 0.3
    kind = p.rng.choice(["sum", "mean", "cumsum"])
    if kind == "cumsum":
        return Operation(kind, lambda x: x.cumsum(dim))
    divisor = x.shape[dim] if kind == "mean" else 1

    def reordered(rng: random.Random, x: Tensor) -> Tensor:
        total = summed(rng, x.movedim(dim, -1))
        total = total * (1 / divisor) if divisor > 1 and rng.random() < 0.5 else total / divisor
        return total.unsqueeze(dim) if keep else total

    def exact(points: Any, index: int) -> Any:
        moved = points.sum(axis=dim) if points.shape[dim] else points
        return mp(moved.reshape(-1)[index] if hasattr(moved, "reshape") else moved) / divisor

    return Operation(kind, lambda x: getattr(x, kind)(dim, keepdim=keep), reordered, exact)


def matrix_product(p: Draw, x: Interval) -> Operation | None:
    if x.ndim < 2 or 0 in x.shape:
        return None
    if p.rng.random() < 0.5:
        return Operation("matmul of a box with itself", lambda x: x @ x.mT)
    other = p.tensor(x.shape[-1], p.rng.choice([1, 3]))

    def exact(points: Any, index: int) -> Any:
        matrix = other(torch.zeros((), dtype=torch.float64))
        row, column = divmod(index, matrix.shape[1])
        source = points.reshape(-1, matrix.shape[0])[row]
        return sum(
            (mp(a) * b for a, b in zip(matrix[:, column].tolist(), source, strict=True)), mp(0)
        )

    return Operation(
        "matmul", lambda x: x @ other(x), lambda rng, x: products(rng, x, other(x).mT, None), exact
    )


# -- arithmetic ------------------------------------------------------------------------------

ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "maximum": max,
    "minimum": min,
}


def arithmetic(p: Draw, x: Interval) -> Operation | None:
    name = p.rng.choice([*ARITHMETIC])
    function, rule = getattr(torch, name), ARITHMETIC[name]
    last = x.shape[-1:] if x.ndim else ()
    other = p.tensor(
        *p.rng.choice([last, (), (1,) * x.ndim, tuple(x.shape)]), positive=name == "div"
    )
    swapped = p.rng.random() < 0.4

    def call(x: Any) -> Any:
        return function(other(x), x) if swapped else function(x, other(x))

    def exact(points: Any, index: int) -> Any:
        spread = other(torch.zeros((), dtype=torch.float64)).expand(points.shape).reshape(-1)
        pair = points.reshape(-1)[index], mp(float(spread[index]))
        return rule(*pair[::-1]) if swapped else rule(*pair)

    if name == "div" and swapped and bool(((x.lower <= 0) & (x.upper >= 0)).any()):
        return None
    return Operation(name, call, exact=exact)


def numbers(p: Draw, x: Interval) -> Operation | None:
    number = p.number()
    name = p.rng.choice(["add", "sub", "mul", "div", "rsub"])
    if name == "rsub":
        return Operation("number - x", lambda x: number - x)
    return Operation(f"{name} of a number", lambda x: getattr(torch, name)(x, number))


def with_itself(p: Draw, x: Interval) -> Operation | None:
    name = p.rng.choice(["sum", "product", "square", "difference", "halves"])
    if name == "halves" and (x.ndim == 0 or x.shape[-1] < 2):
        return None
    half = x.shape[-1] // 2 if x.ndim else 0
    calls: dict[str, Callable[[Any], Any]] = {
        "sum": lambda x: x + 0.3 * x,
        "product": lambda x: x * x,
        "square": torch.square,
        "difference": lambda x: x - 0.7 * x,
        "halves": lambda x: x[..., :half] * x[..., -half:],
    }
    return Operation(f"{name} of a box with itself", calls[name])


# -- functions of one number -----------------------------------------------------------------

CURVES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any] | None, float]] = {
    "relu": (F.relu, lambda v: max(v, mp(0)), -math.inf),
    "relu6": (F.relu6, lambda v: min(max(v, mp(0)), mp(6)), -math.inf),
    "leaky_relu": (F.leaky_relu, None, -math.inf),
    "elu": (F.elu, lambda v: v if v > 0 else mpmath.expm1(v), -math.inf),
    "selu": (F.selu, None, -math.inf),
    "celu": (lambda x: F.celu(x, 0.75), None, -math.inf),
    "gelu": (F.gelu, lambda v: v * mpmath.erfc(-v / mpmath.sqrt(2)) / 2, -math.inf),
    "gelu tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda v: v * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (v + mp(0.044715) * v**3))) / 2,
        -math.inf,
    ),
    "silu": (F.silu, lambda v: v / (1 + mpmath.exp(-v)), -math.inf),
    "mish": (F.mish, lambda v: v * mpmath.tanh(mpmath.log1p(mpmath.exp(v))), -math.inf),
    "hardswish": (F.hardswish, lambda v: v * min(max(v + 3, mp(0)), mp(6)) / 6, -math.inf),
    "hardsigmoid": (F.hardsigmoid, lambda v: min(max(v + 3, mp(0)), mp(6)) / 6, -math.inf),
    "softplus": (F.softplus, None, -math.inf),
    "logsigmoid": (F.logsigmoid, lambda v: -mpmath.log1p(mpmath.exp(-v)), -math.inf),
    "sigmoid": (torch.sigmoid, lambda v: 1 / (1 + mpmath.exp(-v)), -math.inf),
    "tanh": (torch.tanh, mpmath.tanh, -math.inf),
    "softsign": (F.softsign, lambda v: v / (1 + abs(v)), -math.inf),
    "hardtanh": (F.hardtanh, lambda v: min(max(v, mp(-1)), mp(1)), -math.inf),
    "exp": (torch.exp, mpmath.exp, -math.inf),
    "expm1": (torch.expm1, mpmath.expm1, -math.inf),
    "erf": (torch.erf, mpmath.erf, -math.inf),
    "atan": (torch.atan, mpmath.atan, -math.inf),
    "log": (torch.log, mpmath.log, 1e-45),
    "log2": (torch.log2, lambda v: mpmath.log(v, 2), 1e-45),
    "log10": (torch.log10, mpmath.log10, 1e-45),
    "log1p": (torch.log1p, mpmath.log1p, -0.999),
    "sqrt": (torch.sqrt, mpmath.sqrt, 0.0),
    "rsqrt": (torch.rsqrt, lambda v: 1 / mpmath.sqrt(v), 1e-45),
    "reciprocal": (torch.reciprocal, lambda v: 1 / v, 1e-45),
    "abs": (torch.abs, abs, -math.inf),
    "neg": (torch.neg, lambda v: -v, -math.inf),
    "clamp": (lambda x: x.clamp(-0.1, 0.7), None, -math.inf),
    "pow 3": (lambda x: x**3, lambda v: v**3, -math.inf),
    "pow 4": (lambda x: x**4, lambda v: v**4, -math.inf),
    "pow -2": (lambda x: x**-2, lambda v: v**-2, 1e-45),
    "pow 1.5": (lambda x: x**1.5, lambda v: v ** mp(1.5), 0.0),
}


def curve(p: Draw, x: Interval) -> Operation | None:
    name = p.rng.choice([*CURVES])
    call, function, least = CURVES[name]
    if x.numel() and float(x.lower.amin()) < least:
        if p.rng.random() < 0.5:
            return None
        return Operation(name + " of abs + 1", lambda x: call(abs(x) + 1.0))
    return Operation(name, call, exact=None if function is None else reference(function))


def slopes(p: Draw, x: Interval) -> Operation | None:
    if x.ndim < 2 or x.shape[1] == 0:
        return None
    slope = p.tensor(x.shape[1])
    return Operation("prelu", lambda x: F.prelu(x, slope(x)))
