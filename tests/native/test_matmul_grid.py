"""Every format, direction, activation mode, batch size and tail on every instruction set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrobust.quantize import BITS, QTensor

from ..packed_products import (
    BATCHES,
    LEVELS,
    assert_within_bound,
    integer_sums,
    multiply,
    random_weight,
)

# rows, cols, group_size: whole blocks, one group, odd groups, tails of rows, columns and groups
SHAPES = [(9, 256, 128), (6, 150, 150), (7, 200, 32), (5, 131, 13), (3, 77, 64), (70, 640, 64)]
SHAPES += [(17, 70, 128), (9, 100, 25)]  # one group and four beside each other


def int8_reference(x, packed: QTensor) -> torch.Tensor:
    """What matmul.h fixes: products of integers in int64, their sums in double in its order."""
    step = x.double().abs().amax(1, keepdim=True) / 127
    q = torch.where(step > 0, x.double() / step, 0.0).round().long()
    multiplier = 2 if packed.bits == 1 else 1
    zero = packed.zero
    if zero is None:
        constant = 1 if packed.bits == 1 else LEVELS[packed.bits] // 2
        zero = torch.full(packed.scale.shape, constant, dtype=torch.uint8)
    zero = zero.long().repeat_interleave(packed.group_size, packed.group_dim)
    rows, cols = packed.shape
    integers = multiplier * packed.unpack_codes().long() - zero[:rows, :cols]
    return (integer_sums(q, integers, packed) * step).float()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_activations_for_every_batch_size(isa, bits, group_dim, shape, dtype):
    rows, cols, group_size = shape
    for symmetric in (False, True):
        packed = random_weight(rows, cols, bits, group_size, group_dim, symmetric=symmetric)
        x, bias = torch.randn(max(BATCHES), cols).to(dtype), torch.randn(rows)
        whole = multiply(x, packed, bias)
        assert_within_bound(whole, x, packed, bias)
        for batch in BATCHES:  # a row's result does not depend on the batch around it, to the bit
            assert torch.equal(multiply(x[:batch], packed, bias), whole[:batch])
            assert torch.equal(multiply(x[200 - batch :], packed, bias), whole[200 - batch :])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_int8_mode_equals_integer_arithmetic(isa, bits, group_dim, shape, symmetric):
    rows, cols, group_size = shape
    packed = random_weight(rows, cols, bits, group_size, group_dim, symmetric=symmetric)
    x = torch.randn(max(BATCHES), cols)
    expected = int8_reference(x, packed)
    for batch in BATCHES:
        assert torch.equal(multiply(x[:batch], packed, activations="int8"), expected[:batch])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scales_of_many_groups(isa, bits, dtype):
    """More groups than a register has lanes, with scales of every type."""
    packed = random_weight(17, 4160, bits, 128, 1)
    scale = packed.scale.to(dtype)
    packed = QTensor.from_codes(
        packed.unpack_codes(), scale, packed.zero, bits=bits, group_size=128
    )
    x = torch.randn(17, 4160)
    expected = int8_reference(x, packed)
    for batch in (1, 2, 3, 4, 17):
        assert torch.equal(multiply(x[:batch], packed, activations="int8"), expected[:batch])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_dim", [0, 1])
def test_int8_mode_of_halves_equals_integer_arithmetic(isa, bits, group_dim):
    for rows, cols, group_size in SHAPES:
        packed = random_weight(rows, cols, bits, group_size, group_dim)
        x = torch.randn(17, cols).bfloat16()
        expected = int8_reference(x, packed).bfloat16()
        for batch in (1, 2, 17):
            assert torch.equal(multiply(x[:batch], packed, activations="int8"), expected[:batch])


@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("activations", [None, "int8"])
def test_threads_change_no_bit(isa, group_dim, activations):
    packed = random_weight(515, 8192, 4, 128, group_dim)
    x, before = torch.randn(3, 8192), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(multiply(x, packed, activations=activations))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_sums_of_one_sign_stay_within_the_bound(isa):
    """Equal terms make every float rounding err the same way: the hardest case for long sums."""
    for cols in (4096, 16384):
        codes = torch.full((4, cols), 15, dtype=torch.uint8)
        scale = torch.full((4, cols // 128), 0.1).half()
        packed = QTensor.from_codes(codes, scale, bits=4, group_size=128)
        x = torch.full((3, cols), 1 / 3)
        assert_within_bound(multiply(x, packed), x, packed)


def test_largest_integer_sums_do_not_overflow(isa):
    cols = 70_000  # more than one int32 run
    codes = torch.full((4, cols), 255, dtype=torch.uint8)
    zero = torch.zeros(4, 1, dtype=torch.uint8)
    packed = QTensor.from_codes(codes, torch.ones(4, 1), zero, bits=8, group_size=cols)
    x = torch.full((2, cols), -1.0)
    expected = -255.0 * cols
    assert torch.equal(multiply(x, packed, activations="int8"), torch.full((2, 4), expected))
    assert_within_bound(multiply(x, packed), x, packed)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_random_shapes_formats_and_modes(data):
    rows, cols = data.draw(st.integers(0, 70)), data.draw(st.integers(0, 400))
    bits, group_dim = data.draw(st.sampled_from(BITS)), data.draw(st.integers(0, 1))
    group_size = data.draw(st.sampled_from([1, 7, 8, 32, 64, 100, 128, 192, 1000]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    options = {"symmetric": data.draw(st.booleans()), "generator": generator}
    packed = random_weight(rows, cols, bits, group_size, group_dim, **options)
    x = torch.randn(data.draw(st.integers(0, 35)), cols, generator=generator).to(dtype)
    assert_within_bound(multiply(x, packed), x, packed)
    rounded = multiply(x, packed, activations="int8")
    if len(x) and cols:
        assert torch.equal(rounded, int8_reference(x, packed).to(dtype))
