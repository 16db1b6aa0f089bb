"""Decoding and adding packed weights in spans: every format on every instruction set."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch

from pyrobust import _native
from pyrobust.ops import add_dequantized_, add_levels_, dequantize_codes, pack_codes
from pyrobust.ops.add_packed import (
    Addition,
    SavedCopy,
    add_all_,
    add_values_,
    levels_summand,
    saved_copies,
    values_summand,
)
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


HALVES = [torch.float16, torch.bfloat16]


def sum_in_halves(target, weight, alpha):
    """The definition: alpha and weight in the target's type, their product exact, two roundings."""
    factor = torch.tensor(alpha).to(target.dtype).float()
    return (target.float() + factor * weight.to(target.dtype).float()).to(target.dtype)


def assert_same_bits(one, other):
    assert one.dtype == other.dtype
    assert torch.equal(one.contiguous().view(torch.int16), other.contiguous().view(torch.int16))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_dim", [0, 1])
def test_adding_to_halves_equals_the_definition_to_the_bit(bits, group_dim, dtype):
    for cols, group_size in zip(COLUMNS, GROUPS, strict=True):
        packed = random_weight(3, cols, bits, group_size, group_dim)
        target = torch.randn(3, cols).to(dtype)
        expected = sum_in_halves(target, packed.dequantize(), 0.37)
        for _ in isas():
            assert_same_bits(packed.add_to_(target.clone(), 0.37), expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", BITS)
def test_adding_levels_to_halves_equals_the_definition_to_the_bit(bits, dtype):
    for cols in COLUMNS:
        codes = torch.randint(0, LEVELS[bits], (3, cols), dtype=torch.uint8)
        levels, target = torch.randn(LEVELS[bits]), torch.randn(3, cols).to(dtype)
        levels[0], target[:, 0] = -0.0, -0.0
        levels[1] = 1e6  # infinite in float16
        expected = sum_in_halves(target, levels[codes.long()], -1.3)
        packed = pack_codes(codes, bits=bits)
        for _ in isas():
            result = add_levels_(target.clone(), packed, levels, bits=bits, alpha=-1.3)
            assert_same_bits(result, expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("alpha", [0.37, -(2.0**-13), 2.0**12])
def test_scales_of_every_size_are_rounded_alike(dtype, alpha):
    """Scales within a range take fewer operations; some here are inside, some outside."""
    scale = 2.0 ** torch.arange(-140, 125, dtype=torch.float64)[:, None]
    scale = torch.cat([scale, -scale, 1.37 * scale, 0 * scale[:1]]).float()
    codes = torch.arange(256, dtype=torch.uint8).expand(len(scale), 256).contiguous()
    packed = QTensor.from_codes(
        codes, scale, torch.full_like(scale, 93, dtype=torch.uint8), bits=8, group_size=256
    )
    target = (10.0 ** torch.randint(-6, 3, codes.shape) * torch.randn(codes.shape)).to(dtype)
    target[:, :93:2] = -0.0
    expected = sum_in_halves(target, packed.dequantize(), alpha)
    number = ~expected.isnan()
    for _ in isas():
        result = packed.add_to_(target.clone(), alpha)
        assert_same_bits(result[number], expected[number])
        assert bool(result[~number].isnan().all())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("values_dtype", [torch.float32, None])
def test_adding_values_equals_the_definition_to_the_bit(dtype, values_dtype):
    for cols in COLUMNS:
        whole = torch.randn(3, cols + 7).to(dtype)
        values = torch.randn(3, cols).to(values_dtype or dtype)
        target = whole[:, 3:-4]
        expected = sum_in_halves(target, values, -0.37)
        for _ in isas():
            changed, saved = whole.clone(), SavedCopy(torch.empty(3, cols, dtype=dtype))
            add_values_(changed[:, 3:-4], values, alpha=-0.37, saved=saved)
            assert_same_bits(changed[:, 3:-4], expected)
            assert torch.equal(changed[:, :3], whole[:, :3])
            assert torch.equal(changed[:, -4:], whole[:, -4:])
            assert saved.filled
            assert torch.equal(saved.values, target)


def test_adding_values_to_floats_rounds_twice():
    target, values = torch.randn(3, 1300), torch.randn(3, 1300)
    expected = target + torch.tensor(0.37) * values
    for _ in isas():
        assert torch.equal(add_values_(target.clone(), values, alpha=0.37), expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("alpha", [0.37, 1.0, -1.0])
def test_adding_to_halves_is_unpacking_and_adding(dtype, alpha):
    """Whole vectors of torch; in the elements that remain it rounds the product too."""
    packed, target = random_weight(4, 1280, 4, 128), torch.randn(4, 1280).to(dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = target.clone().add_(packed.dequantize().to(dtype), alpha=alpha)
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(packed.add_to_(target.clone(), alpha), expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_is_widened_and_rounded_alike_on_every_set(dtype):
    target = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)[None].view(dtype)
    codes = torch.randint(0, 4, target.shape, dtype=torch.uint8)
    packed, scale = pack_codes(codes, bits=2), 2.0 ** torch.arange(-30, 2)[None].float()
    form = {"in_features": 2**16, "bits": 2, "group_size": 2**11}
    weight = dequantize_codes(packed, scale, **form)
    expected, finite = sum_in_halves(target, weight, 0.75), ~target.isnan()
    results = []
    for _ in isas():
        added = add_dequantized_(target.clone(), packed, scale, alpha=0.75, **form)
        levels = add_levels_(target.clone(), packed, torch.zeros(4), bits=2)
        assert_same_bits(added[finite], expected[finite])
        assert torch.equal(levels[finite], target[finite])
        assert bool(added[~finite].isnan().all() and levels[~finite].isnan().all())
        results.append((added, levels))
    for pair in results[1:]:
        for one, other in zip(pair, results[0], strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("bits", [1.58, 3, 8])
def test_rows_that_lie_apart_are_added_to_and_nothing_between(bits, dtype):
    packed, whole = random_weight(3, 1300, bits, 100), torch.randn(3, 1400).to(dtype)
    codes, levels = packed.codes, torch.randn(LEVELS[bits])
    for _ in isas():
        for add in (
            lambda target: packed.add_to_(target, 0.37),
            lambda target: add_levels_(target, codes, levels, bits=bits, alpha=0.37),
        ):
            changed, dense = whole.clone(), whole[:, 50:1350].contiguous()
            add(changed[:, 50:1350])
            assert torch.equal(changed[:, 50:1350], add(dense))
            assert torch.equal(changed[:, :50], whole[:, :50])
            assert torch.equal(changed[:, 1350:], whole[:, 1350:])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("bits", [1.58, 4, 8])
@pytest.mark.parametrize("group_size", [100, 64])  # runs anywhere; on lines, in the loop of sums
def test_what_the_target_held_is_saved_in_the_same_pass(bits, dtype, group_size):
    # Places of any alignment (0 and 32 are that of a line), rows that lie apart.
    for offset, cols in zip((0, 1, 32, 3, 0, 32, 6, 0), COLUMNS, strict=True):
        packed, whole = random_weight(3, cols, bits, group_size), torch.randn(3, cols + 7).to(dtype)
        codes, levels = packed.codes, torch.randn(LEVELS[bits])
        for _ in isas():
            for add in (
                partial(packed.add_to_, alpha=0.37),
                partial(add_levels_, codes=codes, levels=levels, bits=bits),
            ):
                target, room = whole.clone()[:, 3:-4], torch.zeros(3 * cols + 40).to(dtype)
                saved = SavedCopy(room[offset : offset + 3 * cols].view(3, cols))
                result = add(target, saved=saved)
                assert saved.filled
                assert torch.equal(saved.values, whole[:, 3:-4])
                assert torch.equal(result, add(whole.clone()[:, 3:-4]))
                assert not room[:offset].any()
                assert not room[offset + 3 * cols :].any()


def test_copies_begin_on_lines_and_do_not_overlap():
    shapes, dtypes = [(3, 5), (), (0, 4), (1000, 1001), (7,)], [torch.float32, *HALVES]
    targets = [torch.randn(shape).to(dtype) for shape in shapes for dtype in dtypes]
    copies = saved_copies(targets)
    for copied, target in zip(copies, targets, strict=True):
        assert (copied.values.shape, copied.values.dtype) == (target.shape, target.dtype)
        assert copied.values.is_contiguous()
        assert target.numel() == 0 or copied.values.data_ptr() % 64 == 0
        copied.fill(target)
    assert all(torch.equal(c.values, t) for c, t in zip(copies, targets, strict=True))
    assert saved_copies([]) == []
    assert saved_copies([torch.empty(2, 3, device="meta")])[0].values.is_meta


def test_no_copy_is_called_filled_where_the_addition_is_refused():
    packed, target = random_weight(3, 20, 4, 8), torch.randn(3, 20)
    before = target.clone()
    for room, message in (
        (torch.zeros(3, 20).half(), "saved must have dtype"),
        (torch.zeros(3, 19), "saved must hold 60 values; got 57"),
        (torch.zeros(20, 3).t(), "saved must be contiguous"),
    ):
        saved = SavedCopy(room)
        with pytest.raises((TypeError, ValueError), match=message):
            packed.add_to_(target, 0.37, saved)
        assert not saved.filled
        assert torch.equal(target, before)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_sums_made_in_one_call_are_those_made_one_by_one(dtype):
    weights = [random_weight(3, cols, 4, 64) for cols in COLUMNS]
    codes, levels = pack_codes(torch.randint(0, 4, (3, 500)).byte(), bits=2), torch.randn(4)
    values = torch.randn(3, 500)
    targets = [torch.randn(weight.shape).to(dtype) for weight in weights]
    targets += [torch.randn(3, 500).to(dtype) for _ in range(2)]
    for _ in isas():
        expected = [w.add_to_(t.clone(), 0.3) for w, t in zip(weights, targets, strict=False)]
        expected.append(add_levels_(targets[-2].clone(), codes, levels, bits=2, alpha=0.4))
        expected.append(add_values_(targets[-1].clone(), values, alpha=0.5))
        changed, saved = ([t.clone() for t in targets], [SavedCopy(t + 1) for t in targets])
        versions = [target._version for target in changed]
        rooms = [*saved[:-1], None]
        summands = [weight.summand() for weight in weights]
        summands.append(levels_summand("test", codes, levels, bits=2, length=500))
        summands.append(values_summand(values, (3, 500)))
        factors = [0.3] * len(weights) + [0.4, 0.5]
        sums = [Addition(*parts) for parts in zip(summands, changed, factors, rooms, strict=True)]
        refused = [*sums, Addition(summands[0], torch.zeros(4, 1), 1.0)]
        with pytest.raises(ValueError, match="target must hold 3 elements; got shape"):
            add_all_("test", refused)
        assert all(torch.equal(*both) for both in zip(changed, targets, strict=True))
        add_all_("test", sums)
        assert all(torch.equal(*both) for both in zip(changed, expected, strict=True))
        assert all(
            torch.equal(*both)
            for both in zip((s.values for s in saved[:-1]), targets, strict=False)
        )
        assert [room.filled for room in saved] == [True] * (len(saved) - 1) + [False]
        assert all(t._version > v for t, v in zip(changed, versions, strict=True))
    add_all_("test", [])


def test_a_summand_keeps_its_tensors():
    packed, target = random_weight(3, 4000, 4, 64), torch.randn(3, 4000)
    expected, copied = packed.add_to_(target.clone(), 0.3), copy.deepcopy(packed)
    summand, codes = copied.summand(), weakref.ref(copied.codes)
    del copied
    gc.collect()
    assert codes() is not None
    add_all_("test", [Addition(summand, target, 0.3)])
    assert torch.equal(target, expected)
    del summand
    gc.collect()
    assert codes() is None


def test_threads_do_not_change_the_bits():
    packed, target = random_weight(7, 150_001, 3, 128), torch.randn(7, 150_001)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            saved = SavedCopy(torch.empty(7, 150_001))
            results.append((packed.dequantize(), packed.add_to_(target.clone(), 0.5, saved)))
            assert torch.equal(saved.values, target)
    finally:
        torch.set_num_threads(threads)
    for dense, added in results[1:]:
        assert torch.equal(dense, results[0][0])
        assert torch.equal(added, results[0][1])


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
    with pytest.raises(ValueError, match="do not overlap"):
        packed.add_to_(torch.zeros(20).expand(3, 20))
    with pytest.raises(ValueError, match="do not overlap"):
        packed.add_to_(torch.zeros(60).as_strided((3, 20), (19, 1)))
    with pytest.raises(ValueError, match="alpha must be finite"):
        packed.add_to_(target, float("nan"))
    with pytest.raises(ValueError, match="alpha must be finite"):
        packed.add_to_(target.half(), 1e6)
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
    with pytest.raises(TypeError, match=r"values must have dtype torch\.float32 or that of target"):
        add_values_(target, target.half())
    with pytest.raises(ValueError, match="values must have shape"):
        add_values_(target, target[:2])
    with pytest.raises(TypeError, match="codes must have dtype"):
        add_dequantized_(
            target, codes.int(), levels[:3, None], in_features=20, bits=2, group_size=20
        )
