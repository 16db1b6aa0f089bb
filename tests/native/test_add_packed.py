"""Decoding and adding packed weights in spans: every format on every instruction set."""

import ctypes
import mmap

import pytest
import torch

from pyrobust import _native
from pyrobust.ops import add_dequantized_, add_levels_, dequantize_codes, pack_codes
from pyrobust.quantize import BITS, QTensor

LEVELS = {1: 2, 1.58: 3, 2: 4, 3: 8, 4: 16, 8: 256}

# Columns: below a vector, between vectors, whole spans of 1280, one more, several and a rest.
COLUMNS = [1, 27, 64, 131, 1280, 1281, 2944, 3900]
GROUPS = [1, 27, 32, 13, 128, 100, 2944, 5000]


def random_weight(rows, cols, bits, group_size, group_dim=1, *, symmetric=False):
    def draw(high, shape):
        return torch.randint(0, high, shape, dtype=torch.uint8)

    grouped = (rows, -(-cols // group_size)) if group_dim else (-(-rows // group_size), cols)
    zero = None if symmetric or bits in (1, 1.58) else draw(LEVELS[bits], grouped)
    form = {"bits": bits, "group_size": group_size, "group_dim": group_dim}
    codes, scale = draw(LEVELS[bits], (rows, cols)), (torch.rand(grouped) + 0.1).half()
    return QTensor.from_codes(codes, scale, zero, **form)


def plain_weight(packed):
    """The weight in float64, from the definition."""
    integers = (2 if packed.bits == 1 else 1) * packed.unpack_codes().double()
    rows, cols = packed.shape

    def spread(grouped):
        return grouped.repeat_interleave(packed.group_size, packed.group_dim)[:rows, :cols]

    zero = packed.symmetric_zero if packed.zero is None else spread(packed.zero).double()
    return (integers - zero) * spread(packed.scale).double()


def isas():
    """Results on every instruction set are compared, so the tests set it themselves."""
    before = _native.isa()
    try:
        for name in _native.supported_isas():
            _native.set_isa(name)
            yield name
    finally:
        _native.set_isa(before)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_decoding_and_adding_equal_the_definition_to_the_bit(bits, group_dim, symmetric):
    for cols, group_size in zip(COLUMNS, GROUPS, strict=True):
        packed = random_weight(3, cols, bits, group_size, group_dim, symmetric=symmetric)
        weight, target = plain_weight(packed).float(), torch.randn(3, cols)
        expected = target + torch.tensor(0.37) * weight  # two roundings
        for _ in isas():
            assert torch.equal(packed.dequantize(), weight)
            assert torch.equal(packed.add_to_(target.clone(), 0.37), expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cols", COLUMNS)
def test_adding_levels_equals_the_definition_to_the_bit(bits, cols):
    codes = torch.randint(0, LEVELS[bits], (3, cols), dtype=torch.uint8)
    levels, target = torch.randn(LEVELS[bits]), torch.randn(3, cols)
    expected = target + (torch.tensor(-1.3) * levels)[codes.long()]
    packed = pack_codes(codes, bits=bits)
    for _ in isas():
        result = add_levels_(target.clone(), packed, levels, bits=bits, alpha=-1.3)
        assert torch.equal(result, expected)


def test_threads_do_not_change_the_bits():
    packed, target = random_weight(7, 150_001, 3, 128), torch.randn(7, 150_001)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((packed.dequantize(), packed.add_to_(target.clone(), 0.5)))
    finally:
        torch.set_num_threads(threads)
    for dense, added in results[1:]:
        assert torch.equal(dense, results[0][0])
        assert torch.equal(added, results[0][1])


@pytest.fixture
def last_bytes():
    """A function that copies bytes to the end of a page behind which no byte may be read."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mprotect"):
        pytest.skip("no mprotect on this system")
    kept = []

    def place(value):
        page, size = mmap.PAGESIZE, value.numel()
        assert size <= page
        memory = mmap.mmap(-1, 2 * page)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        kept.append((memory, whole))
        end = whole.data_ptr() + page
        assert libc.mprotect(ctypes.c_void_p(end), page, 0) == 0  # neither read nor write
        held = whole[page - size : page].view(value.shape)
        return held.copy_(value)

    yield place
    for memory, whole in kept:
        libc.mprotect(ctypes.c_void_p(whole.data_ptr() + mmap.PAGESIZE), mmap.PAGESIZE, 3)
        del whole, memory


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cols", [27, 64, 95, 131, 1281, 3900])
def test_no_byte_behind_the_codes_is_read(last_bytes, bits, cols):
    packed = random_weight(1, cols, bits, 64)
    codes = last_bytes(packed.codes)
    form = {"in_features": cols, "bits": bits, "group_size": 64}
    for _ in isas():
        decoded = dequantize_codes(codes, packed.scale, packed.zero, **form)
        assert torch.equal(decoded, packed.dequantize())


def test_refusals_before_anything_changes():
    packed, target = random_weight(3, 20, 4, 8), torch.zeros(3, 20)
    with pytest.raises(TypeError, match=r"target must have dtype torch\.float32"):
        packed.add_to_(target.double())
    with pytest.raises(ValueError, match="target must have shape"):
        packed.add_to_(torch.zeros(3, 21))
    with pytest.raises(ValueError, match="contiguous"):
        packed.add_to_(torch.zeros(20, 3).t())
    with pytest.raises(ValueError, match="alpha must be finite"):
        packed.add_to_(target, float("nan"))
    weight = torch.zeros(3, 20, requires_grad=True)
    with pytest.raises(ValueError, match="must not require a gradient"):
        packed.add_to_(weight)
    version = weight._version
    with torch.no_grad():
        assert torch.equal(packed.add_to_(weight), packed.dequantize())
    assert weight._version > version  # autograd sees that a saved weight has changed
    codes, levels = pack_codes(torch.zeros(3, 20, dtype=torch.uint8), bits=2), torch.zeros(4)
    with pytest.raises(ValueError, match="levels must have shape"):
        add_levels_(target, codes, levels[:3], bits=2)
    with pytest.raises(TypeError, match="levels must have dtype"):
        add_levels_(target, codes, levels.double(), bits=2)
    with pytest.raises(ValueError, match="codes must have shape"):
        add_levels_(torch.zeros(3, 30), codes, levels, bits=2)
    with pytest.raises(TypeError, match="codes must have dtype"):
        add_dequantized_(
            target, codes.int(), levels[:3, None], in_features=20, bits=2, group_size=20
        )
