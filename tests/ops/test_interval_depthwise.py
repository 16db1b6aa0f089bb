"""interval_conv2d with one channel a group: planes that kernels make ends of without patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyrobust import _native
from pyrobust.ops.interval import interval_conv2d, interval_packed_conv2d
from pyrobust.quantize import round_to_nearest

from .test_interval_exact import KINDS, integers, ordinary, overflowing, wide_exponents

SOUND = ["real", "deployed"]
# (channels, height, width), outputs a channel, kernel, options
WINDOWS = [
    ((3, 7, 7), 1, (3, 3), {"padding": 1}),
    ((2, 14, 14), 1, (3, 3), {"padding": 1, "stride": 2}),
    ((2, 9, 37), 2, (3, 3), {"padding": (0, 1)}),
    ((2, 13, 20), 1, (5, 5), {"padding": 2}),
    ((1, 15, 33), 3, (5, 5), {"padding": 2, "stride": 2}),
    ((2, 8, 8), 1, (7, 7), {"padding": 3}),
    ((1, 12, 18), 1, (7, 7), {"padding": 3, "stride": (2, 1)}),
    ((2, 11, 70), 1, (3, 5), {"padding": (2, 4), "dilation": 2, "stride": (4, 3)}),
    ((2, 9, 19), 2, (3, 3), {"padding": 2, "dilation": 2}),
    ((4, 1, 75), 1, (1, 4), {"padding": (0, 3)}),
    ((2, 6, 5), 2, (2, 3), {"stride": (1, 2)}),
    ((3, 4, 3), 1, (4, 3), {}),
    ((2, 6, 14), 1, (3, 3), {}),
    ((1, 9, 9), 1, (5, 5), {"stride": (2, 1)}),
    ((1, 9, 9), 1, (8, 8), {"padding": 4}),  # more terms than a run has
    ((2, 5, 17), 1, (1, 1), {"padding": 1, "stride": 3}),
]


def problem(kind, window, batch=1):
    """Ends of images, weight and bias; the numbers are those of a linear layer's ``kind``."""
    (channels, height, width), times, kernel, options = window
    lower, upper, _, _ = kind(batch * channels, height * width, 1)
    weight, bias = kind(1, kernel[0] * kernel[1], channels * times)[2:]
    shape = (batch, channels, height, width)
    weight = weight.reshape(-1, 1, *kernel)
    return (lower.view(shape), upper.view(shape), weight, bias), {**options, "groups": channels}


def patches(images, kernel, options):
    """Exact patches, (pixels, channels, taps), of one image."""
    form = {name: value for name, value in options.items() if name != "groups"}
    taps = F.unfold(images.double(), kernel, **form)  # float64 holds float32
    return integers(taps.unflatten(1, (images.shape[1], -1))[0].permute(2, 0, 1))


def outside(ends, tensors, options):
    """How many attained corners of one image lie outside of the ends."""
    lower, upper, weight, bias = tensors
    channels, rows = options["groups"], weight.shape[0]
    low, high = (patches(end, weight.shape[2:], options) for end in (lower, upper))
    matrix, shift = integers(weight.flatten(1)), integers(bias) * 2**149
    count = 0
    for n in range(rows):
        channel = n // (rows // channels)
        positive, negative = np.maximum(matrix[n], 0), np.minimum(matrix[n], 0)
        least = low[:, channel].dot(positive) + high[:, channel].dot(negative) + shift[n]
        most = high[:, channel].dot(positive) + low[:, channel].dot(negative) + shift[n]
        for end, exact, sign in ((ends[0][0, n], least, 1), (ends[1][0, n], most, -1)):
            finite = torch.isfinite(end.flatten())
            assert not end.isnan().any()
            assert (end.flatten()[~finite] * sign < 0).all()
            scaled = integers(torch.where(finite, end.flatten(), 0.0)) * 2**149
            count += int(((sign * (scaled - exact) > 0) & finite.numpy()).sum())
    return count


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_no_attained_corner_lies_outside(isa, window, rounding):
    for kind in KINDS:
        tensors, options = problem(kind, window)
        ends = interval_conv2d(*tensors, **options, rounding=rounding, allow_infinite=True)
        assert outside(ends, tensors, options) == 0


@pytest.mark.parametrize("rounding", [*SOUND, "nearest"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_ends_are_tight(isa, window, rounding):
    tensors, options = problem(ordinary, window, batch=3)
    low, high = interval_conv2d(*tensors, **options, rounding=rounding)
    lower, upper, weight, bias = (tensor.double() for tensor in tensors)
    middle = F.conv2d((lower + upper) / 2, weight, bias, **options)
    reach = F.conv2d((upper - lower) / 2, weight.abs(), None, **options)
    for end, exact in ((low, middle - reach), (high, middle + reach)):
        torch.testing.assert_close(end.double(), exact, rtol=1e-4, atol=2e-4)


def by_isa(name, call):
    before = _native.isa()
    _native.set_isa(name)
    try:
        return call()
    finally:
        _native.set_isa(before)


@pytest.mark.parametrize("rounding", [*SOUND, "nearest"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_vector_sets_give_the_same_bits(window, rounding):
    tensors, options = problem(ordinary, window, batch=2)
    ends = [
        by_isa(name, lambda: interval_conv2d(*tensors, **options, rounding=rounding))
        for name in _native.supported_isas()
        if name != "portable"
    ]
    for other in ends[1:]:
        assert torch.equal(ends[0][0], other[0])
        assert torch.equal(ends[0][1], other[1])


@pytest.mark.parametrize("window", WINDOWS[:5], ids=str)
def test_threads_and_batches_give_the_same_bits(isa, window):
    tensors, options = problem(ordinary, window, batch=40)
    before, ends = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            ends.append(interval_conv2d(*tensors, **options))
    finally:
        torch.set_num_threads(before)
    one = interval_conv2d(tensors[0][7:8], tensors[1][7:8], *tensors[2:], **options)
    for whole, again, single in zip(*ends, one, strict=True):
        assert torch.equal(whole, again)
        assert torch.equal(whole[7:8], single)


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_an_infinite_end_stays_in_its_channel(isa, window, rounding):
    tensors, options = problem(ordinary, window, batch=2)
    upper, weight = tensors[1], tensors[2]
    upper[0, 0, 0, 2] = float("inf")
    ends = interval_conv2d(*tensors, **options, rounding=rounding, allow_infinite=True)
    hit = F.conv2d((upper == float("inf")).float(), torch.ones_like(weight), None, **options) > 0
    first = weight.shape[0] // options["groups"]
    for end in ends:
        assert not end.isnan().any()
        assert not torch.isfinite(end[hit]).any()
        assert torch.isfinite(end[1]).all()
        if isa != "portable":  # there it stays in its image
            assert torch.isfinite(end[0, first:]).all()


@pytest.mark.parametrize("kernel", [(3, 3), (2, 3)])
def test_places_between_rows_are_no_infinite_ends(isa, kernel):
    """Registers past the end of a row hold pixels of two rows, whose sums may overflow."""
    x = torch.zeros(1, 2, 6, 14)
    x[..., 0] = x[..., -1] = 2e38  # no patch holds both columns
    weight = torch.full((2, 1, *kernel), 1.0 / kernel[0])
    ends = torch.empty(2, 1, 2, 7 - kernel[0], 12)
    geometry = ([1, 1], [0, 0], [1, 1], 2, "real", False)
    assert _native.interval_conv2d(x, x, weight, None, *geometry, *ends, 1, None)
    assert bool(torch.isfinite(ends).all())


def test_a_rectified_box_is_that_of_its_positive_part(isa):
    for window in WINDOWS:
        (lower, upper, weight, bias), options = problem(ordinary, window)
        lower, upper = lower - 0.5, upper - 0.5
        given = interval_conv2d(lower, upper, weight, bias, **options, rectified=True)
        clipped = interval_conv2d(lower.relu(), upper.relu(), weight, bias, **options)
        assert torch.equal(given[0], clipped[0])
        assert torch.equal(given[1], clipped[1])


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("rounding", SOUND)
def test_packed_weights(isa, rounding, activations):
    for window in WINDOWS[:6]:
        for kind in (ordinary, wide_exponents, overflowing):
            (lower, upper, weight, bias), options = problem(kind, window)
            packed = round_to_nearest(weight.flatten(1), bits=4, group_size=8)
            form = {"in_channels": lower.shape[1], "kernel_size": weight.shape[2:], "bits": 4}
            form |= {"group_size": 8, "rounding": rounding, "activations": activations, **options}
            ends = interval_packed_conv2d(
                lower, upper, packed.codes, packed.scale, packed.zero, bias,
                allow_infinite=True, **form,
            )  # fmt: skip
            exact = packed.dequantize().reshape(weight.shape)
            assert outside(ends, (lower, upper, exact, bias), options) == 0
