"""The product with a weight in panel order: the bits of the canonical one; when panels exist."""

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from pyrobust import _native
from pyrobust.nn import PackedLinear
from pyrobust.ops import packed_linear, set_panel_copies
from pyrobust.quantize import QTensor, SparseRemainder, round_to_nearest

from ..packed_products import BATCHES

if "avx512" not in _native.supported_isas():
    pytest.skip("no instruction set of this machine takes panels", allow_module_level=True)

ROWS = (*BATCHES, 6, 7, 9)
FORMATS = [(bits, True) for bits in (1, 1.58, 2, 3, 4, 8)]
FORMATS += [(bits, False) for bits in (2, 3, 4, 8)]
# Tails of every kind: rows of a panel, columns of a block, of a decoded span, of the last group.
# Groups that end within a block of 64, in an odd number too.
SHAPES = [(37, 200, 64), (5, 64, 64), (70, 384, 128), (33, 320, 1000), (100, 1300, 1300)]
SHAPES += [(37, 200, 32), (40, 161, 32), (33, 1344, 96)]
# Groups that are filled up with zeros, to one half block and more, and to several spans.
SHAPES += [(37, 200, 48), (40, 161, 20), (33, 1344, 100), (5, 1700, 640 - 1), (3, 4200, 1361)]
# Groups that share quads of 16 columns: four of them, two and one, whole and filled up.
SHAPES += [(37, 650, 4), (33, 131, 1), (40, 161, 8), (5, 133, 7), (70, 161, 16), (34, 550, 11)]
ACTIVATIONS = [
    ("int8", torch.float32),
    ("int8", torch.bfloat16),
    (None, torch.bfloat16),
    (None, torch.float32),
    (None, torch.float16),
]


@pytest.fixture(autouse=True)
def avx512():
    """AVX-512 whatever the suite runs on, and the default rules for panels afterwards."""
    isa, panels = _native.isa(), _native.set_panels(2, 1 << 17)
    _native.set_isa("avx512")
    yield
    _native.set_isa(isa)
    _native.set_panels(*panels)


def _product(q: QTensor, x: torch.Tensor, activations: str | None) -> torch.Tensor:
    bias = torch.arange(q.shape[0], dtype=torch.float32)
    return packed_linear(
        x, q.codes, q.scale, q.zero, bias, in_features=q.shape[1], bits=q.bits,
        group_size=q.group_size, activations=activations, extras=q.extras,
    )  # fmt: skip


def _from_both(q: QTensor, x: torch.Tensor, activations: str | None):
    """The product with the canonical layout, and with panels made for it."""
    _native.set_panels(0, 0)
    canonical = _product(q, x, activations)
    _native.set_panels(1, 0)
    panels = _product(q, x, activations)
    assert _native.panel_memory() > 0
    return canonical, panels


def _inputs(rows: int, cols: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(rows, cols, generator=generator)
    x[:1, : cols // 2] *= 50
    if rows > 0:
        x[-1, 0] = 0.5 * x[-1].abs().max()  # a quotient in the middle of two integers
    return x.to(dtype)


@pytest.mark.parametrize(("activations", "dtype"), ACTIVATIONS)
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_same_bits(bits, symmetric, activations, dtype):
    generator = torch.Generator().manual_seed(0)
    for rows, cols, group_size in SHAPES:
        weight = torch.randn(rows, cols, generator=generator)
        q = round_to_nearest(weight, bits=bits, group_size=group_size, symmetric=symmetric)
        for count in ROWS:
            x = _inputs(count, cols, dtype, generator)
            canonical, panels = _from_both(q, x, activations)
            assert torch.equal(canonical, panels), (rows, cols, group_size, count)
            if activations == "int8":
                _native.set_isa("portable")
                assert torch.equal(_product(q, x, activations), panels)
                _native.set_isa("avx512")


@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 8])
def test_no_byte_behind_the_codes_is_read(last_bytes, bits):
    generator = torch.Generator().manual_seed(0)
    for rows, cols, group_size in [*SHAPES, (9, 45, 16), (32, 45, 16), (9, 30, 8), (9, 45, 48)]:
        weight = torch.randn(rows, cols, generator=generator)
        q = round_to_nearest(weight, bits=bits, group_size=group_size)
        fenced = replace(q, codes=last_bytes(q.codes))
        x = _inputs(1, cols, torch.bfloat16, generator)
        for activations in ("int8", None):
            for found in _from_both(fenced, x, activations):
                assert torch.equal(found, _product(q, x, activations))


@pytest.mark.parametrize(("activations", "dtype"), ACTIVATIONS[1:3])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("zero", [False, True])
def test_long_groups_of_largest_sums(bits, zero, activations, dtype):
    """Codes of half the rows of a panel count 2^bits times: the sums come near 2^31."""
    cols, largest = 65536, 2**bits - 1
    codes = torch.full((32, cols), 0 if zero else largest, dtype=torch.uint8)
    scale, zeros = torch.ones(32, 1), torch.full((32, 1), largest * zero, dtype=torch.uint8)
    q = QTensor.from_codes(codes, scale, zeros, bits=bits, group_size=cols)
    for count in (1, 3, 8):
        canonical, panels = _from_both(q, torch.ones(count, cols, dtype=dtype), activations)
        assert torch.equal(canonical, panels)
        expected = cols * (-largest if zero else largest) + torch.arange(32.0)
        torch.testing.assert_close(panels.float(), expected.expand_as(panels), rtol=8e-3, atol=0)


@pytest.mark.parametrize("activations", ["int8", None])
@pytest.mark.parametrize("kind", ["codebook", "two_level", "remainder"])
def test_same_bits_with_extras(kind, activations):
    generator = torch.Generator().manual_seed(1)
    layer = _extended(kind, torch.randn(70, 384, generator=generator))
    for count in (1, 3, 16):
        x = _inputs(count, 384, torch.bfloat16, generator)
        canonical, panels = _from_both(layer, x, activations)
        assert torch.equal(canonical, panels)


def _extended(kind: str, weight: torch.Tensor) -> QTensor:
    q = round_to_nearest(weight, bits=4, group_size=128, symmetric=True)
    if kind == "codebook":
        return replace(q, codebook=torch.arange(0, 256, 17, dtype=torch.uint8))
    if kind == "two_level":
        integers = torch.arange(q.scale.numel()).reshape(q.scale.shape) % 30 + 1
        row_scale = (0.01 + torch.arange(weight.shape[0])).half().float()
        return replace(q, scale=integers.to(torch.uint8), row_scale=row_scale)
    offsets = torch.arange(weight.shape[0] + 1, dtype=torch.int64)
    columns = torch.arange(weight.shape[0], dtype=torch.int32) * 5
    return replace(
        q, remainder=SparseRemainder(torch.full((len(columns),), 64.0), columns, offsets)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite(value):
    q = round_to_nearest(torch.randn(40, 128), bits=4, group_size=64)
    x = torch.randn(3, 128)
    x[1, 5] = value
    canonical, panels = _from_both(q, x, "int8")
    assert panels[1].isnan().all()
    assert torch.equal(canonical[[0, 2]], panels[[0, 2]])


def test_made_at_the_second_product_and_freed():
    layer = PackedLinear.from_linear(
        torch.nn.Linear(512, 512), bits=4, group_size=128, symmetric=True, activations="int8"
    )
    gc.collect()
    before, x = _native.panel_memory(), torch.randn(2, 512)
    first = layer(x)
    assert _native.panel_memory() == before
    second = layer(x)
    # 4 bits a weight and its scales, of 16 bits
    assert _native.panel_memory() - before == 512 * 512 // 2 + 512 * 4 * 2
    assert torch.equal(first, second)
    assert torch.equal(second, layer(x))
    del layer
    gc.collect()
    assert _native.panel_memory() == before


@pytest.mark.parametrize("part", ["codes", "scale"])
def test_changes_in_place_are_seen(part):
    q = round_to_nearest(torch.randn(64, 256), bits=4, group_size=64)
    x = torch.randn(2, 256)
    _native.set_panels(1, 0)
    _product(q, x, "int8")
    getattr(q, part).copy_(getattr(q, part).flip(0))
    panels = _product(q, x, "int8")
    _native.set_panels(0, 0)
    assert torch.equal(panels, _product(q, x, "int8"))


def test_small_weights_and_inference_tensors_have_none():
    before = _native.panel_memory()
    small = round_to_nearest(torch.randn(64, 64), bits=4, group_size=64)
    with torch.inference_mode():
        large = round_to_nearest(torch.randn(512, 512), bits=4, group_size=64)
    for q in (small, large):
        results = [_product(q, torch.ones(1, q.shape[1]), "int8") for _ in range(3)]
        assert torch.equal(results[0], results[2])
    assert _native.panel_memory() == before


def test_other_instruction_sets_pass_over_panels():
    q = round_to_nearest(torch.randn(64, 256), bits=4, group_size=64)
    x = torch.randn(3, 256)
    _native.set_panels(1, 0)
    wide = _product(q, x, "int8")
    for isa in _native.supported_isas():
        _native.set_isa(isa)
        assert torch.equal(wide, _product(q, x, "int8"))


def test_some_rows_of_the_weight():
    q = round_to_nearest(torch.randn(200, 256), bits=4, group_size=64)
    x = torch.randn(9, 256)
    _native.set_panels(1, 0)
    whole = _product(q, x, "int8") - torch.arange(200.0)
    for first, stop in ((0, 7), (5, 64), (31, 33), (64, 200), (199, 200)):
        out = torch.empty(9, stop - first)
        _native.packed_linear(
            x, q.codes, q.scale, q.zero, None, out, 256, 16, 64, 1, True, None, first, 2
        )
        torch.testing.assert_close(out, whole[:, first:stop], rtol=1e-5, atol=1e-4)


def test_made_once_where_many_threads_ask_at_once():
    q = round_to_nearest(torch.randn(512, 512), bits=4, group_size=128, symmetric=True)
    x, before = torch.randn(3, 512), _native.panel_memory()
    expected = _product(q, x, "int8")
    held = []

    def work():
        for _ in range(20):
            assert torch.equal(_product(q, x, "int8"), expected)
            held.append(_native.panel_memory() - before)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work) for _ in range(8)]:
            done.result()
    assert set(held) == {512 * 512 // 2 + 512 * 4 * 2}


@pytest.mark.parametrize("bits", [1, 1.58, 3, 8])
def test_threads_that_share_the_making_write_the_same_bytes(bits):
    q = round_to_nearest(torch.randn(4099, 640), bits=bits, group_size=128)
    x, threads, results = torch.randn(2, 640), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = replace(q, codes=q.codes.clone())
            results.append(_from_both(again, x, "int8"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(product, results[0][0]) for pair in results for product in pair)


def test_copies_can_be_freed_and_refused():
    q = round_to_nearest(torch.randn(512, 512), bits=4, group_size=64)
    x = torch.randn(2, 512)
    gc.collect()
    before = _native.panel_memory()
    results = [_product(q, x, "int8") for _ in range(3)]
    assert _native.panel_memory() > before
    assert set_panel_copies(False)
    assert _native.panel_memory() == 0
    results += [_product(q, x, "int8") for _ in range(3)]
    assert _native.panel_memory() == 0
    assert not set_panel_copies(True)
    results += [_product(q, x, "int8") for _ in range(2)]
    assert _native.panel_memory() > 0
    assert all(torch.equal(result, results[0]) for result in results)
    with pytest.raises(TypeError, match=r"set_panel_copies: allowed must be a .*bool; got int"):
        set_panel_copies(0)
