"""Interval images under packed layers: the images of the decoded weights."""

from __future__ import annotations

import pytest
import torch

from pyrobust.ops.interval import (
    interval_conv2d,
    interval_linear,
    interval_packed_conv2d,
    interval_packed_linear,
)
from pyrobust.ops.matmul import dequantize_codes, packed_linear
from pyrobust.ops.packed_weight import WeightExtras
from pyrobust.quantize import round_to_nearest

pytestmark = pytest.mark.emulated_tiles

BITS = [1, 1.58, 2, 3, 4, 8]


def packed_problem(batch, terms, rows, *, bits, group_size=16, group_dim=1, eps=2 / 255):
    x = torch.rand(batch, terms) - 0.5
    weight = round_to_nearest(
        torch.randn(rows, terms), bits=bits, group_size=group_size, group_dim=group_dim
    )
    weight_format = {
        "bits": bits,
        "group_size": group_size,
        "group_dim": group_dim,
    }
    return (x - eps, x + eps), weight, torch.randn(rows), weight_format


def exact_ends(lower, upper, weight, bias):
    """Float64 centre and radius products: errors near 1e-16, far below the slack of a float."""
    centre, radius = (lower.double() + upper.double()) / 2, (upper.double() - lower.double()) / 2
    middle = centre @ weight.double().T + bias.double()
    reach = radius @ weight.double().abs().T
    return middle - reach, middle + reach


@pytest.mark.parametrize("rounding", ["real", "deployed"])
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("batch", [1, 3, 11])
def test_ends_enclose_the_decoded_weight(isa, batch, bits, group_dim, rounding):
    box, weight, bias, form = packed_problem(batch, 67, 23, bits=bits, group_dim=group_dim)
    lower, upper = interval_packed_linear(
        *box,
        weight.codes,
        weight.scale,
        weight.zero,
        bias,
        in_features=67,
        rounding=rounding,
        **form,
    )
    low, high = exact_ends(*box, weight.dequantize(), bias)
    assert (lower < low).all()
    assert (upper > high).all()
    assert ((upper.double() - lower) <= 1.01 * (high - low)).all()


@pytest.mark.parametrize("batch", [5, 9])
def test_real_mode_equals_the_float_kernel_on_the_decoded_weight(isa, batch):
    box, weight, bias, form = packed_problem(batch, 200, 90, bits=4)
    ours = interval_packed_linear(
        *box, weight.codes, weight.scale, weight.zero, bias, in_features=200, **form
    )
    for a, b in zip(ours, interval_linear(*box, weight.dequantize(), bias), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("part", ["codebook", "row_scale"])
def test_codebooks_and_row_scales_of_whole_blocks(isa, part):
    codes = torch.randint(0, 256, (9, 65), dtype=torch.uint8)  # 4 bits, 130 columns
    book = torch.randperm(256)[:16].to(torch.uint8) if part == "codebook" else None
    rows = torch.rand(9) + 0.5 if part == "row_scale" else None
    scale = torch.rand(9, 3).half().float()
    if rows is not None:
        # row scales of few bits keep every weight a float32
        rows, scale = rows.half().float(), torch.randint(1, 30, (9, 3), dtype=torch.uint8)
    extras = WeightExtras(row_scale=rows, codebook=book)
    form = {"in_features": 130, "bits": 4, "group_size": 64, "extras": extras}
    weight = dequantize_codes(codes, scale, None, **form)
    x, bias = torch.randn(2, 130), torch.randn(9)
    ends = interval_packed_linear(x - 0.1, x + 0.1, codes, scale, None, bias, **form)
    low, high = exact_ends(x - 0.1, x + 0.1, weight, bias)
    assert (ends[0] < low).all()
    assert (ends[1] > high).all()
    assert ((ends[1].double() - ends[0]) <= 1.01 * (high - low)).all()


@pytest.mark.parametrize("rounding", ["real", "deployed"])
@pytest.mark.parametrize("bits", BITS)
def test_int8_activations_lie_inside(isa, bits, rounding):
    (lower, upper), weight, bias, form = packed_problem(6, 40, 9, bits=bits, eps=0.1)
    tensors = (weight.codes, weight.scale, weight.zero, bias)
    options = {"in_features": 40, "activations": "int8", **form}
    low, high = interval_packed_linear(lower, upper, *tensors, rounding=rounding, **options)
    for _ in range(50):
        t = torch.rand_like(lower)
        for share in (t, t.round()):
            y = packed_linear(lower + share * (upper - lower), *tensors, **options)
            assert ((low <= y) & (y <= high)).all()


def test_float_activations_would_not_cover_int8():
    # A row with one large entry has a step so large that the small ones vanish.
    x = torch.full((1, 16), 0.3)
    x[0, 0] = 127.0
    weight = round_to_nearest(torch.ones(1, 16), bits=8, group_size=16)
    tensors = (weight.codes, weight.scale, weight.zero)
    options = {"in_features": 16, "bits": 8, "group_size": 16}
    y = packed_linear(x, *tensors, activations="int8", **options)
    assert not interval_packed_linear(x, x, *tensors, **options)[0] <= y
    low, high = interval_packed_linear(x, x, *tensors, activations="int8", **options)
    assert low <= y <= high


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_equals_the_float_kernel_on_the_decoded_weight(isa, bits, groups):
    x = torch.rand(2, 4, 7, 6)
    weight = round_to_nearest(torch.randn(6, 4 // groups * 9), bits=bits, group_size=9)
    window = {"stride": (1, 2), "padding": 1, "groups": groups}
    bias = torch.randn(6)
    ours = interval_packed_conv2d(
        x - 0.1, x + 0.1, weight.codes, weight.scale, weight.zero, bias,
        in_channels=4, kernel_size=3, bits=bits, group_size=9, **window,
    )  # fmt: skip
    dense = weight.dequantize().reshape(6, 4 // groups, 3, 3)
    for a, b in zip(ours, interval_conv2d(x - 0.1, x + 0.1, dense, bias, **window), strict=True):
        assert torch.equal(a, b)


def test_convolution_with_int8_activations_covers_each_patch(isa):
    x = torch.rand(2, 3, 6, 6) * torch.tensor([1.0, 100.0]).reshape(2, 1, 1, 1)
    weight = round_to_nearest(torch.randn(5, 27), bits=4, group_size=27)
    tensors = (weight.codes, weight.scale, weight.zero)
    form = {"bits": 4, "group_size": 27, "activations": "int8"}
    low, high = interval_packed_conv2d(
        x - 0.01, x + 0.01, *tensors, in_channels=3, kernel_size=3, padding=1, **form
    )
    for _ in range(20):
        point = x + 0.01 * (2 * torch.rand_like(x) - 1)
        patches = torch.nn.functional.unfold(point, 3, padding=1).transpose(1, 2)
        y = packed_linear(patches, *tensors, in_features=27, **form)
        y = y.transpose(1, 2).reshape(2, 5, 6, 6)
        assert ((low <= y) & (y <= high)).all()


def test_operator_contracts():
    (lower, upper), weight, bias, _ = packed_problem(3, 18, 6, bits=4, group_size=9)
    leaves = [t.requires_grad_() for t in (lower, upper)]
    tensors = (weight.codes, weight.scale, weight.zero, bias.requires_grad_())
    packed = (18, 4.0, 9, 1, None)
    torch.library.opcheck(
        torch.ops.pyrobust.interval_packed_linear, (*leaves, *tensors, *packed, "real")
    )
    images = [torch.rand(2, 2, 5, 5).requires_grad_() for _ in range(2)]
    window = ([3, 3], [1, 1], [1, 1, 0, 0], [1, 1], 1)
    torch.library.opcheck(
        torch.ops.pyrobust.interval_packed_conv2d, (*images, *tensors, *packed, *window, "deployed")
    )


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_gradients_equal_those_of_the_float_operator(layer):
    weight = round_to_nearest(torch.randn(6, 18), bits=4, group_size=9)
    dense, tensors = weight.dequantize(), (weight.codes, weight.scale, weight.zero)
    form = {"bits": 4, "group_size": 9}
    x = torch.rand(3, 18) if layer == "linear" else torch.rand(3, 2, 5, 5)
    inputs = [t.requires_grad_() for t in (x - 0.1, x + 0.1, torch.randn(6))]
    if layer == "linear":
        ours = interval_packed_linear(*inputs[:2], *tensors, inputs[2], in_features=18, **form)
        theirs = interval_linear(*inputs[:2], dense, inputs[2])
    else:
        ours = interval_packed_conv2d(
            *inputs[:2], *tensors, inputs[2], in_channels=2, kernel_size=3, **form
        )
        theirs = interval_conv2d(*inputs[:2], dense.reshape(6, 2, 3, 3), inputs[2])
    cotangents = [torch.randn_like(end) for end in ours]
    for a, b in zip(
        torch.autograd.grad(ours, inputs, cotangents),
        torch.autograd.grad(theirs, inputs, cotangents),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits must be one of"),
        ({"activations": "int4"}, "activations must be one of None, int8"),
        ({"group_dim": 2}, "group_dim must be one of 0, 1"),
        ({"in_features": 20}, "codes must have shape"),
        ({"group_size": 4}, "scale must have shape"),
    ],
)
def test_bad_input_is_named(change, message):
    box, weight, bias, form = packed_problem(2, 18, 6, bits=4, group_size=9)
    options = {"in_features": 18, **form, **change}
    with pytest.raises(ValueError, match=message):
        interval_packed_linear(*box, weight.codes, weight.scale, weight.zero, bias, **options)
