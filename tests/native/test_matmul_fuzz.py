"""Damaged and absurd input of the packer and the product gives a sentence or numbers, no fault.

Shows that nothing crashes and that equal input gives equal bits; with ``PYROBUST_SANITIZE`` (see
``CMakeLists.txt``) also that no buffer is left. The file loader's fuzz is in ``tests/test_io.py``.
"""

import random

import pytest
import torch

from pyrobust import _native
from pyrobust.ops.formats import levels_of, row_bytes
from pyrobust.quantize import BITS

REFUSED = (ValueError, TypeError, OverflowError, RuntimeError)
HUGE = [2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, -1, -(2**63), 0]
ROUNDS = [60, pytest.param(3000, marks=pytest.mark.slow, id="many")]


def noise(draw, shape, dtype=torch.uint8):
    """Any bit pattern: NaN, infinities, codes that no packer writes."""
    count = 1
    for size in shape:
        count *= size
    size = torch.empty(0, dtype=dtype).element_size()
    data = torch.frombuffer(bytearray(draw.randbytes(count * size) or b"\0" * 8), dtype=dtype)
    return data[:count].reshape(shape)


def damaged_call(draw):
    """Arguments of ``packed_linear`` whose shapes fit and whose contents are noise."""
    bits = draw.choice(BITS)
    rows, cols = draw.randrange(1, 80), draw.randrange(1, 400)
    group = draw.choice([1, 7, 64, 128, 1000])
    grouped = (rows, -(-cols // group))
    dim = draw.randrange(2)
    if dim == 0:
        grouped = (-(-rows // group), cols)
    two_level, book = draw.random() < 0.3, bits != 8 and draw.random() < 0.3
    scale = noise(draw, grouped, torch.uint8 if two_level else torch.float16)
    zero = noise(draw, grouped) if book or bits not in (1, 1.58) else None
    entries = draw.randrange(50)
    sparse = (None, None, None)
    if draw.random() < 0.3:
        sparse = (
            noise(draw, (entries,), torch.float32),
            noise(draw, (entries,), torch.int32),
            noise(draw, (rows + 1,), torch.int64),
        )
    extras = (
        noise(draw, (rows,), torch.float32) if two_level else None,
        noise(draw, (levels_of(bits),)) if book else None,
        *sparse,
    )
    x = noise(draw, (draw.choice([1, 2, 3, 4, 5, 8, 9, 17]), cols), torch.float32)
    codes = noise(draw, (rows, row_bytes(cols, bits)))
    options = [cols, levels_of(bits), group, dim, draw.random() < 0.5, extras, 0, 2]
    return [x, codes, scale, zero, None, torch.empty(x.shape[0], rows), *options]


@pytest.mark.parametrize("rounds", ROUNDS)
def test_noise_as_a_weight_is_no_fault(isa, rounds):
    draw = random.Random(f"weight {isa}")
    for _ in range(rounds):
        call = damaged_call(draw)
        _native.packed_linear(*call)
        first = call[5].clone()
        _native.packed_linear(*call)
        assert torch.equal(first.view(torch.int32), call[5].view(torch.int32))


@pytest.mark.parametrize("rounds", ROUNDS)
def test_sizes_that_do_not_fit_the_buffers_are_refused(isa, rounds):
    draw = random.Random(f"size {isa}")
    for _ in range(rounds):
        call = damaged_call(draw)
        place = draw.choice([6, 7, 8, 9, 12])  # columns, levels, group size, direction, first row
        if place == 8:
            call[8] = draw.choice([0, -1, -(2**63), 2**63])
        elif place == 12:
            call[12] = draw.choice([value for value in HUGE if value])
        else:
            right = call[place]
            call[place] = draw.choice([v for v in [*HUGE, 5, 257] if v not in (right, 0, 1)])
        with pytest.raises(REFUSED):
            _native.packed_linear(*call)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_truncated_buffers_are_refused(isa, rounds):
    draw = random.Random(f"short {isa}")
    for _ in range(rounds):
        call = damaged_call(draw)
        place = draw.choice([i for i in (0, 1, 2, 3, 5) if call[i] is not None])
        axis = 1 if place in (0, 1) else draw.randrange(2)
        size = call[place].shape[axis]
        call[place] = call[place].narrow(axis, 0, size - draw.randint(1, size)).contiguous()
        if place == 5 and axis == 1:  # fewer results are a request for fewer rows of W
            _native.packed_linear(*call)
            continue
        with pytest.raises(REFUSED):
            _native.packed_linear(*call)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_the_packer_refuses_or_returns(isa, rounds):
    draw = random.Random(f"packer {isa}")
    for _ in range(rounds):
        bits = draw.choice(BITS)
        rows, cols = draw.randrange(0, 9), draw.randrange(0, 300)
        packed = noise(draw, (rows, row_bytes(cols, bits)))
        codes = torch.empty(rows, cols, dtype=torch.uint8)
        _native.unpack_codes(packed, codes, levels_of(bits), 2)  # of any bytes
        assert (codes.int() < levels_of(bits)).all()
        again = torch.empty_like(packed)
        _native.pack_codes(codes, again, levels_of(bits), 2)
        back = torch.empty_like(codes)
        _native.unpack_codes(again, back, levels_of(bits), 2)
        assert torch.equal(codes, back)
        short = packed[:, : max(0, packed.shape[1] - 1)].contiguous()
        if packed.shape[1]:
            with pytest.raises(REFUSED):
                _native.unpack_codes(short, codes, levels_of(bits), 2)
        if codes.numel() and bits != 8:
            codes.view(-1)[draw.randrange(codes.numel())] = draw.randrange(levels_of(bits), 256)
            with pytest.raises(REFUSED):
                _native.pack_codes(codes, again, levels_of(bits), 2)
        with pytest.raises(REFUSED):
            _native.unpack_codes(packed, codes, draw.choice([*HUGE, 5, 255]), 2)
