"""The order of packed weights in GPU memory: bijections, fragment coordinates, schedules."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrobust.ops import pack_codes
from pyrobust.ops._cuda_matmul import _strip_order

shim = pytest.importorskip("pyrobust._cuda_shim", reason="not built (PYROBUST_CUDA_SHIM=ON)")

CODEBOOK, COMPLEX = 5, 6
FORMATS = {1: 0, 2: 1, 3: 2, 4: 3, 8: 4, "codebook": CODEBOOK, "complex": COMPLEX}
LEVELS = {1: 2, 1.58: 3, 2: 4, 3: 8, 4: 16, 8: 256}
EVERY_FORMAT = pytest.mark.parametrize("format_", FORMATS.values(), ids=FORMATS)


@EVERY_FORMAT
def test_each_bit_of_a_block_has_a_place_of_its_own(format_):
    bits = shim.layout_bits(format_)
    places = shim.layout_places(format_)
    assert sorted(places) == list(range(64 * 64 * bits))
    assert shim.layout_stored_words(format_, 64, 64) * 32 == len(places)


def test_pairs_are_the_first_operand_of_the_tensor_core():
    """PTX, mma.m16n8k16: a[i] of lane 4 g + t is row g + 8 (i % 2), columns 2 t + 8 (i / 2) + e."""
    seen = set()
    for lane, step, tile, i, e in itertools.product(
        range(32), range(4), range(4), range(4), range(2)
    ):
        r, h = 2 * tile + i % 2, i // 2
        row, col = shim.layout_pair(lane, step, r, h, e)
        assert row == 16 * tile + lane // 4 + 8 * (i % 2)
        assert col == 16 * step + 2 * (lane % 4) + 8 * (i // 2) + e
        assert shim.layout_owner(row, col) == (lane, step, r, h, e)
        seen.add((row, col))
    assert len(seen) == 64 * 64


@pytest.mark.parametrize("bits", LEVELS)
@pytest.mark.parametrize("codebook", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (65, 63), (130, 200)])
def test_codes_survive_the_trip(bits, codebook, shape):
    if codebook and bits == 8:
        pytest.skip("8 bits take no codebook")
    codes = torch.randint(0, LEVELS[bits], shape, dtype=torch.uint8)
    format_ = shim.layout_format(LEVELS[bits], codebook)
    stored = torch.full((shim.layout_stored_words(format_, *shape),), -1, dtype=torch.int32)
    shim.layout_pack(format_, pack_codes(codes, bits=bits), shape[1], LEVELS[bits], stored)
    back = torch.empty_like(codes)
    shim.layout_read(format_, stored, back)
    assert torch.equal(back, 1 - codes if bits == 1 and not codebook else codes)


def test_the_kernel_packs_as_the_host_function_does():
    codes = torch.randint(0, 8, (70, 130), dtype=torch.uint8)
    packed = pack_codes(codes, bits=3)
    words = shim.stored_words(8, False, 70, 130)
    by_host, by_kernel = torch.zeros(2, words, dtype=torch.int32)
    shim.layout_pack(FORMATS[3], packed, 130, 8, by_host)
    shim.repack(8, False, False, packed.data_ptr(), 70, 130, by_kernel.data_ptr(), (0, 0))
    assert torch.equal(by_host, by_kernel)


def test_complex_codes_become_sign_and_kind():
    codes = torch.arange(4, dtype=torch.uint8).repeat(64, 16)
    stored = torch.zeros(shim.layout_stored_words(COMPLEX, 64, 64), dtype=torch.int32)
    shim.layout_pack(COMPLEX, pack_codes(codes, bits=2), 64, 4, stored)
    back = torch.empty_like(codes)
    shim.layout_read(COMPLEX, stored, back)
    assert back[0, :4].tolist() == [1, 0, 3, 2]


def test_scales_of_a_lane_lie_together():
    assert sorted(shim.layout_scale_place(row) for row in range(64)) == list(range(64))
    for lane, r in itertools.product(range(0, 32, 4), range(8)):
        row, _ = shim.layout_pair(lane, 0, r, 0, 0)
        assert shim.layout_scale_place(row) == lane // 4 * 8 + r


@pytest.mark.parametrize("pairs", [False, True])
def test_torch_puts_scales_where_the_kernel_looks(pairs):
    scale = torch.arange(100 * 3, dtype=torch.float32).view(100, 3)
    stored = _strip_order(scale, pairs)
    assert stored.shape == (2, 4 if pairs else 3, 8, 4, 2)
    flat = stored.view(2, stored.shape[1], 64)
    for row, group in itertools.product(range(100), range(3)):
        at = flat[row // 64, group, shim.layout_scale_place(row % 64)]
        assert at == scale[row, group]


def test_chunks_of_x_read_together_lie_in_different_banks():
    offsets = [shim.layout_activation_offset(m, c) for m in range(64) for c in range(8)]
    assert sorted(offsets) == list(range(0, 64 * 128, 16))
    for first, chunk in itertools.product(range(0, 64, 8), range(8)):
        together = [shim.layout_activation_offset(first + i, chunk) // 16 % 8 for i in range(8)]
        assert sorted(together) == list(range(8))


@pytest.mark.parametrize("rows", [1, 256, 257, 1024, 28672])
@pytest.mark.parametrize("cols", [1, 64, 1000, 8192])
@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
@pytest.mark.parametrize("count", [8, 16, 32])
def test_runs_cover_every_block_of_columns_once(rows, cols, multiprocessors, count):
    s = shim.layout_schedule(count, rows, cols, multiprocessors)
    assert s["tiles"] == -(-rows // (64 if count <= 16 else 128))
    assert s["blocks"] == -(-cols // 64)
    assert s["parts"] in (1, 2)
    assert len(s["runs"]) == s["parts"] * {8: 8, 16: 8, 32: 4}[count]
    ends = [0, *(last for _, last in s["runs"])]
    assert [first for first, _ in s["runs"]] == ends[:-1]
    assert ends[-1] == s["blocks"]
    assert all(0 <= last - first <= s["per"] for first, last in s["runs"])


@pytest.mark.parametrize(
    ("kernel", "strips", "teams", "multiple"),
    [("few", 1, 8, 2), ("wide", 2, 2, 2), ("broad", 4, 1, 1)],
)
@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4096), st.integers(1, 2**20), st.integers(1, 2**20), st.integers(1, 200))
def test_other_schedules_cover_every_block_of_columns_once(
    kernel, strips, teams, multiple, count, rows, cols, multiprocessors
):
    s = shim.layout_schedule_of(kernel, count, rows, cols, multiprocessors)
    assert s["tiles"] == -(-rows // (64 * strips))
    assert s["blocks"] == -(-cols // 64)
    assert s["parts"] in (1, 2)
    assert s["per"] % multiple == 0  # such blocks are copied together
    assert len(s["runs"]) == s["parts"] * teams
    ends = [0, *(last for _, last in s["runs"])]
    assert [first for first, _ in s["runs"]] == ends[:-1]
    assert ends[-1] == s["blocks"]


def test_schedules_fill_the_multiprocessors():
    """Of an H200: 256 of the 264 thread blocks that run together, 128 of 132 for many rows."""
    assert shim.layout_schedule(16, 8192, 8192, 132)["parts"] == 2
    assert shim.layout_schedule(32, 8192, 8192, 132)["parts"] == 2
    assert shim.layout_schedule(16, 4096, 4096, 132)["parts"] == 2
    assert shim.layout_schedule(16, 28672, 8192, 132)["parts"] == 1
    assert shim.layout_schedule(16, 64, 64, 132)["parts"] == 1


@pytest.mark.parametrize(("count", "rows", "fills"), [
    (16, 8192, True), (16, 28672, True), (16, 4096, False), (16, 64, False), (32, 8192, True),
])  # fmt: skip
def test_launches_that_leave_places_free_do_not_overlap(count, rows, fills):
    assert shim.layout_schedule(count, rows, 8192, 132)["fills"] == fills
