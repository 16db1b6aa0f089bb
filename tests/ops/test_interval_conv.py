"""interval_conv2d: the linear image of unfolded patches, without unfolding them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyrobust.ops.interval import interval_conv2d

pytestmark = pytest.mark.emulated_tiles

WINDOWS = [  # images, weight, options
    ((2, 3, 8, 8), (5, 3, 3, 3), {"padding": 1}),
    (
        (1, 4, 9, 7),
        (6, 2, 3, 2),
        {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2},
    ),
    ((3, 2, 5, 5), (4, 2, 3, 3), {"stride": 2, "padding": 1}),
    ((2, 2, 6, 11), (2, 2, 3, 3), {"padding": "same"}),
    ((1, 6, 4, 4), (6, 1, 1, 1), {"groups": 6, "padding": "valid"}),
    ((9, 1, 28, 28), (23, 1, 5, 5), {"stride": 3}),
    # output rows of 16 pixels and more, which some sets read without copying patches
    ((3, 4, 5, 16), (7, 4, 3, 3), {"padding": 1}),
    ((2, 32, 6, 19), (13, 32, 3, 3), {"padding": (0, 1)}),
    (
        (2, 4, 9, 71),
        (10, 2, 3, 2),
        {"stride": (3, 2), "padding": (2, 1), "dilation": (1, 3), "groups": 2},
    ),
    ((1, 3, 4, 32), (1, 3, 1, 1), {}),
]


def problem(images, weight, eps=2 / 255, dtype=torch.float32):
    x = torch.rand(images, dtype=dtype)
    return x - eps, x + eps, torch.randn(weight, dtype=dtype), torch.randn(weight[0], dtype=dtype)


def reference(lower, upper, weight, bias, **options):
    centre, radius = (lower + upper) / 2, (upper - lower) / 2
    middle = F.conv2d(centre, weight, bias, **options)
    reach = F.conv2d(radius, weight.abs(), None, **options)
    return middle - reach, middle + reach


def test_small_images_whose_last_patches_end_where_neighbours_would(isa):
    """Lanes without a pixel, which repeat the last, and steps to the next row may cancel."""
    for height, width, rows, columns, padding in [
        (3, 3, 1, 2, 0), (1, 1, 1, 2, 1), (3, 4, 3, 2, 1), (4, 3, 5, 3, 1), (1, 2, 3, 2, 2),
        (4, 4, 3, 3, 1), (2, 5, 1, 3, 0), (5, 4, 2, 4, 2), (7, 2, 3, 2, 1),
    ]:  # fmt: skip
        x = torch.randn(2, 3, height, width)
        weight = torch.randn(4, 3, rows, columns)
        lower, upper = interval_conv2d(x, x, weight, padding=padding)
        exact = F.conv2d(x.double(), weight.double(), padding=padding)
        assert bool(((lower <= exact) & (exact <= upper)).all())


@pytest.mark.parametrize("rounding", ["real", "deployed"])
@pytest.mark.parametrize("window", WINDOWS)
def test_ends_enclose_float64_and_are_tight(isa, window, rounding):
    images, weight, options = window
    tensors = problem(images, weight)
    lower, upper = interval_conv2d(*tensors, rounding=rounding, **options)
    low, high = reference(*(t.double() for t in tensors), **options)
    assert lower.shape == low.shape
    assert (lower < low).all()
    assert (upper > high).all()
    assert ((upper.double() - lower) <= 1.01 * (high - low)).all()


@pytest.mark.parametrize("window", WINDOWS[:3])
def test_float64_fallback_encloses(window):
    images, weight, options = window
    tensors = problem(images, weight, dtype=torch.float64)
    lower, upper = interval_conv2d(*tensors, **options)
    low, high = reference(*tensors, **options)
    assert (lower < low).all()
    assert (upper > high).all()
    torch.testing.assert_close(lower, low, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", WINDOWS[:4])
def test_gradients_are_those_of_centre_and_radius(window):
    images, weight, options = window
    inputs = [t.requires_grad_() for t in problem(images, weight, eps=0.1, dtype=torch.float64)]
    ends = interval_conv2d(*inputs, **options)
    cotangents = [torch.randn_like(end) for end in ends]
    ours = torch.autograd.grad(ends, inputs, cotangents)
    theirs = torch.autograd.grad(reference(*inputs, **options), inputs, cotangents)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_operator_contract():
    tensors = tuple(t.requires_grad_() for t in problem((2, 4, 6, 5), (6, 2, 3, 3)))
    arguments = (*tensors, [1, 2], [1, 1, 0, 2], [2, 1], 2, "real")
    torch.library.opcheck(torch.ops.pyrobust.interval_conv2d, arguments)


def test_vmap_and_unbatched_images_agree_with_the_batch():
    lower, upper, weight, bias = problem((3, 2, 6, 6), (4, 2, 3, 3))
    whole = interval_conv2d(lower, upper, weight, bias)
    mapped = torch.vmap(interval_conv2d, in_dims=(0, 0, None, None))(
        lower.unsqueeze(1), upper.unsqueeze(1), weight, bias
    )
    single = interval_conv2d(lower[1], upper[1], weight, bias)
    assert torch.equal(mapped[0].squeeze(1), whole[0])
    assert torch.equal(single[1], whole[1][1])
    stacked = torch.vmap(interval_conv2d, in_dims=(None, None, 0, None))(
        lower, upper, torch.stack([weight, -weight]), bias
    )
    assert torch.equal(stacked[0][0], whole[0])


def test_whole_line_stays_in_its_image():
    lower, upper, weight, bias = problem((2, 2, 6, 6), (4, 2, 3, 3))
    upper[1, 0, 0, 0] = float("inf")
    low, high = interval_conv2d(lower, upper, weight, bias, allow_infinite=True)
    assert torch.isfinite(low[0]).all()
    assert torch.isfinite(high[0]).all()
    assert high[1, 0, 0, 0] == float("inf")
    assert not low.isnan().any()


def test_no_images_give_no_images(isa):
    lower, upper, weight, bias = problem((0, 2, 6, 6), (4, 2, 3, 3))
    assert interval_conv2d(lower, upper, weight, bias)[0].shape == (0, 4, 4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 0}, "stride must be at least 1"),
        ({"padding": "full"}, "padding must be one of valid, same"),
        ({"padding": "same", "stride": 2}, "padding 'same' needs stride 1"),
        ({"groups": 2}, "lower must have shape"),
        ({"dilation": 4}, "must fit into the padded size; got 6"),
        ({"bias": torch.zeros(3)}, r"bias must have shape \(4,\)"),
    ],
)
def test_bad_input_is_named(change, message):
    lower, upper, weight, bias = problem((1, 2, 6, 6), (4, 2, 3, 3))
    with pytest.raises(ValueError, match=message):
        interval_conv2d(lower, upper, weight, **{"bias": bias, **change})
