"""Radii count the roundings of each term: no sum errs by more, and hardly by less."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyrobust.ops.interval import interval_conv2d, interval_linear, interval_packed_linear
from pyrobust.quantize import round_to_nearest

from .test_interval_exact import SOUND, violations

pytestmark = pytest.mark.emulated_tiles

UNIT = 2.0**-24


def one_large(terms, density=1.0):
    """Points ``(terms, terms)``: row k has a large term k among some of its half steps.

    Where the large one is summed, each later addition is a tie and loses a whole ``UNIT`` of it.
    """
    x = UNIT * (torch.rand(terms, terms) < density).float()
    x.fill_diagonal_(1.0)
    return x


def check_points(x, ends, weight, bias=None):
    """The exact products of the points ``x`` lie in the ends."""
    outside, checked = violations(ends, x, x, weight, bias)
    assert outside == 0
    assert checked == 2 * x.shape[0] * weight.shape[0]


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("density", [1.0, 0.3, 0.05])
@pytest.mark.parametrize("terms", [5, 33, 300, 600])
def test_a_large_term_at_any_place(isa, terms, density, rounding):
    x, weight = one_large(terms, density), torch.tensor([[1.0], [-1.0]]).expand(2, terms)
    weight = weight.contiguous()
    ends, some = interval_linear(x, x, weight, rounding=rounding), torch.randperm(terms)[:60]
    check_points(x[some], [end[some] for end in ends], weight)
    for row in range(0, terms, 1 + terms // 15):  # sums of few inputs have lanes
        some = x[row : row + 2]
        check_points(some, interval_linear(some, some, weight, rounding=rounding), weight)


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_a_large_term_under_any_packed_weight(isa, bits):
    """Weights of one size; boxes of no width are summed in floats, in the order of the codes."""
    terms = 600
    form = {"bits": bits, "group_size": 64}
    packed = round_to_nearest(torch.ones(2, terms) * torch.tensor([[1.0], [-1.0]]), **form)
    x = one_large(terms)
    for row in range(0, terms, 40):
        some = x[row : row + 2]
        ends = interval_packed_linear(
            some, some, packed.codes, packed.scale, packed.zero, None, in_features=terms, **form
        )
        check_points(some, ends, packed.dequantize())


def test_a_large_term_loses_as_much_as_is_allowed(isa):
    """The first of a run is next to all of it: the bound is attained but for a few roundings."""
    x, weight = one_large(32), torch.ones(1, 32)
    lower, upper = interval_linear(x, x, weight)
    lost = (x.double() @ weight.double().T - (lower.double() + upper.double()) / 2)[0] / UNIT
    allowed = (upper.double() - lower.double())[0] / (2 * UNIT)
    assert lost >= 29  # the ends are themselves rounded
    assert allowed <= 38


def test_zeros_and_late_terms_count_less(isa):
    terms = 784
    x = torch.zeros(9, terms)
    x[:, ::28] = 1.0
    few = interval_linear(x, x, torch.ones(1, terms))
    many = interval_linear(torch.ones(9, terms), torch.ones(9, terms), torch.ones(1, terms))
    shares = [((up.double() - low) / (up.double() + low)).max() / UNIT for low, up in (few, many)]
    assert shares[0] < 14  # 2 of 32 terms a run, 8 runs a chunk, 4 chunks
    assert shares[1] < 30  # half of a run on average


def patches_of(x, kernel, **options):
    """``(pixels, terms)`` of images, with W as a matrix."""
    columns = F.unfold(x, kernel.shape[2:], **options).transpose(1, 2)
    return columns.reshape(-1, columns.shape[2]), kernel.reshape(kernel.shape[0], -1)


def check_images(x, kernel, rounding, **options):
    ends = interval_conv2d(x, x, kernel, rounding=rounding, **options)
    pixels = [end.permute(0, 2, 3, 1).reshape(-1, kernel.shape[0]) for end in ends]
    patches, matrix = patches_of(x, kernel, **options)
    some = torch.randperm(len(patches))[:150]
    check_points(patches[some], [end[some] for end in pixels], matrix)


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("density", [1.0, 0.2])
def test_a_large_term_at_any_place_of_a_patch(isa, density, rounding):
    x = one_large(180, density).reshape(180, 20, 3, 3)  # one patch an image
    check_images(x, torch.ones(2, 20, 3, 3), rounding)


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("side", [1, 3])
def test_a_large_term_in_any_channel(isa, side, rounding):
    channels, kernel = 70, torch.ones(2, 70, side, side)
    x = torch.full((channels, channels, side, 18), UNIT)  # wide rows: no panels on AVX-512
    for channel in range(channels):
        x[channel, channel, channel % side, ::side] = 1.0
    check_images(x, kernel, rounding)


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_large_term_in_any_channel_by_filtering(isa, stride, rounding):
    channels, kernel = 36, torch.ones(16, 36, 3, 3)
    x = torch.full((channels, channels, 16, 16), UNIT)
    for channel in range(channels):
        x[channel, channel, ::3, ::3] = 1.0
    check_images(x, kernel, rounding, padding=1, stride=stride)


@pytest.mark.parametrize("kind", ["linear", "patches"])
@pytest.mark.parametrize("density", [0.02, 0.2, 1.0])
def test_deployed_ends_hold_the_orders_that_lose_most(isa, kind, density):
    """The terms that are other than zero, the large one first, last or between."""
    terms = 180
    x, weight = one_large(terms, density), torch.ones(1, terms)
    if kind == "linear":
        lower, upper = interval_linear(x, x, weight, rounding="deployed")
    else:
        images = x.reshape(terms, 20, 3, 3)
        lower, upper = (
            end.reshape(terms, 1)
            for end in interval_conv2d(images, images, torch.ones(1, 20, 3, 3), rounding="deployed")
        )
    for order in (x.argsort(1), x.argsort(1, descending=True), torch.arange(terms).expand_as(x)):
        total = torch.zeros(terms, 1)
        for k in range(terms):
            total += x.gather(1, order[:, k : k + 1])
        assert (lower <= total).all()
        assert (total <= upper).all()


def test_patches_whose_deployed_sums_may_overflow_are_not_bounded(isa):
    """Three terms of a long patch: their sum is finite, but not in every order."""
    x = torch.zeros(9, 16, 3, 3)
    x[4, 3, 0, 0], x[4, 7, 2, 1], x[4, 9, 1, 1] = 2.0**127, 2.0**127, -(2.0**127)
    options = {"rounding": "deployed", "allow_infinite": True}
    lower, upper = interval_conv2d(x, x, torch.ones(1, 16, 3, 3), **options)
    assert lower[4].item() == -torch.inf
    assert upper[4].item() == torch.inf
    lower, upper = interval_conv2d(x, x, torch.ones(1, 16, 3, 3))
    assert lower[4].item() <= 2.0**127 <= upper[4].item() < torch.inf
