"""Activations of 16 bits in two 8-bit parts, which AVX-512 uses for groups of whole blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrobust.quantize import BITS, QTensor, round_to_codebook, round_to_two_level

from ..packed_products import (
    BATCHES,
    assert_within_bound,
    check_batch_sizes,
    multiply,
    random_weight,
)

# rows, cols, group_size: usual groups, tails of columns and rows, one group, a last group of one
SHAPES = [(70, 512, 128), (17, 200, 64), (39, 150, 150), (21, 129, 128), (40, 1300, 640)]
SHAPES += [(37, 200, 32), (21, 97, 32), (33, 1344, 96)]
SHAPES += [(37, 200, 48), (21, 97, 17), (33, 1344, 100)]  # groups that are filled up
SHAPES += [(9, 200, 64)]  # fewer rows than parts want
DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_batch_size(isa, bits, shape, dtype):
    packed = random_weight(*shape[:2], bits, shape[2], symmetric=shape[0] % 2 == 0)
    x, bias = torch.randn(max(BATCHES), shape[1]).to(dtype), torch.randn(shape[0])
    check_batch_sizes(x, packed, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_multiples_of_a_step_are_exact(isa, dtype, batch):
    """Integers up to 127 and steps of 1: no part of the product rounds."""
    packed = random_weight(20, 384, 4, 128)
    x = torch.randint(-127, 128, (batch, 384)).double()
    x[:, ::128] = 127.0
    exact = x @ packed.dequantize(torch.float64).t()
    assert torch.equal(multiply(x.to(dtype), packed), exact.to(dtype))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_each_group_has_its_own_step(isa, batch):
    """Columns that are 2^20 times larger must not cost the other groups their digits."""
    packed = random_weight(33, 512, 4, 128)
    x = torch.randn(batch, 512).bfloat16()
    x[:, 128:256] = 0.0
    x[:, 256:384] *= 2.0**20
    codes = packed.unpack_codes()
    codes[:, 256:384] = packed.zero[:, 2:3]  # they meet weights of zero
    packed = QTensor.from_codes(codes, packed.scale, packed.zero, bits=4, group_size=128)
    quiet = x.clone()
    quiet[:, 256:384] = 0.0
    assert torch.equal(multiply(x, packed), multiply(quiet, packed))
    assert_within_bound(multiply(quiet, packed), quiet, packed)


@pytest.mark.parametrize("magnitude", [2.0**-126, 2.0**-133, 2.0**120])
@pytest.mark.parametrize("batch", [1, 3])
def test_extreme_magnitudes(isa, magnitude, batch):
    packed = random_weight(17, 256, 2, 128)
    x = (torch.randn(batch, 256) * magnitude).bfloat16()
    weight = packed.dequantize(torch.float64)
    exact, size = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
    # Below 2^-126 the spacing of bfloat16 is 2^-133.
    allowed = 2.0**-8 * size + 2.0**-133
    assert ((multiply(x, packed).double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_what_is_not_finite_stays_in_its_row(isa, batch):
    packed = random_weight(17, 256, 4, 128)
    x = torch.randn(batch + 1, 256).bfloat16()
    x[0, 3] = torch.inf
    result = multiply(x, packed)
    assert not result[0].isfinite().any()
    assert result[1:].isfinite().all()
    x[0, 3] = torch.nan
    assert multiply(x, packed)[0].isnan().all()


@pytest.mark.parametrize("group_size", [128, 4096])
def test_largest_sums_do_not_overflow(isa, group_size):
    cols = 4096
    codes = torch.full((20, cols), 255, dtype=torch.uint8)
    zero = torch.zeros(20, cols // group_size, dtype=torch.uint8)
    scale = torch.ones(20, cols // group_size)
    packed = QTensor.from_codes(codes, scale, zero, bits=8, group_size=group_size)
    for batch in (1, 2, 6):
        x = torch.full((batch, cols), -1.0).bfloat16()
        expected = torch.full((batch, 20), -255.0 * cols).bfloat16()
        assert torch.equal(multiply(x, packed), expected)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_codebooks_and_two_level_scales(isa, batch):
    weight, x = torch.randn(19, 256), torch.randn(batch, 256).bfloat16()
    levels = torch.linspace(-1, 1, 16)
    for packed in (
        round_to_codebook(weight, levels=levels, bits=4, group_size=128),
        round_to_two_level(weight, bits=4, group_size=64),
    ):
        result = multiply(x, packed)
        assert_within_bound(result, x, packed)


def test_threads_change_no_bit(isa):
    packed, x = random_weight(515, 4096, 4, 128), torch.randn(5, 4096).bfloat16()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [torch.cat([multiply(x[:1], packed), multiply(x, packed)[1:]])]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_random_shapes_and_formats(data):
    rows, cols = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 700))
    bits, dtype = data.draw(st.sampled_from(BITS)), data.draw(st.sampled_from(DTYPES))
    group_size = data.draw(st.sampled_from([3, 8, 16, 50, 64, 100, 128, 192, 639, 1000]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    symmetric = data.draw(st.booleans())
    packed = random_weight(rows, cols, bits, group_size, symmetric=symmetric, generator=generator)
    x = torch.randn(data.draw(st.integers(1, 12)), cols, generator=generator).to(dtype)
    result = multiply(x, packed)
    assert_within_bound(result, x, packed)
    assert torch.equal(multiply(x[-1:], packed), result[-1:])
