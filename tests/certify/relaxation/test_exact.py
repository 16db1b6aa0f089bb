"""Bounds against exact arithmetic: no allowance for rounding anywhere.

Every operation that keeps rationals rational is evaluated in fractions at all corners of the box
and at floats inside; the others in 60 digits.
"""

import itertools
import sys
from fractions import Fraction
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyrobust import Interval
from pyrobust.certify import bound

sys.path.insert(0, str(Path(__file__).parent))
from exact_evaluation import Exact, as_numbers

METHODS = ["ibp", "crown-ibp", "crown", "alpha-crown"]


class Between(nn.Module):
    """A linear layer, a function with modules of its own, a linear layer."""

    def __init__(self, sizes, function, head, *modules):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, n) for n in sizes)
        self.own = nn.ModuleList(modules)
        self.function, self.head = function, nn.Linear(head, 2)

    def forward(self, x):
        values = [layer(x) for layer in self.layers]
        return self.head(self.function(*values, *self.own).flatten(1))


def image(x):
    return x.unflatten(1, (1, 4, 4))


def norm(channels):
    """Batch norm whose variances plus epsilon are squares of binary numbers."""
    layer = nn.BatchNorm2d(channels, eps=0.25)
    layer.running_mean.normal_()
    layer.running_var.copy_(torch.tensor([0.0, 2.0, 6.0, 12.0])[:channels])
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def residual(x, first, scale, act, second):
    y = act(scale(first(image(x))))
    return second(y) + y * 0.5 - image(x)


def rectangles(x, y):
    return torch.matmul(x.unflatten(1, (2, 3)), y.unflatten(1, (3, 2)))


RATIONAL = {
    "leaky relu": lambda: Between([5], lambda x, f: f(x), 5, nn.LeakyReLU(0.1)),
    "hardtanh": lambda: Between([5], lambda x, f: f(x), 5, nn.Hardtanh(-0.3, 0.7)),
    "abs": lambda: Between([5], lambda x: torch.abs(x) - torch.square(x), 5),
    "convolution": lambda: Between(
        [16], lambda x, c, f: f(c(image(x))), 8, nn.Conv2d(1, 2, 3, 2, 1), nn.ReLU()
    ),
    "average pool": lambda: Between(
        [16], lambda x, f, p: p(f(image(x))), 4, nn.LeakyReLU(), nn.AvgPool2d(2)
    ),
    "max pool": lambda: Between(
        [16], lambda x, c, p: p(c(image(x))), 8, nn.Conv2d(1, 2, 3, 1, 1), nn.MaxPool2d(2)
    ),
    "max pool with padding": lambda: Between(
        [16], lambda x, p: p(image(x)), 4, nn.MaxPool2d(3, 2, 1)
    ),
    "residual": lambda: Between(
        [16], residual, 32, nn.Conv2d(1, 2, 3, 1, 1), norm(2), nn.ReLU(),
        nn.Conv2d(2, 2, 3, 1, 1, groups=2),
    ),
    "maxima": lambda: Between(
        [6, 6],
        lambda x, y: torch.cat([torch.maximum(x, y), x.unflatten(1, (2, 3)).amax(1)], 1),
        9,
    ),
    "minimum": lambda: Between([4, 4], lambda x, y: torch.minimum(x, F.relu(y)), 4),
    "product": lambda: Between([5, 5], lambda x, y: F.relu(x) * y, 5),
    "matrix product": lambda: Between([6, 6], rectangles, 4),
    "quotient": lambda: Between([5, 5], lambda x, y: x / (F.relu(y) + 0.5), 5),
}  # fmt: skip
IRRATIONAL = {
    "softmax": lambda: Between([5], lambda x, f: f(x), 5, nn.Softmax(-1)),
    "log softmax": lambda: Between([5], lambda x, f: f(x), 5, nn.LogSoftmax(-1)),
    "attention": lambda: Between(
        [6, 6, 6],
        lambda *qkv: F.scaled_dot_product_attention(*(t.unflatten(1, (2, 3)) for t in qkv)),
        6,
    ),
    "layer norm": lambda: Between([5], lambda x, f: f(x), 5, nn.LayerNorm(5)),
    "sigmoid gate": lambda: Between([5, 5], lambda x, y: x * torch.sigmoid(y), 5),
    "quotient of exponentials": lambda: Between([5, 5], lambda x, y: x / (torch.exp(y) + 0.5), 5),
    "gelu": lambda: Between([5], lambda x, f, g: f(x) * g(x), 5, nn.GELU(), nn.Tanh()),
}


def points_of(box, generator):
    """Corners, and floats inside."""
    low, high = box.lower[0], box.upper[0]
    corners = [
        torch.tensor(c, dtype=low.dtype)
        for c in itertools.product(*torch.stack([low, high], 1).tolist())
    ]
    inside = [
        torch.minimum(
            low + torch.rand(3, generator=generator, dtype=low.dtype) * (high - low), high
        )
        for _ in range(6)
    ]
    return corners + inside


def check(model, box, number, slack):
    generator = torch.Generator().manual_seed(0)
    exact = Exact(model, number)
    values = [exact.run(as_numbers(point, number)) for point in points_of(box, generator)]
    least, most = np.stack(values).min(0), np.stack(values).max(0)
    for method in METHODS:
        bounds = bound(model, box, method=method, iterations=2)
        for k in range(2):
            assert number(float(bounds.lower[0, k].detach())) <= least[k] + slack, method
            assert number(float(bounds.upper[0, k].detach())) >= most[k] - slack, method


# In float64 no rounding of the result to float32 hides what the relaxation loses.
WIDTHS = [(torch.float64, 0.0), (torch.float64, 1e-12), (torch.float64, 0.2), (torch.float32, 1e-4)]


@pytest.mark.parametrize(("dtype", "eps"), WIDTHS)
@pytest.mark.parametrize("scale", [1.0, 2.0**12])
@pytest.mark.parametrize("name", RATIONAL)
@torch.no_grad()
def test_in_rationals(name, scale, dtype, eps):
    """Also with weights that make large values cancel."""
    torch.manual_seed(3)
    model = RATIONAL[name]().eval().to(dtype)
    for layer in model.layers:
        layer.weight.mul_(scale)
        layer.bias.mul_(scale)
    check(model, Interval.ball(torch.randn(1, 3, dtype=dtype), eps), Fraction, 0)


@pytest.mark.parametrize(("dtype", "eps"), WIDTHS)
@pytest.mark.parametrize("name", IRRATIONAL)
@torch.no_grad()
def test_in_sixty_digits(name, dtype, eps):
    torch.manual_seed(3)
    model = IRRATIONAL[name]().eval().to(dtype)
    box = Interval.ball(torch.randn(1, 3, dtype=dtype), eps)
    with mpmath.workdps(60):
        check(model, box, mpmath.mpf, mpmath.mpf(10) ** -45)


@torch.no_grad()
def test_the_evaluation_itself_follows_torch():
    for name, make in {**RATIONAL, **IRRATIONAL}.items():
        torch.manual_seed(1)
        model, x = make().eval().double(), torch.randn(3, dtype=torch.float64)
        number = Fraction if name in RATIONAL else mpmath.mpf
        exact = Exact(model, number).run(as_numbers(x, number))
        torch.testing.assert_close(
            torch.tensor([float(v) for v in exact], dtype=torch.float64), model(x[None])[0]
        )


@pytest.mark.parametrize("seed", range(4))
def test_products_that_cancel_pay_for_their_rounding(seed):
    # the last row is orthogonal to the columns before it, so that what is left of the pulled
    # coefficients is rounding, far above what their own size would pay for
    torch.manual_seed(seed)
    first, last = nn.Linear(8, 64, bias=False).double(), nn.Linear(64, 1, bias=False).double()
    first.weight.data *= 1e6
    last.weight.data = torch.linalg.svd(first.weight.data)[0][:, -1:].mT.contiguous()
    model = nn.Sequential(first, last).eval().requires_grad_(False)
    x = torch.rand(1, 8, dtype=torch.float64)
    hidden = [
        sum(Fraction(w) * Fraction(v) for w, v in zip(row, x[0].tolist(), strict=True))
        for row in first.weight.tolist()
    ]
    weights = last.weight[0].tolist()
    exact = sum(Fraction(w) * h for w, h in zip(weights, hidden, strict=True))
    for method in ("crown-ibp", "crown"):
        found = bound(model, Interval.ball(x, 0.0), method=method)
        assert Fraction(found.lower.item()) <= exact <= Fraction(found.upper.item())
