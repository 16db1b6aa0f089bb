"""The emulated CUDA primitives are right, and the emulation catches planted faults."""

import itertools

import numpy as np
import pytest
import torch

shim = pytest.importorskip("pyrobust._cuda_shim", reason="not built (PYROBUST_CUDA_SHIM=ON)")
ORDERS = pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])


@pytest.fixture(autouse=True)
def _fresh_options():
    shim.set_options()
    shim.take_counters()
    yield
    shim.set_options()


def ring_sum(left):
    tiles = torch.arange(7 * 256, dtype=torch.int32).view(7, 256)
    out = torch.zeros(256, dtype=torch.int32)
    shim.ring_sum(tiles, out, left)
    return torch.equal(out, tiles.sum(0, dtype=torch.int32))


@ORDERS
def test_copies_land_when_waited_for(descending):
    shim.set_options(descending=descending)
    assert ring_sum(left=1)
    assert ring_sum(left=0)
    assert shim.take_counters()["async_copies"] == 2 * 7 * 64


@ORDERS
def test_a_missing_wait_is_caught(descending):
    shim.set_options(descending=descending)
    assert not ring_sum(left=2)
    shim.set_options(descending=descending, copies_land_at_once=True)
    assert ring_sum(left=2)  # what an emulation with synchronous copies would have said


def signalled_sum(fault):
    tiles = torch.arange(7 * 128, dtype=torch.int32).view(7, 128)
    out = torch.zeros(128, dtype=torch.int32)
    shim.signalled_sum(tiles, out, fault)
    return torch.equal(out, tiles.sum(0, dtype=torch.int32))


@ORDERS
@pytest.mark.parametrize("at_once", [False, True])
def test_signals_tell_when_copies_have_landed(descending, at_once):
    shim.set_options(descending=descending, copies_land_at_once=at_once)
    assert signalled_sum(0)


@ORDERS
def test_copies_that_no_signal_was_awaited_for_are_caught(descending):
    shim.set_options(descending=descending)
    with pytest.raises(RuntimeError, match="a phase of a signal ended that nobody waited for"):
        signalled_sum(1)


def test_a_tile_that_is_filled_while_others_read_it_is_caught():
    """Where copies land at once, as they may; in one of the two orders of lanes."""
    found = []
    for descending in (False, True):
        shim.set_options(descending=descending, copies_land_at_once=True)
        found.append(signalled_sum(2))
    assert not all(found)


def test_signals_that_are_not_shown_are_caught():
    with pytest.raises(RuntimeError, match="a signal that its maker has not shown"):
        signalled_sum(3)


@ORDERS
def test_waiting_for_a_phase_that_is_over_is_caught(descending):
    shim.set_options(descending=descending)
    with pytest.raises(RuntimeError, match=r"deadlock|a phase of a signal ended that nobody"):
        signalled_sum(4)


def test_stores_that_a_bulk_copy_does_not_see_are_caught():
    with pytest.raises(RuntimeError, match=r"a bulk copy meets a write of thread .* no fence"):
        signalled_sum(5)


def warpgroup_product(fault):
    generator = torch.Generator().manual_seed(3)
    a = torch.randint(-8, 9, (64, 64), generator=generator).bfloat16()
    b = torch.randint(-8, 9, (8, 64), generator=generator).bfloat16()
    d = torch.zeros(64, 8)
    shim.warpgroup_product(a, b, d, fault)
    return torch.equal(d, a.float() @ b.float().T)


@ORDERS
@pytest.mark.parametrize("at_once", [False, True])
def test_products_of_a_warpgroup(descending, at_once):
    shim.set_options(descending=descending, copies_land_at_once=at_once)
    assert warpgroup_product(0)


@ORDERS
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, "a product of a warpgroup meets a write of thread .* no fence has shown"),
        (2, "registers no fence has shown"),
        (3, "registers of a product were written while it was under way"),
        (4, "sums are read that a product under way adds to"),
        (6, "ended before its products were finished"),
    ],
)
def test_faulty_products_of_a_warpgroup_are_caught(descending, fault, message):
    shim.set_options(descending=descending)
    with pytest.raises(RuntimeError, match=message):
        warpgroup_product(fault)


@ORDERS
def test_an_operand_that_is_overwritten_while_products_are_under_way_is_caught(descending):
    shim.set_options(descending=descending)
    assert not warpgroup_product(5)
    shim.set_options(descending=descending, copies_land_at_once=True)
    assert warpgroup_product(5)  # what an emulation with immediate products would have said


def four_times(fault, overlaps=True):
    given, between, out = torch.randn(32), torch.full((32,), 9.0), torch.zeros(32)
    shim.doubled(given, between, overlaps, 0)
    shim.doubled(between, out, overlaps, fault)
    return torch.equal(out, 4 * given)


@ORDERS
def test_a_launch_that_overlaps_waits_for_what_it_reads(descending):
    assert four_times(1)  # one after another nothing shows
    shim.set_options(descending=descending, hold_launches=True)
    assert four_times(0)
    assert not four_times(2)
    with pytest.raises(RuntimeError, match="never waited for the grid ahead"):
        four_times(1)
    with pytest.raises(RuntimeError, match="held for one that does not overlap"):
        four_times(0, overlaps=False)


@ORDERS
def test_blocks_of_a_cluster_give_each_other_values(descending):
    shim.set_options(descending=descending)
    values, out = torch.randn(2, 128), torch.zeros(2, 128)
    shim.exchanged(values, out, False)
    assert torch.equal(out, values.flip(0))
    shim.exchanged(values, out, True)
    assert out.isnan().any()


def test_a_signal_that_expects_too_much_is_a_deadlock():
    with pytest.raises(RuntimeError, match="deadlock"):
        shim.never_signalled(torch.zeros(8, dtype=torch.int32))


def test_a_missing_barrier_is_caught():
    numbers = torch.arange(128, dtype=torch.int32)
    expected = numbers.view(2, 64).flip(1).flatten()
    for barrier, descending in itertools.product((True, False), (False, True)):
        shim.set_options(descending=descending)
        out = torch.zeros_like(numbers)
        shim.reversed(numbers, out, barrier)
        assert torch.equal(out, expected) == barrier


def test_a_barrier_that_some_threads_miss_is_a_deadlock():
    with pytest.raises(RuntimeError, match=r"deadlock.*waits for a barrier.*32 of 64"):
        shim.diverged_barrier(torch.zeros(64, dtype=torch.int32))


def test_addresses_are_checked():
    out = torch.zeros(32, dtype=torch.int32)
    shim.read_shared_rows(16, out)
    assert (out == -1).all()  # shared memory begins poisoned
    with pytest.raises(RuntimeError, match="ldmatrix outside of shared memory"):
        shim.read_shared_rows(17, out)
    data, copy = torch.arange(32 * 16 + 16).to(torch.uint8), torch.zeros(512, dtype=torch.uint8)
    shim.copied(data, 0, copy)
    assert torch.equal(copy, data[:512])
    with pytest.raises(RuntimeError, match="misaligned"):
        shim.copied(data, 8, copy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_halves_match_float64(dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype)
    d = torch.randn(16, 8)
    exact = d.double() + a.double() @ b.double().T
    shim.multiply(a, b, d)
    assert torch.equal(d, exact.float())
    assert shim.take_counters()["matrix_products"] == 1


def test_the_truncating_tensor_core_stays_within_its_documented_error():
    """K 2^-22 of the sum of magnitudes, and really off from the rounded result."""
    shim.set_options(truncating=True)
    a = torch.randn(16, 16).exp().to(torch.bfloat16)
    b = torch.randn(8, 16).to(torch.bfloat16)
    d = torch.zeros(16, 8)
    exact = a.double() @ b.double().T
    shim.multiply(a, b, d)
    scale = a.double() @ b.double().abs().T
    assert ((d.double() - exact).abs() <= scale * 16 * 2.0**-22).all()
    assert not torch.equal(d, exact.float())


def test_products_of_bytes_are_exact():
    a = torch.randint(-128, 128, (16, 32), dtype=torch.int8)
    b = torch.randint(-128, 128, (8, 32), dtype=torch.int8)
    d = torch.zeros(16, 8, dtype=torch.int32)
    shim.multiply(a, b, d)
    assert torch.equal(d, (a.int() @ b.int().T))


def test_transposed_matrices():
    values = torch.randint(-1000, 1000, (16, 16), dtype=torch.int16)
    out = torch.zeros_like(values)
    shim.transposed(values, out)
    assert torch.equal(out, values.T)


@ORDERS
def test_blocks_take_turns_under_a_lock(descending):
    shim.set_options(descending=descending)
    order = torch.full((5,), -1, dtype=torch.int32)
    shim.in_turn(order, 0)
    assert order.tolist() == [4, 3, 2, 1, 0]
    with pytest.raises(RuntimeError, match=r"deadlock.*another block"):
        shim.in_turn(order, 7)


def _words():
    generator = np.random.default_rng(0)
    a, b, c = (generator.integers(0, 2**32, 64, dtype=np.uint64).astype(np.uint32) for _ in "abc")
    x, y = (generator.standard_normal(64).astype(np.float32) for _ in "xy")
    out = torch.zeros(64, 16, dtype=torch.int32)
    signed = [torch.from_numpy(v.view(np.int32).copy()) for v in (a, b, c)]
    shim.words(*signed, torch.from_numpy(x), torch.from_numpy(y), out)
    return a, b, c, x, y, out.numpy().view(np.uint32)


def test_word_operations():
    a, b, c, _, _, out = _words()
    np.testing.assert_array_equal(out[:, 0], (a & b) | c)
    np.testing.assert_array_equal(out[:, 1], ~a ^ (b & c))
    both = np.stack([a, b], 1).view(np.uint8).reshape(64, 8)
    chosen = np.stack([both[np.arange(64), (c >> (4 * i)) & 7] for i in range(4)], 1)
    np.testing.assert_array_equal(out[:, 2], chosen.copy().view(np.uint32)[:, 0])


def test_half_operations_round_once():
    a, b, c, x, y, out = _words()

    def halves(words):
        return words.view(np.float16).reshape(64, 2).astype(np.float64)

    # float64 holds a product of two halves, and its sum with a third, exactly or nearly so.
    with np.errstate(all="ignore"):
        fused = (halves(a) * halves(b) + halves(c)).astype(np.float16)
        product = (halves(a) * halves(b)).astype(np.float16)
        difference = (halves(a) - halves(b)).astype(np.float16)
    for column, expected in ((3, fused), (4, product), (5, difference)):
        seen = np.ascontiguousarray(out[:, column]).view(np.float16).reshape(64, 2)
        np.testing.assert_array_equal(seen, expected)
    wide = [torch.from_numpy(v.view(np.int16).copy()).view(torch.bfloat16) for v in (a, b, c)]
    fused = torch.addcmul(wide[2].double(), wide[0].double(), wide[1].double())
    seen = torch.from_numpy(np.ascontiguousarray(out[:, 6]).view(np.int16).copy())
    torch.testing.assert_close(
        seen.view(torch.bfloat16), fused.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True
    )
    pair = np.stack([x, y], 1)
    packed = np.ascontiguousarray(out[:, 7]).view(np.float16).reshape(64, 2)
    np.testing.assert_array_equal(packed, pair.astype(np.float16))
    packed = torch.from_numpy(np.ascontiguousarray(out[:, 8]).view(np.int16).copy())
    expected = torch.from_numpy(pair).to(torch.bfloat16).flatten()
    assert torch.equal(packed.view(torch.bfloat16), expected)


def test_shuffles_and_directed_rounding():
    a, _, _, x, y, out = _words()
    warps = a.reshape(2, 32)
    lanes = np.arange(32)
    np.testing.assert_array_equal(out[:, 9].reshape(2, 32), warps[:, [7] * 32])
    np.testing.assert_array_equal(out[:, 10].reshape(2, 32), warps[:, lanes ^ 5])
    down = np.where(lanes + 3 < 32, lanes + 3, lanes)
    np.testing.assert_array_equal(out[:, 11].reshape(2, 32), warps[:, down])
    votes = ((warps & 1).astype(np.uint64) << lanes.astype(np.uint64)).sum(1)
    np.testing.assert_array_equal(out[:, 12].reshape(2, 32)[:, 0], votes.astype(np.uint32))
    ends = np.ascontiguousarray(out[:, 13:16]).view(np.float32).astype(np.float64)
    wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
    total, product = wide_x + wide_y, wide_x * wide_y
    assert (ends[:, 1] <= total).all()
    assert (total <= ends[:, 0]).all()
    assert (product <= ends[:, 2]).all()
    step = np.spacing(np.abs(total).astype(np.float32)).astype(np.float64)
    assert (ends[:, 0] - ends[:, 1] <= 2 * step).all()


def test_reductions_and_atomics():
    x = torch.randperm(32).float() + 1
    sums, histogram = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    least = torch.full((1,), 99)
    shim.reduced(x, sums, histogram, least)
    assert sums[:2].tolist() == [528.0, 32.0]
    assert sums[3] <= 528 * 32 <= sums[2]
    assert sums[3] < sums[2]
    assert histogram.tolist() == [8, 8, 8, 8]
    assert least.item() == 1
