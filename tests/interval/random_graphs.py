"""Random compositions of operations on a box, checked operation by operation.

A graph grows from one box. Points of that box pass it beside the box, and each value that a point
attains must lie in the box of its node: exactly for real numbers (a float64 evaluation, or exact
numbers where it is doubted), and as any evaluation in the dtype of the box for deployed modes.
Each operation starts from the point itself, so no error of a reference adds up.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrobust import Interval

from .random_layers import MAKERS
from .random_operations import Parameters
from .random_orders import Operation, numbers_of

SHAPES = [
    *((), (1,), (5,), (0, 4), (1, 1), (2, 6), (3, 1), (4, 9), (2, 3, 4), (1, 3, 0)),
    *((2, 2, 7), (1, 2, 4, 4), (2, 3, 5, 6), (2, 4, 1, 3), (1, 6, 3, 3), (1, 2, 3, 3, 2)),
]
SCALES = [1.0, 1.0, 1e-2, 1e2, 1e-6, 1e6, 1e-20, 1e-36, 1e-38, 1e-40, 1e12, 1e18, 1e30]
ROUNDINGS = ["real", "deployed", "deployed-tf32", "deployed-bfloat16"]
_MOST_ELEMENTS = 600


@dataclass
class Findings:
    """What graphs did: how many attained values were looked at, and which left their box."""

    attained: int = 0
    exact: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)


@contextmanager
def denormals(flushed: bool) -> Iterator[None]:
    """Torch's operations with denormals flushed, or kept."""
    torch.set_flush_denormal(flushed)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def drawn_box(rng: random.Random, dtype: torch.dtype, scale: float, rounding: str) -> Interval:
    """A box of any shape, layout and width; some elements are points, some zero."""
    shape = rng.choice(SHAPES)
    seeded = torch.Generator().manual_seed(rng.getrandbits(32))
    centre = torch.randn(shape, generator=seeded, dtype=torch.float64) * scale
    if rng.random() < 0.3:
        centre = torch.where(torch.rand(shape, generator=seeded) < 0.5, 0.0, centre)
    width = rng.choice([0.0, 1e-6, 1e-2, 1.0, 10.0]) * scale
    reach = width * torch.rand(shape, generator=seeded, dtype=torch.float64)
    lower, upper = (centre - reach).to(dtype), (centre + reach).to(dtype)
    layout = rng.choice(["plain", "plain", "channels_last", "transposed", "expanded"])
    if layout == "channels_last" and len(shape) == 4:
        lower, upper = (t.contiguous(memory_format=torch.channels_last) for t in (lower, upper))
    if layout == "transposed" and len(shape) > 1:
        lower, upper = lower.mT, upper.mT
    if layout == "expanded" and len(shape) > 1 and shape[0]:
        lower, upper = (t[:1].expand(3, *shape[1:]) for t in (lower, upper))
    return Interval(lower, upper, rounding=rounding)


class Graph:
    """One random graph with its points.

    Args:
        seed: of everything in it.
        findings: where results go.
        depth: at most so many operations one after another.
        points: how many points pass it.
    """

    def __init__(self, seed: int, findings: Findings, *, depth: int, points: int) -> None:
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        self.findings, self.depth, self.seed = findings, depth, seed
        rng = self.rng
        self.dtype = rng.choice([torch.float32, torch.float32, torch.float64])
        self.scale = rng.choice(SCALES)
        kinds = ROUNDINGS if self.dtype == torch.float32 else ROUNDINGS[:2]
        self.rounding = rng.choice(["real", *kinds])
        self.box = drawn_box(rng, self.dtype, self.scale, self.rounding)
        self.points = [self._point(self.box, i) for i in range(points)]
        self.path: list[str] = []

    @property
    def deployed(self) -> bool:
        """Whether evaluations in the dtype of the box are promised, too."""
        return self.rounding.startswith("deployed")

    def _point(self, box: Interval, kind: int) -> Tensor:
        low, high = box.lower, box.upper
        if kind < 2:
            return (low, high)[kind].clone()
        share = torch.rand(low.shape, dtype=low.dtype)
        share = share.round() if kind % 2 else share
        return torch.lerp(low, high, share).clamp(low, high)

    def run(self) -> None:
        """Grow the graph until nothing fits or a result overflows."""
        for _ in range(self.depth):
            operation = self._next()
            if operation is None or not self._advance(operation):
                return

    def _next(self) -> Operation | None:
        scale = self.scale if self.rng.random() < 0.3 else 1.0
        parameters = Parameters(self.rng, self.dtype, scale)
        for _ in range(20):
            found = self.rng.choice(MAKERS)(parameters, self.box)
            if found is not None:
                return found
        return None

    def _advance(self, operation: Operation) -> bool:
        self.path.append(operation.name)
        try:
            box = operation.call(self.box)
        except (OverflowError, ValueError) as refusal:
            if "Interval" not in str(refusal):
                raise
            self.findings.refused[type(refusal).__name__] += 1
            return False
        self.findings.operations[operation.name] += 1
        self._look_at_form(operation, box)
        steep = operation.name.startswith(("sqrt", "pow 1.5"))  # at zero
        if not steep and self.rng.random() < 0.2 and 1e-6 <= self.scale <= 1e6:
            self._look_at_gradients(operation)
        source, self.points = (
            self.points,
            [self._attained(operation, point, box) for point in self.points],
        )
        self._at_corner(operation, box, source)
        self.box = box
        return 0 < box.numel() <= _MOST_ELEMENTS or (box.numel() == 0 and len(self.path) < 3)

    def _look_at_form(self, operation: Operation, box: Interval) -> None:
        like = operation.call(self.points[0])
        if like.shape != box.shape or box.dtype != like.dtype or box.rounding != self.rounding:
            self._report(operation, f"form {box.shape} {box.dtype} {box.rounding} {like.shape}")
        if not bool((box.lower <= box.upper).all()):  # false for NaN
            self._report(operation, "ends out of order or NaN")

    def _look_at_gradients(self, operation: Operation) -> None:
        leaves = [end.detach().clone().requires_grad_() for end in (self.box.lower, self.box.upper)]
        result = operation.call(Interval(*leaves, rounding=self.rounding))
        if not result.requires_grad:
            return
        slopes = torch.autograd.grad(result.upper.sum() - 0.5 * result.lower.sum(), leaves)
        if not all(bool(slope.isfinite().all()) for slope in slopes):
            self._report(operation, "gradients that are not finite", *leaves, *slopes)

    def _attained(self, operation: Operation, point: Tensor, box: Interval) -> Tensor:
        """Check the image of ``point``; a point of ``box`` to go on from."""
        wide = operation.call(point.double())
        self._check_real(operation, point, wide, box)
        if not self.deployed:
            low, high = box.lower, box.upper
            return wide.to(self.dtype).clamp(low, high)
        flushed = self.rng.random() < 0.3
        with denormals(flushed):
            value = operation.call(point)
            other = self._other_order(operation, point)
        for found in (value, other):
            self.findings.attained += found.numel()
            # a flushing processor reads denormals as zero
            read = torch.where(found.abs() < torch.finfo(found.dtype).tiny, 0.0, found)
            if not bool(box.contains(read if flushed else found).all()):
                self._report(operation, "an evaluation in its dtype", point, found, box)
        return value.clamp(box.lower, box.upper)

    def _other_order(self, operation: Operation, point: Tensor) -> Tensor:
        if operation.reordered is None or point.numel() == 0:
            return operation.call(point)
        return operation.reordered(self.rng, point)

    def _check_real(self, operation: Operation, point: Tensor, wide: Tensor, box: Interval) -> None:
        self.findings.attained += wide.numel()
        outside = ~box.contains(wide)
        doubted = outside.reshape(-1).nonzero().flatten().tolist()
        if operation.exact is None or wide.numel() == 0:
            slack = 1e-13 * wide.abs() + 1e-13 * wide.abs().amax() if wide.numel() else 0.0
            low, high = box.lower.double(), box.upper.double()
            if not bool(((low <= wide + slack) & (wide - slack <= high)).all()):
                self._report(operation, "a float64 evaluation", point, wide, box)
            return
        numbers = numbers_of(point)
        chosen = [*doubted[:2], self.rng.randrange(wide.numel())]
        for index in chosen:
            value = operation.exact(numbers, index)
            low, high = (float(end.reshape(-1)[index]) for end in (box.lower, box.upper))
            self.findings.exact += 1
            if not low <= value <= high:
                self._report(
                    operation, f"the exact {value!r} at {index} of [{low!r}, {high!r}]", point
                )

    def _at_corner(self, operation: Operation, box: Interval, source: list[Tensor]) -> None:
        """The corner that a first-order adversary picks for one element of the result."""
        if box.numel() == 0 or self.box.numel() == 0:
            return
        start = source[-1].double().requires_grad_()
        value = operation.call(start).reshape(-1)
        if not value.requires_grad:
            return
        index = self.rng.randrange(value.numel())
        (slope,) = torch.autograd.grad(value[index], start)
        for sign in (1, -1):
            corner = torch.where(slope * sign > 0, self.box.upper, self.box.lower)
            self._attained(operation, corner.detach(), box)

    def _report(self, operation: Operation, what: str, *tensors: object) -> None:
        described = [str(t) for t in tensors]
        self.findings.violations.append(
            f"seed {self.seed}, {self.rounding}, {self.dtype}, scale {self.scale}, "
            f"{' > '.join(self.path)}: {operation.name} leaves its box by {what}; "
            + "; ".join(described)
        )


def look_at(seeds: range, *, depth: int = 6, points: int = 6) -> Findings:
    """Run the graphs of ``seeds``."""
    findings = Findings()
    for seed in seeds:
        Graph(seed, findings, depth=depth, points=points).run()
    return findings
