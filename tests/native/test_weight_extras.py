"""Remainder, codebook and two-level scales: every combination on every instruction set."""

from dataclasses import replace

import pytest
import torch

from pyrobust.ops import packed_linear
from pyrobust.quantize import BITS, QTensor, SparseRemainder

from ..packed_products import BATCHES, assert_within_bound, integer_sums, multiply

LEVELS = {1: 2, 1.58: 3, 2: 4, 3: 8, 4: 16, 8: 256}
SHAPES = [(9, 192, 64), (6, 77, 13), (35, 330, 128), (5, 96, 32), (4, 70, 70)]
PARTS = [
    "remainder",
    "codebook",
    "two_level",
    "remainder+codebook",
    "remainder+two_level",
    "codebook+two_level",
    "remainder+codebook+two_level",
]


def draw(high, shape):
    return torch.randint(0, high, shape, dtype=torch.uint8)


def random_weight(rows, cols, bits, group_size, group_dim, parts):
    codebook = draw(256, (LEVELS[bits],)) if "codebook" in parts else None
    if codebook is not None and "remainder" in parts:
        codebook[-1] = 128  # kept places need a code for 0
    grouped = (rows, -(-cols // group_size))
    if group_dim == 0:
        grouped = (-(-rows // group_size), cols)
    zero = None
    if codebook is None and bits not in (1, 1.58):
        zero = draw(LEVELS[bits], grouped)
    scale, row_scale = (torch.rand(grouped) + 0.1).half(), None
    if "two_level" in parts:
        reach = 255 if codebook is not None else max(1, LEVELS[bits] - 1)
        scale, row_scale = draw(min(255, 511 // reach) + 1, grouped), torch.rand(rows) / 8
    form = {"bits": bits, "group_size": group_size, "group_dim": group_dim}
    packed = QTensor.from_codes(
        draw(LEVELS[bits], (rows, cols)),
        scale,
        zero,
        row_scale=row_scale,
        codebook=codebook,
        **form,
    )
    if "remainder" not in parts:
        return packed
    largest = packed.dequantize().abs().max()
    values = largest * (1 + torch.rand(rows, cols)) * torch.randn(rows, cols).sign()
    return packed.with_remainder(values, torch.rand(rows, cols) < 0.04)


def spread(grouped, packed):
    rows, cols = packed.shape
    return grouped.repeat_interleave(packed.group_size, packed.group_dim)[:rows, :cols]


def plain_weight(packed):
    """The dense part and the remainder in float64, from the definition."""
    rows = packed.shape[0]
    integers = packed.unpack_codes().long()
    if packed.codebook is not None:
        integers = packed.codebook.long()[integers]
    elif packed.bits == 1:
        integers = 2 * integers
    zero = packed.symmetric_zero if packed.zero is None else spread(packed.zero, packed).long()
    dense = (integers - zero).double() * spread(packed.scale, packed).double()
    if packed.row_scale is not None:
        dense = dense * packed.row_scale.double()[:, None]
    sparse = torch.zeros_like(dense)
    if packed.remainder is not None:
        for n in range(rows):
            begin, end = packed.remainder.offsets[n], packed.remainder.offsets[n + 1]
            columns = packed.remainder.columns[begin:end].long()
            sparse[n, columns] = packed.remainder.values[begin:end].double()
    return dense, sparse


def int8_reference(x, packed):
    """The order of matmul.h: integer sums, then doubles, then the remainder's entries."""
    step = x.double().abs().amax(1, keepdim=True) / 127
    q = torch.where(step > 0, x.double() / step, 0.0).round()
    if packed.row_scale is not None:
        unscaled = replace(packed, remainder=None, row_scale=torch.ones_like(packed.row_scale))
        total = (q.long() @ plain_weight(unscaled)[0].long().t()).double()
        total = total * packed.row_scale.double()
    else:
        unscaled = replace(packed, remainder=None, scale=torch.ones_like(packed.scale))
        total = integer_sums(q.long(), plain_weight(unscaled)[0].long(), packed)
    if packed.remainder is not None:
        sparse, added = plain_weight(packed)[1], torch.zeros(len(x), packed.shape[0])
        added = added.double()
        for k in range(packed.shape[1]):  # ascending columns, one addition each
            added = added + q[:, k, None] * sparse[:, k]
        total = total + added
    return (total * step).float()


CASES = [(b, parts) for b in BITS for parts in PARTS if b != 8 or "codebook" not in parts]
CASES.remove((1, "remainder+two_level"))  # no code for 0, and 23 bits beside a remainder of 11


@pytest.mark.parametrize(("bits", "parts"), CASES)
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_and_exact_mode(isa, bits, parts, group_dim, shape):
    packed = random_weight(*shape[:2], bits, shape[2], group_dim, parts)
    dense, sparse = plain_weight(packed)
    weight = dense + sparse
    assert torch.equal(packed.dequantize(torch.float64), weight)  # without rounding
    bias = torch.randn(shape[0])
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(max(BATCHES), shape[1]).to(dtype)
        whole = multiply(x, packed, bias)
        assert_within_bound(whole, x, packed, bias)
        for batch in BATCHES:
            assert torch.equal(multiply(x[:batch], packed, bias), whole[:batch])


@pytest.mark.parametrize(("bits", "parts"), CASES)
@pytest.mark.parametrize("group_dim", [0, 1])
def test_decoding_and_adding_across_spans(isa, bits, parts, group_dim):
    for cols in (1280, 1281, 2944):  # columns are decoded 1280 at a time
        packed = random_weight(3, cols, bits, 100, group_dim, parts)
        weight, target = sum(plain_weight(packed)).float(), torch.randn(3, cols)
        assert torch.equal(packed.dequantize(), weight)
        expected = target + torch.tensor(0.37) * weight
        assert torch.equal(packed.add_to_(target.clone(), 0.37), expected)


@pytest.mark.parametrize(("bits", "parts"), CASES)
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_mode_equals_the_stated_order(isa, bits, parts, group_dim, shape):
    packed = random_weight(*shape[:2], bits, shape[2], group_dim, parts)
    x = torch.randn(max(BATCHES), shape[1])
    expected = int8_reference(x, packed)
    for batch in BATCHES:
        assert torch.equal(multiply(x[:batch], packed, activations="int8"), expected[:batch])


def test_threads_change_no_bit_of_a_remainder(isa):
    packed = random_weight(515, 4096, 4, 128, 1, "remainder+two_level")
    x, before, results = torch.randn(3, 4096), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [multiply(x, packed), multiply(x, packed, activations="int8")]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(results[:-2], results[2:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_remainder_types_and_an_empty_one(isa, dtype):
    packed = random_weight(5, 40, 4, 8, 1, "two_level")
    mask = torch.rand(5, 40) < 0.2
    mask[2] = False  # an empty row
    kept = packed.with_remainder(10 * torch.randn(5, 40), mask, dtype=dtype)
    x = torch.randn(2, 40)
    expected = x.double() @ kept.dequantize(torch.float64).t()
    torch.testing.assert_close(multiply(x, kept).double(), expected, rtol=1e-5, atol=1e-4)
    none = packed.with_remainder(torch.zeros(5, 40), torch.zeros(5, 40, dtype=torch.bool))
    assert torch.equal(multiply(x, none), multiply(x, packed))


def test_damaged_remainders_do_not_fault(isa):
    packed = random_weight(6, 50, 4, 50, 1, "remainder")
    x = torch.randn(20, 50)
    for columns, offsets in (
        (torch.full_like(packed.remainder.columns, 2**31 - 1), packed.remainder.offsets),
        (torch.full_like(packed.remainder.columns, -5), packed.remainder.offsets),
        (packed.remainder.columns, packed.remainder.offsets + 2**40),
        (packed.remainder.columns, packed.remainder.offsets - 2**40),
    ):
        extras = packed.extras._replace(columns=columns, offsets=offsets)
        for activations in (None, "int8"):
            multiply_with = {"in_features": 50, "bits": 4, "group_size": 50}
            packed_linear(
                x, packed.codes, packed.scale, packed.zero,
                activations=activations, extras=extras, **multiply_with,
            )  # fmt: skip


def test_nan_reaches_the_sums_of_a_remainder(isa):
    packed = random_weight(4, 32, 4, 32, 1, "remainder")
    x = torch.randn(3, 32)
    x[1, 5] = torch.nan
    for activations in (None, "int8"):
        y = multiply(x, packed, activations=activations)
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"row_scale": torch.ones(3)}, ValueError, r"row_scale must have shape \(4\)"),
        ({"row_scale": torch.ones(4).half()}, TypeError, "row_scale must have dtype torch.float32"),
        ({"codebook": torch.zeros(8, dtype=torch.uint8)}, ValueError, r"codebook must have shape"),
        ({"offsets": torch.zeros(5, dtype=torch.int64)}, ValueError, "must be given together"),
    ],
)
def test_bad_parts_are_named(change, error, message):
    packed = random_weight(4, 32, 4, 32, 1, "codebook")
    extras = packed.extras._replace(**change)
    scale = packed.scale if "row_scale" not in change else packed.scale.to(torch.uint8)
    options = {"in_features": 32, "bits": 4, "group_size": 32, "extras": extras}
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, pytest.raises(error, match=message):
            packed_linear(torch.zeros(2, 32), packed.codes, scale, packed.zero, **options)


def test_remainder_from_dense_round_trips():
    matrix = torch.randn(6, 9)
    mask = matrix > 0.5
    remainder = SparseRemainder.from_dense(matrix, mask, dtype=torch.float32)
    assert torch.equal(remainder.dense((6, 9)), torch.where(mask, matrix, 0.0))
