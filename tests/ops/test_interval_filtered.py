"""3 x 3 convolutions by minimal filtering (AVX-512): sound and tight, as on the other sets."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from pyrobust.ops.interval import interval_conv2d, interval_packed_conv2d
from pyrobust.quantize import round_to_nearest

from .test_interval_exact import KINDS, violations

pytestmark = pytest.mark.emulated_tiles

SOUND = ["real", "deployed"]
SHAPES = [  # images, rows of W, padding; at least 64 output pixels, 16 channels and 16 rows
    ((1, 16, 32, 32), 16, 1),
    ((1, 17, 16, 16), 19, 1),
    ((1, 50, 8, 8), 16, 1),
    ((1, 20, 19, 22), 33, (2, 0)),
    ((1, 18, 5, 28), 97, (0, 3)),
    ((2, 16, 32, 32), 16, 1),
    ((9, 17, 16, 16), 19, 1),
    ((33, 16, 8, 8), 50, 1),
    ((8, 20, 19, 22), 33, (2, 0)),
    ((3, 18, 31, 28), 97, (0, 3)),
    ((5, 16, 20, 72), 16, "same"),
    # rows of whole parts of 16 outputs: along columns too, a band of some pairs of rows at a time
    ((4, 17, 22, 48), 50, 1),
    ((3, 35, 22, 32), 97, (2, 1)),
    ((2, 16, 10, 112), 20, 1),
    # and not so where rows are odd in number or long
    ((3, 18, 21, 48), 33, 1),
    ((1, 16, 18, 144), 17, 1),
]
STRIDED = [  # by two: output rows of a multiple of 8, at least 256 output pixels of all images
    ((1, 17, 33, 31), 19, 1),
    ((1, 18, 33, 48), 97, (0, 1)),
    ((5, 16, 17, 16), 50, (0, 1)),
    ((8, 16, 32, 32), 16, 1),
    ((33, 17, 17, 15), 19, 1),
    ((40, 16, 16, 17), 50, (1, 0)),
    ((6, 20, 33, 48), 33, (0, 0)),
    ((6, 18, 32, 46), 97, (2, 1)),
    ((3, 19, 44, 96), 35, 1),
    ((2, 16, 36, 223), 16, 1),
    ((3, 16, 33, 96), 35, 1),
]
CASES = [(1, *case) for case in SHAPES] + [(2, *case) for case in STRIDED]


def problem(shape, rows, weight=None):
    x = torch.rand(shape) - 0.3
    kernel = torch.randn(rows, shape[1], 3, 3) if weight is None else weight
    return x - 2 / 255, x + 2 / 255, kernel, torch.randn(rows)


def exact(lower, upper, weight, bias, **options):
    lower, upper, weight, bias = (t.double() for t in (lower, upper, weight, bias))
    middle = F.conv2d((lower + upper) / 2, weight, bias, **options)
    reach = F.conv2d((upper - lower) / 2, weight.abs(), None, **options)
    return middle - reach, middle + reach


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize(("stride", "shape", "rows", "padding"), CASES)
def test_ends_enclose_float64_and_are_tight(isa, stride, shape, rows, padding, rounding):
    tensors, options = problem(shape, rows), {"padding": padding, "stride": stride}
    ends = interval_conv2d(*tensors, **options, rounding=rounding, allow_infinite=True)
    low, high = exact(*tensors, **options)
    assert (ends[0] <= low).all()
    assert (ends[1] >= high).all()
    widening = (ends[1].double() - ends[0]).sum() / (high - low).sum()
    assert widening < (1.0008 if rounding == "real" else 1.002)


@pytest.mark.parametrize("rounding", [*SOUND, "nearest"])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_kernel_clips_for_a_relu_before_it(isa, stride, rounding):
    lower, upper, weight, bias = problem((33, 17, 16, 16), 19)
    options = {"padding": 1, "stride": stride, "rounding": rounding}
    fused = interval_conv2d(lower, upper, weight, bias, rectified=True, **options)
    plain = interval_conv2d(lower.relu(), upper.relu(), weight, bias, **options)
    assert torch.equal(fused[0], plain[0])
    assert torch.equal(fused[1], plain[1])


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("images", "threads"), [(33, 1), (1, 3)])
def test_packed_weights_are_the_floats_they_stand_for(isa, images, threads, stride, rounding):
    shape, rows = (images, 16, 32, 32), 24
    form = {"bits": 4, "group_size": 48}
    packed = round_to_nearest(torch.randn(rows, 144), **form)
    lower, upper, weight, bias = problem(shape, rows, packed.dequantize().reshape(rows, 16, 3, 3))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ends = interval_packed_conv2d(
            lower, upper, packed.codes, packed.scale, packed.zero, bias, in_channels=16,
            kernel_size=3, padding=1, stride=stride, rounding=rounding, **form,
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    low, high = exact(lower, upper, weight, bias, padding=1, stride=stride)
    assert (ends[0] <= low).all()
    assert (ends[1] >= high).all()
    assert ((ends[1].double() - ends[0]) / (high - low)).mean() < 1.004


def check_corners(lower, upper, kernel, bias, rounding, count=24, stride=1):
    """No attained corner of ``count`` pixels lies outside."""
    rows, channels = kernel.shape[:2]
    options = {"padding": 1, "stride": stride}
    ends = interval_conv2d(
        lower, upper, kernel, bias, **options, rounding=rounding, allow_infinite=True
    )
    some = torch.randperm(ends[0].numel() // rows)[:count]
    patches = [
        F.unfold(end, 3, **options).transpose(1, 2).reshape(-1, 9 * channels)[some]
        for end in (lower, upper)
    ]
    pixels = [end.permute(0, 2, 3, 1).reshape(-1, rows)[some] for end in ends]
    outside, checked = violations(pixels, *patches, kernel.reshape(rows, -1), bias)
    assert outside == 0
    assert checked == 2 * count * rows


def images_of(kind, channels, rows, batch=8, side=16):
    lower, upper, _, bias = kind(batch * side * side, channels, rows)
    kernel = kind(1, 9 * channels, rows)[2].reshape(rows, channels, 3, 3)
    lower, upper = (
        end.reshape(batch, side, side, channels).permute(0, 3, 1, 2).contiguous()
        for end in (lower, upper)
    )
    return lower, upper, kernel, bias


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_no_attained_corner_lies_outside(isa, kind, stride, rounding):
    images = images_of(kind, 16, 16, batch=8 * stride * stride)
    check_corners(*images, rounding, stride=stride)


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_no_attained_corner_of_one_image_lies_outside(isa, kind, stride, rounding):
    images = images_of(kind, 18, 35, batch=1, side=16 * stride)
    check_corners(*images, rounding, stride=stride)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_attained_corner_of_a_million_lies_outside(isa, kind):
    for seed in range(14):
        torch.manual_seed(seed)
        for rounding in SOUND:
            for stride in (1, 2):
                images = images_of(kind, 16 + seed, 20, batch=8 * stride * stride)
                check_corners(*images, rounding, count=120, stride=stride)


@pytest.mark.parametrize("rounding", SOUND)
@pytest.mark.parametrize("step", [2, 4, 3])
@pytest.mark.parametrize("column", [0, 1, 2])
@pytest.mark.parametrize("of", ["centre", "radius"])
@pytest.mark.parametrize("stride", [1, 2])
def test_what_cancels_between_the_products_of_a_tile(isa, stride, of, column, step, rounding):
    """Large numbers in a few columns meet weights of zero: outputs are small differences."""
    shape = (8 * stride * stride, 16, 16, 16)
    size = torch.full(shape, 2.0**-30)
    size[..., column::step] += torch.rand_like(size[..., column::step]) + 1
    kernel = torch.randn(16, 16, 3, 3)
    kernel[:8, :, :, 1] = 0.0
    kernel[:8, :, :, 0::2] *= 2.0**-20
    kernel[8:, :, :, 0::2] = 0.0
    centre, radius = (size, torch.zeros(shape)) if of == "centre" else (torch.zeros(shape), size)
    ends = (centre - radius, centre + radius)
    check_corners(*ends, kernel, torch.zeros(16), rounding, stride=stride)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_deployed_ends_hold_other_orders_of_summation(isa, scale):
    shape, rows = (8, 20, 16, 16), 16
    x, weight = torch.randn(shape) * scale, torch.randn(rows, 20, 3, 3)
    bias = torch.randn(rows) * scale
    ends = interval_conv2d(x, x, weight, bias, padding=1, rounding="deployed")
    patches = F.unfold(x, 3, padding=1)  # (B, terms, pixels)
    matrix = weight.reshape(rows, -1)
    for order in (torch.arange(180), torch.arange(179, -1, -1), torch.randperm(180)):
        total = bias.reshape(1, -1, 1).expand(8, rows, 256).clone()
        for k in order:
            total = total + matrix[:, k].reshape(1, -1, 1) * patches[:, k].unsqueeze(1)
        value = total.reshape(8, rows, 16, 16)
        assert (ends[0] <= value).all()
        assert (value <= ends[1]).all()


@pytest.mark.parametrize("stride", [1, 2])
def test_deployed_ends_count_the_terms_that_may_round(isa, stride):
    lower, upper, weight, bias = problem((8, 64, 32, 32), 16)
    lower[:, 4:], upper[:, 4:] = lower[:, 4:].abs().neg(), -0.0
    options = {"padding": 1, "stride": stride}
    ends = interval_conv2d(
        lower, upper, weight, bias, rectified=True, rounding="deployed", **options
    )
    low, high = exact(lower.relu(), upper.relu(), weight, bias, **options)
    assert (ends[0] <= low).all()
    assert (ends[1] >= high).all()
    widening = (ends[1].double() - ends[0]).sum() / (high - low).sum()
    if isa in ("avx512", "amx"):
        assert widening < 1.001  # 1.0018, by stride 2 1.0013, if all 576 counted


@pytest.mark.parametrize("stride", [1, 2])
def test_the_ends_do_not_depend_on_threads(isa, stride):
    tensors, found = problem((3, 16, 44, 96), 20), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(interval_conv2d(*tensors, padding=1, stride=stride))
    finally:
        torch.set_num_threads(1)
    for ends in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(ends, found[0], strict=True))


def test_numbers_near_the_largest_give_infinite_ends_and_no_nan(isa):
    x = torch.full((8, 16, 16, 16), 3e38) * torch.randn(8, 16, 16, 16).sign()
    ends = interval_conv2d(x, x, torch.randn(16, 16, 3, 3), None, padding=1, allow_infinite=True)
    assert not ends[0].isnan().any()
    assert not ends[1].isnan().any()
    assert (ends[0] == -torch.inf).any()
    with_nan = x.clone()
    with_nan[3, 2, 5, 7] = torch.nan
    low, high = interval_conv2d(
        with_nan, with_nan, torch.randn(16, 16, 3, 3), None, padding=1, allow_infinite=True
    )
    assert (low[3, :, 4:7, 6:9] == -torch.inf).all()
    assert (high[3, :, 4:7, 6:9] == torch.inf).all()


def filters(isa, shape, rows, stride=1):
    """Whether sums have the order of minimal filtering, which 15 rows of W are too few for."""
    lower, upper, weight, _ = problem(shape, rows)
    options = {"padding": 1, "stride": stride}
    ends = interval_conv2d(lower, upper, weight, **options)[0]
    fewer = [interval_conv2d(lower, upper, part, **options)[0] for part in weight.split(15)]
    torch.testing.assert_close(ends, torch.cat(fewer, 1), rtol=0, atol=1e-3)
    return not torch.equal(ends, torch.cat(fewer, 1))


def test_avx512_filters_where_there_are_enough_channels_and_pixels(isa):
    wide = isa in ("avx512", "amx")
    assert filters(isa, (1, 16, 32, 32), 16) == wide
    assert filters(isa, (1, 16, 8, 8), 16) == wide
    assert filters(isa, (1, 16, 32, 32), 16, stride=2) == wide
    assert filters(isa, (4, 16, 16, 16), 16, stride=2) == wide
    assert not filters(isa, (3, 16, 16, 16), 16, stride=2)
    assert not filters(isa, (2, 16, 6, 8), 16)
    assert not filters(isa, (1, 15, 32, 32), 16)


@pytest.mark.parametrize("rounding", [*SOUND, "nearest"])
@pytest.mark.parametrize(("stride", "shape", "rows"), [
    (1, (3, 17, 16, 16), 19), (1, (1, 64, 31, 32), 97), (1, (1, 34, 8, 8), 64),
    (1, (7, 34, 8, 8), 64),
    (2, (5, 18, 33, 48), 50), (2, (1, 33, 32, 32), 64),
])  # fmt: skip
def test_threads_and_other_images_change_no_bit(isa, stride, shape, rows, rounding):
    """Threads have whole images of their own and share those that are left over."""
    lower, upper, weight, bias = problem(shape, rows)
    options = {"padding": 1, "stride": stride, "rounding": rounding}
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(interval_conv2d(lower, upper, weight, bias, **options))
    finally:
        torch.set_num_threads(before)
    if isa in ("avx512", "amx"):  # panels of the others may hold patches of several images
        alone = [
            interval_conv2d(lower[i : i + 1], upper[i : i + 1], weight, bias, **options)
            for i in range(shape[0])
        ]
        results.append(tuple(torch.cat(ends) for ends in zip(*alone, strict=True)))
    for low, high in results[1:]:
        assert torch.equal(low, results[0][0])
        assert torch.equal(high, results[0][1])


# A makes outputs of products, G 24 times the filters of weights, B products of pixels; errors: 12 e
PAIRS = {
    "A": [[1, 1, 1, 0], [0, 1, -1, -1]],
    "G": [[24, 0, 0], [12, 12, 12], [12, -12, 12], [0, 0, 24]],
    "B": [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
    "errors": [[12, 12, 24, 0], [0, 12, 12, 0], [0, 12, 12, 0], [0, 24, 12, 12]],  # times 12
    "growth": 4,
    "stride": 1,
}
TWOS = {  # of stride 2
    "A": [[1, 1, 0, 1, 0], [0, 1, -1, 0, 1]],
    "G": [[24, 0, 0], [24, 0, 24], [0, 0, 24], [0, 24, 0], [0, 24, 0]],
    "B": [
        [1, 0, -1, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 0, -1], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0],
    ],
    "errors": [
        [12, 0, 24, 0, 0], [0, 12, 0, 0, 0], [0, 0, 12, 0, 0], [0, 0, 0, 12, 0], [0, 0, 24, 0, 12],
    ],
    "growth": 2,
    "stride": 2,
}  # fmt: skip
QUADS = {
    "A": [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    "G": [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]],
    "B": [
        [4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1],
    ],
    "errors": [
        [12, 18, 32, 6, 8, 0], [0, 20, 18, 8, 6, 0], [0, 24, 20, 12, 8, 0],
        [0, 32, 24, 20, 12, 0], [0, 48, 32, 36, 20, 0], [0, 128, 48, 128, 36, 12],
    ],
    "growth": 256,
    "stride": 1,
}  # fmt: skip


@pytest.mark.parametrize(("rows", "columns"), [(PAIRS, PAIRS), (QUADS, PAIRS), (TWOS, TWOS)])
def test_the_bounds_of_squares(rows, columns):
    """Sizes of what a product of products adds up, and e of e, are at most those of the proof."""
    sizes, errors = [], []
    for form in (rows, columns):
        a, g, b, e = (
            torch.tensor(form[name], dtype=torch.int64) for name in ("A", "G", "B", "errors")
        )
        sizes.append(torch.einsum("oi,ik,il->okl", a.abs(), g.abs(), b.abs()))
        errors.append(e)
    for o, k in itertools.product(range(len(sizes[0])), range(3)):
        for p, q in itertools.product(range(len(sizes[1])), range(3)):
            bound = torch.kron(
                errors[1][columns["stride"] * p + q], errors[0][rows["stride"] * o + k]
            )
            assert (torch.kron(sizes[1][p, q], sizes[0][o, k]) <= 4 * bound).all()
    both = torch.kron(errors[1], errors[0])
    assert (both @ both <= 144 * 1024 * both).all()


@pytest.mark.parametrize("form", [PAIRS, TWOS, QUADS], ids=["pairs", "twos", "quads"])
def test_the_identities_and_bounds_of_the_proof(form):
    a, g, b, errors = (
        torch.tensor(form[name], dtype=torch.int64) for name in ("A", "G", "B", "errors")
    )
    outputs, pixels = a.shape[0], b.shape[1]
    exact = torch.einsum("oi,ik,il->okl", a, g, b)  # of output o, weight k and pixel l, times 24
    sizes = torch.einsum("oi,ik,il->okl", a.abs(), g.abs(), b.abs())
    for o in range(outputs):
        for k in range(3):
            met = form["stride"] * o + k
            assert exact[o, k].tolist() == [24 * (pixel == met) for pixel in range(pixels)]
            assert (sizes[o, k] <= 2 * errors[met]).all()
    assert (errors @ errors <= 12 * form["growth"] * errors).all()
