"""Every format, direction, activation mode, batch size and tail on every instruction set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrobust import _native
from pyrobust.quantize import BITS, QTensor

from ..packed_products import LEVELS, multiply, random_weight

BATCHES = [0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 64, 200]
# rows, cols, group_size: whole blocks, one group, odd groups, tails of rows, columns and groups
SHAPES = [(9, 256, 128), (6, 150, 150), (7, 200, 32), (5, 131, 13), (3, 77, 64), (70, 640, 64)]
SHAPES += [(17, 70, 128), (9, 100, 25)]  # one group and four beside each other
ISAS = _native.supported_isas()


def int8_reference(x, packed: QTensor) -> torch.Tensor:
    """Integer sums per group in int64, double epilogue in the stated order; direction 1 only."""
    rows, cols = packed.shape
    step = x.double().abs().amax(1, keepdim=True) / 127
    q = torch.where(step > 0, x.double() / step, 0.0).round().long()
    multiplier = 2 if packed.bits == 1 else 1
    zero = packed.zero
    if zero is None:
        constant = 1 if packed.bits == 1 else LEVELS[packed.bits] // 2
        zero = torch.full(packed.scale.shape, constant, dtype=torch.uint8)
    codes = multiplier * packed.unpack_codes().long()
    total = torch.zeros(len(x), rows, dtype=torch.float64)
    for group in range(packed.scale.shape[1]):
        columns = slice(group * packed.group_size, min(cols, (group + 1) * packed.group_size))
        weight = codes[:, columns] - zero[:, group, None].long()
        total = total + (q[:, columns] @ weight.t()).double() * packed.scale[:, group].double()
    return (total * step).float()


def assert_within_bound(result, x, packed, bias=None):
    weight = packed.dequantize(torch.float64)
    exact, allowance = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
    if bias is not None:
        exact, allowance = exact + bias.double(), allowance + bias.double().abs()
    assert ((result.double() - exact).abs() <= 1e-6 * allowance).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_mode_for_every_batch_size(isa, bits, group_dim, shape):
    rows, cols, group_size = shape
    packed = random_weight(rows, cols, bits, group_size, group_dim)
    x, bias = torch.randn(max(BATCHES), cols), torch.randn(rows)
    whole = multiply(x, packed, bias)
    assert_within_bound(whole, x, packed, bias)
    for batch in BATCHES:  # a row's result does not depend on the batch around it, to the bit
        assert torch.equal(multiply(x[:batch], packed, bias), whole[:batch])
        assert torch.equal(multiply(x[200 - batch :], packed, bias), whole[200 - batch :])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_int8_mode_equals_integer_arithmetic(isa, bits, shape, symmetric):
    rows, cols, group_size = shape
    packed = random_weight(rows, cols, bits, group_size, 1, symmetric=symmetric)
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
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_mode_has_the_same_bits_on_every_instruction_set(bits, group_dim, shape):
    rows, cols, group_size = shape
    packed = random_weight(rows, cols, bits, group_size, group_dim)
    x, before = torch.randn(17, cols).bfloat16(), _native.isa()
    results = []
    try:
        for name in ISAS:
            _native.set_isa(name)
            results += [multiply(x[:m], packed, activations="int8")[:1] for m in (1, 2, 17)]
    finally:
        _native.set_isa(before)
    assert all(torch.equal(result, results[0]) for result in results)


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


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_shapes_formats_and_modes(data):
    rows, cols = data.draw(st.integers(0, 70)), data.draw(st.integers(0, 400))
    bits, group_dim = data.draw(st.sampled_from(BITS)), data.draw(st.integers(0, 1))
    group_size = data.draw(st.sampled_from([1, 7, 8, 32, 64, 100, 128, 192, 1000]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    packed = random_weight(rows, cols, bits, group_size, group_dim, generator=generator)
    x = torch.randn(data.draw(st.integers(0, 9)), cols, generator=generator)
    assert_within_bound(multiply(x, packed), x, packed)
    rounded = multiply(x, packed, activations="int8")
    if group_dim == 1 and len(x) and cols:
        assert torch.equal(rounded, int8_reference(x, packed))
