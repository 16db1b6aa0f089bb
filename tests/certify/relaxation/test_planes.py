"""Planes of operations of several numbers: never crossed, and exact where they can be."""

import math

import mpmath
import pytest
import torch
import torch.nn.functional as F

from pyrobust import Interval
from pyrobust.certify.relaxation.log_sums import LogSum, log_sum_of_others
from pyrobust.certify.relaxation.maxima import (
    Maximum,
    adaptive_windows,
    axis_windows,
    pool_windows,
)
from pyrobust.certify.relaxation.products import Product

KEEP = torch.ones(5, 5, dtype=torch.bool).tril()


def others(x, keep=None):
    """Each element's log-sum-exp of all others, by deleting it."""
    keep = torch.ones_like(x, dtype=torch.bool) if keep is None else keep.expand_as(x)
    off = torch.eye(x.shape[-1], dtype=torch.bool)
    pairs = x.unsqueeze(-2).masked_fill(off | ~keep.unsqueeze(-2), -torch.inf)
    found = pairs.logsumexp(-1)
    return torch.where(torch.isneginf(found), 0.0, found)


CASES = {
    "product": (Product(False), torch.mul, [(4, 3), (4, 3)]),
    "product with broadcast": (Product(False), torch.mul, [(4, 3), (1, 3)]),
    "matrix product": (Product(True), torch.matmul, [(2, 3, 4), (2, 4, 2)]),
    "matrix product with broadcast": (Product(True), torch.matmul, [(2, 3, 4), (1, 4, 2)]),
    "max over two axes": (
        Maximum(axis_windows(torch.Size((3, 4, 2)), [1, 2])),
        lambda x: x.amax((2, 3)).flatten(1),
        [(3, 4, 2)],
    ),
    "max_pool1d": (
        Maximum(pool_windows(torch.Size((2, 9)), 1, 3, 2, 1)),
        lambda x: F.max_pool1d(x, 3, 2, 1).flatten(1),
        [(2, 9)],
    ),
    "max_pool2d": (
        Maximum(pool_windows(torch.Size((2, 6, 7)), 2, (3, 2), (2, 3), (1, 0), (2, 1), True)),
        lambda x: F.max_pool2d(x, (3, 2), (2, 3), (1, 0), (2, 1), True).flatten(1),
        [(2, 6, 7)],
    ),
    "max_pool3d": (
        Maximum(pool_windows(torch.Size((1, 4, 4, 4)), 3, 2)),
        lambda x: F.max_pool3d(x, 2).flatten(1),
        [(1, 4, 4, 4)],
    ),
    "adaptive_max_pool2d": (
        Maximum(adaptive_windows(torch.Size((2, 5, 7)), 2, (3, None))),
        lambda x: F.adaptive_max_pool2d(x, (3, None)).flatten(1),
        [(2, 5, 7)],
    ),
    "log-sum-exp": (LogSum(-1, False), lambda x: x.logsumexp(-1, True), [(3, 5)]),
    "log-sum-exp of others": (LogSum(-1, True), others, [(3, 5)]),
    "log-sum-exp of kept others": (LogSum(-1, True, KEEP), lambda x: others(x, KEEP), [(5, 5)]),
}


def boxes(shapes, batch=64, spread=2.0):
    found = []
    for shape in shapes:
        centre = spread * torch.randn(batch, *shape, dtype=torch.float64)
        radius = 10 ** (4 * torch.rand(batch, *[1] * len(shape), dtype=torch.float64) - 3)
        radius = radius * torch.rand(batch, *shape, dtype=torch.float64)
        found.append((centre - radius, centre + radius))
    return found


def bounds_of(planes, weights, points):
    """Lower bounds of ``weights * value`` for points of the box, and the rounding slack."""
    pulled = planes.pull(weights, lambda v: v)
    value = pulled.value
    for part, point in zip(pulled.parts, points, strict=True):
        value = value + (part * point).flatten(2).sum(-1)
    return value, 1e-13 * pulled.reach


def inside(ends, share):
    return [torch.minimum(low + share(low) * (high - low), high) for low, high in ends]


@pytest.mark.parametrize("name", CASES)
def test_planes_are_never_crossed(name):
    relaxation, function, shapes = CASES[name]
    torch.manual_seed(0)
    for spread in (2.0, 30.0):
        ends = boxes(shapes, spread=spread)
        planes = relaxation.planes(ends, sound=True)
        value = function(*[low for low, _ in ends])
        weights = torch.randn(6, *value.shape, dtype=torch.float64)
        for trial in range(60):
            corner = trial % 3
            points = inside(
                ends, lambda v, c=corner: torch.rand_like(v).round(decimals=0 if c else 3)
            )
            bound, slack = bounds_of(planes, weights, points)
            exact = (weights * function(*points)).flatten(2).sum(-1)
            assert bool((bound <= exact + slack).all())


@pytest.mark.parametrize("name", CASES)
def test_points_have_exact_planes(name):
    relaxation, function, shapes = CASES[name]
    points = [low for low, _ in boxes(shapes)]
    planes = relaxation.planes([(p, p) for p in points], sound=True)
    value = function(*points)
    weights = torch.randn(2, *value.shape, dtype=torch.float64)
    bound, _ = bounds_of(planes, weights, points)
    torch.testing.assert_close(bound, (weights * value).flatten(2).sum(-1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_planes_of_a_part_of_the_batch(name):
    relaxation, function, shapes = CASES[name]
    ends = boxes(shapes, batch=5)
    planes = relaxation.planes(ends, sound=True)
    value = function(*[low for low, _ in ends])
    weights = torch.randn(3, *value.shape, dtype=torch.float64)
    whole = planes.pull(weights, lambda v: v)
    rows = torch.tensor([0, 2, 2, 4])
    some = planes.pull(weights[:, rows], lambda v: v[rows])
    for a, b in zip(
        [*some.parts, some.value, some.reach], [*whole.parts, whole.value, whole.reach], strict=True
    ):
        torch.testing.assert_close(a, b[:, rows])


@pytest.mark.parametrize("name", CASES)
def test_planes_are_differentiable(name):
    relaxation, function, shapes = CASES[name]
    ends = boxes(shapes, batch=1)
    shape = function(*[low for low, _ in ends]).shape
    weights = torch.randn(1, *shape, dtype=torch.float64)
    flat = [end.requires_grad_() for pair in ends for end in pair]

    def total(*moved):
        pairs = list(zip(moved[::2], moved[1::2], strict=True))
        pulled = relaxation.planes(pairs, sound=False).pull(weights, lambda v: v)
        # the bound over the box, which does not depend on where the tangents touch exactly
        value = pulled.value.sum()
        for part, (low, high) in zip(pulled.parts, pairs, strict=True):
            value = value + (part * (low + high) / 2 - part.abs() * (high - low) / 2).sum()
        return value

    gradients = torch.autograd.grad(total(*flat), flat)
    assert all(bool(torch.isfinite(g).all()) for g in gradients)
    assert any(bool((g != 0).any()) for g in gradients)


def test_a_product_of_signed_factors_is_exact_at_its_corners():
    """Positive factors: the planes alone give the interval of the product."""
    low = torch.tensor([[1.0, -3.0]], dtype=torch.float64)
    high = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    other = torch.tensor([[0.5, 2.0]], dtype=torch.float64), torch.tensor([[4.0, 5.0]]).double()
    planes = Product(False).planes([(low, high), other], sound=False)
    box = Interval(low, high) * Interval(*other)
    for sign, wanted in ((1.0, box.lower), (-1.0, -box.upper)):
        weights = sign * torch.eye(2, dtype=torch.float64).unsqueeze(1)
        pulled = planes.pull(weights, lambda v: v)
        bound = pulled.value
        for part, (a, b) in zip(pulled.parts, [(low, high), other], strict=True):
            bound = bound + (part.clamp(min=0) * a + part.clamp(max=0) * b).flatten(2).sum(-1)
        torch.testing.assert_close(bound[:, 0], wanted[0])


def test_a_maximum_that_is_settled_is_its_element():
    ends = torch.tensor([[0.0, 3.0, 1.0]]).double(), torch.tensor([[1.0, 4.0, 2.5]]).double()
    relaxation = Maximum(torch.tensor([[0, 1, 2]]))
    assert not bool(relaxation.undecided([ends])[0].any())
    planes = relaxation.planes([ends], sound=True)
    for sign in (1.0, -1.0):
        pulled = planes.pull(torch.full((1, 1, 1), sign).double(), lambda v: v)
        torch.testing.assert_close(pulled.parts[0][0, 0], torch.tensor([0.0, sign, 0.0]).double())
        assert float(pulled.value) == 0.0


def test_the_line_above_a_maximum_is_the_chord():
    """max(x_1 in [0, 4], x_2 in [-1, 2]) <= x_1 / 2 + 2."""
    ends = torch.tensor([[0.0, -1.0]]).double(), torch.tensor([[4.0, 2.0]]).double()
    planes = Maximum(torch.tensor([[0, 1]])).planes([ends], sound=False)
    pulled = planes.pull(torch.full((1, 1, 1), -1.0).double(), lambda v: v)
    torch.testing.assert_close(pulled.parts[0][0, 0], torch.tensor([-0.5, 0.0]).double())
    assert float(pulled.value) == -2.0


def test_windows_hold_what_the_pooling_reads():
    """Each window's elements in the order of their indices, against a search by perturbation."""
    shape = torch.Size((2, 5, 4))
    table = pool_windows(shape, 2, 3, 2, 1, 1, True)
    size = shape.numel()
    peaks = torch.eye(size).reshape(size, *shape)
    reads = F.max_pool2d(peaks, 3, 2, 1, 1, True).flatten(1)  # (element, window)
    for window, row in enumerate(table):
        assert set(row[row >= 0].tolist()) == set(reads[:, window].nonzero()[:, 0].tolist())


def test_log_sums_of_others_enclose_exact_values():
    torch.manual_seed(1)
    (ends,) = boxes([(6,)], batch=20, spread=40.0)
    box = log_sum_of_others(Interval(*ends), -1)
    with mpmath.workdps(50):
        for row in range(20):
            for i in range(6):
                for end, bound, below in (
                    (ends[0], box.lower, True),
                    (ends[1], box.upper, False),
                ):
                    terms = [mpmath.exp(mpmath.mpf(float(v))) for v in end[row]]
                    exact = mpmath.log(mpmath.fsum(terms[:i] + terms[i + 1 :]))
                    got = mpmath.mpf(float(bound[row, i]))
                    assert got <= exact if below else got >= exact
                    assert abs(got - exact) < 1e-11


def test_log_sums_without_others_are_zero():
    keep = torch.tensor([[True, False], [True, True]])
    x = torch.randn(1, 2, 2, dtype=torch.float64)
    box = log_sum_of_others(Interval(x, x), -1, keep)
    assert float(log_sum_of_others(x, -1, keep)[0, 0, 0]) == 0.0
    assert math.isclose(float(box.center[0, 1, 0]), float(x[0, 1, 1]), rel_tol=1e-12)
