"""The product with the transposed weight: every format, batch size and tail on every set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrobust import _native
from pyrobust.ops._matmul_operators import transpose_kernel
from pyrobust.quantize import BITS, QTensor

from ..packed_products import BATCHES, random_weight
from .test_weight_extras import CASES
from .test_weight_extras import SHAPES as EXTRA_SHAPES
from .test_weight_extras import random_weight as weight_with

# rows, cols, group_size: whole tiles of 64 x 128 and tails, one group a tile, several, odd ones,
# more than a register has lanes, more rows than are decoded at once
SHAPES = [(64, 128, 128), (150, 300, 64), (70, 645, 32), (33, 260, 100), (5, 131, 13)]
SHAPES += [(65, 400, 400), (3, 256, 5), (130, 640, 640), (90, 700, 192), (1, 1, 1)]
SHAPES += [(530, 130, 64), (70, 300, 40)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def transposed(grad, packed: QTensor, rows=None):
    form = (packed.shape[1], packed.bits, packed.group_size, packed.group_dim)
    parts = (packed.codes, packed.scale, packed.zero)
    return transpose_kernel(grad, *parts, *form, *(packed.extras or ()), rows=rows)


def assert_near(result, grad, packed: QTensor, rows=slice(None)):
    """The bound of ``csrc/matmul/matmul.h``, against float64."""
    weight, wide = packed.dequantize(torch.float64)[rows], grad.double()
    exact, products = wide @ weight, wide.abs() @ weight.abs()
    error = 65 * 2.0**-24 * products
    if grad.dtype != torch.float32:
        if packed.group_dim == 1 and _native.isa() in ("avx512", "amx"):
            error += rounding_to_16_bits(grad, packed, rows)
            error += len(weight) / 64 * 2.0**-24 * products
        error += (exact.abs() + error) * torch.finfo(grad.dtype).eps / 2 + 2.0**-25
    assert result.dtype == grad.dtype
    assert ((result.double() - exact).abs() <= error).all()


def rounding_to_16_bits(grad, packed: QTensor, rows):
    """Of the gradient with the scales in it, one step for 64 rows and each group."""
    weight = packed.dequantize(torch.float64)[rows].abs()
    scale = packed.scale.double()[rows]
    if packed.row_scale is not None:
        scale = scale * packed.row_scale.double()[rows, None]
    error = torch.zeros(len(grad), packed.shape[1], dtype=torch.float64)
    for first in range(0, len(weight), 64):
        block = slice(first, first + 64)
        largest = (grad.double().abs()[:, block, None] * scale[block]).amax(1)
        spread = scale[block].repeat_interleave(packed.group_size, 1)[:, : packed.shape[1]]
        integers = torch.where(spread > 0, weight[block] / spread, 0).sum(0)
        error += largest.repeat_interleave(packed.group_size, 1)[:, : packed.shape[1]] * integers
    return error / 32512


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_batch_size_and_no_row_depends_on_others(isa, bits, group_dim, shape, dtype):
    rows, cols, group_size = shape
    packed = random_weight(rows, cols, bits, group_size, group_dim)
    grad = torch.randn(max(BATCHES), rows).to(dtype)
    whole = transposed(grad, packed)
    assert_near(whole, grad, packed)
    for batch in BATCHES:
        assert torch.equal(transposed(grad[:batch], packed), whole[:batch])
        assert torch.equal(transposed(grad[200 - batch :], packed), whole[200 - batch :])


@pytest.mark.parametrize(("bits", "parts"), CASES)
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("shape", EXTRA_SHAPES[:3])
def test_extras(isa, bits, parts, group_dim, shape):
    packed = weight_with(*shape[:2], bits, shape[2], group_dim, parts)
    grad = torch.randn(9, packed.shape[0])
    for dtype in DTYPES[:2]:
        assert_near(transposed(grad.to(dtype), packed), grad.to(dtype), packed)


@pytest.mark.parametrize("bits", [1.58, 4])
@pytest.mark.parametrize("group_dim", [0, 1])
def test_some_rows_of_the_weight(isa, bits, group_dim):
    packed = random_weight(200, 300, bits, 32, group_dim)
    for rows in (slice(0, 70), slice(65, 200), slice(100, 101), slice(7, 7)):
        grad = torch.randn(5, rows.stop - rows.start)
        assert_near(transposed(grad, packed, rows), grad, packed, rows)


@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_threads_and_blocks_of_rows_do_not_change_bits(isa, group_dim, dtype):
    packed = random_weight(300, 1100, 4, 64, group_dim)
    grad, threads, results = torch.randn(600, 300).to(dtype), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(transposed(grad, packed))
    finally:
        torch.set_num_threads(threads)
    assert_near(results[0], grad, packed)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(transposed(grad[250:270], packed), results[0][250:270])


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize(("outputs", "cols"), [(0, 7), (7, 0), (0, 0)])
def test_nothing_to_sum_or_to_write(isa, rows, outputs, cols):
    packed = random_weight(outputs, cols, 4, 16)
    result = transposed(torch.randn(rows, outputs), packed)
    assert torch.equal(result, torch.zeros(rows, cols))


def test_strides_and_leading_axes(isa):
    packed, grad = random_weight(40, 150, 4, 16), torch.randn(4, 3, 80)
    whole = transposed(grad[..., ::2].contiguous(), packed)
    assert whole.shape == (4, 3, 150)
    assert torch.equal(transposed(grad[..., ::2], packed), whole)
    assert torch.equal(transposed(grad[..., ::2].transpose(0, 1), packed), whole.transpose(0, 1))
    assert torch.equal(transposed(grad[1, 2, ::2], packed), whole[1, 2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite_stay_alone(isa, dtype):
    packed, grad = random_weight(70, 200, 4, 32), torch.randn(4, 70).to(dtype)
    clean = transposed(grad, packed)
    grad[1, 3], grad[2, 65] = torch.nan, -torch.inf
    seen = transposed(grad, packed)
    assert torch.equal(seen[[0, 3]], clean[[0, 3]])
    assert seen[1].isnan().all()
    assert not seen[2].isfinite()[packed.dequantize()[65] != 0].any()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_gradients_of_every_size(isa, dtype):
    """Largest and smallest numbers, columns of outputs with gradients of other orders, zeros."""
    packed = random_weight(200, 384, 4, 128)
    grad = torch.randn(8, 200)
    spread = torch.logspace(-6, 3, 200)[torch.randperm(200)]
    for rows in (grad, grad * spread, grad * (torch.rand(8, 200) < 0.02), grad * 0, grad * 1e-7):
        rows = rows.to(dtype)
        assert_near(transposed(rows, packed), rows, packed)
    huge = (grad * 1e30).bfloat16()
    assert_near(transposed(huge, packed), huge, packed)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_drawn_shapes(data):
    bits, group_dim = data.draw(st.sampled_from(BITS)), data.draw(st.sampled_from([0, 1]))
    rows, cols = data.draw(st.integers(0, 150)), data.draw(st.integers(0, 300))
    group_size, batch = data.draw(st.integers(1, 320)), data.draw(st.integers(0, 20))
    dtype = data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    packed = random_weight(rows, cols, bits, group_size, group_dim, generator=generator)
    grad = torch.randn(batch, rows, generator=generator).to(dtype)
    assert_near(transposed(grad, packed), grad, packed)
