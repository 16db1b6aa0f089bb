"""Groups along the outputs (``group_dim=0``) with 8-bit activations, from panels: same bits."""

from dataclasses import replace

import pytest
import torch

from pyrobust import _native
from pyrobust.quantize import BITS, QTensor

from ..packed_products import LEVELS, multiply, random_weight

if "avx512" not in _native.supported_isas():
    pytest.skip("no instruction set of this machine takes panels", allow_module_level=True)

# Rows of x: digits of 8 of them, or of fewer, are a tile.
ROWS = (1, 2, 3, 5, 7, 8, 9, 17)
# Groups that are whole panels, begin within one, end with the weight; tails of columns.
SHAPES = [(70, 200, 32), (130, 77, 50), (100, 384, 64), (33, 130, 1000), (32, 64, 32)]


@pytest.fixture(autouse=True)
def avx512():
    """AVX-512 with panels from the first product on."""
    isa, panels = _native.isa(), _native.set_panels(1, 0)
    _native.set_isa("avx512")
    yield
    _native.set_isa(isa)
    _native.set_panels(*panels)


def with_scales(packed: QTensor, scale: torch.Tensor) -> QTensor:
    return replace(packed, scale=scale, codes=packed.codes.clone())


def check(packed: QTensor, *, panels: bool = True, dtype=torch.float32) -> None:
    """Products from panels, which exist or not, and those of the reference."""
    x = torch.randn(max(ROWS), packed.shape[1]).to(dtype)
    x[0, :5] *= 40
    bias = torch.randn(packed.shape[0])
    before = _native.panel_memory()
    results = [multiply(x[:rows], packed, bias, activations="int8") for rows in ROWS]
    assert (_native.panel_memory() > before) == panels
    _native.set_isa("portable")
    expected = multiply(x, packed, bias, activations="int8")
    _native.set_isa("avx512")
    for rows, result in zip(ROWS, results, strict=True):
        assert torch.equal(result, expected[:rows])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits(bits, symmetric, dtype):
    for shape in SHAPES:
        check(random_weight(*shape[:2], bits, shape[2], 0, symmetric=symmetric), dtype=dtype)


@pytest.mark.parametrize("digits", [1, 2, 3, 4])
def test_scales_of_every_spread(digits):
    """Integers of one to four digits: 127 times a scale over the last place of the smallest."""
    packed = random_weight(70, 200, 4, 32, 0)
    if digits <= 2:  # integer scales, whose last place is 1
        scale = torch.randint(0, 2 if digits == 1 else 30, packed.scale.shape, dtype=torch.uint8)
        check(replace(packed, scale=scale, row_scale=torch.rand(70).half().float()))
        return
    scale = torch.rand(packed.scale.shape).half() + 1.0
    if digits == 4:
        scale[0, 0], scale[0, 1] = 2.0**-8, 63.9
    check(with_scales(packed, scale))
    check(with_scales(packed, -scale))


@pytest.mark.parametrize("scale_type", [torch.float16, torch.bfloat16, torch.float32])
def test_types_of_scales_and_scales_of_zero(scale_type):
    packed = random_weight(70, 200, 3, 32, 0)
    scale = packed.scale.bfloat16().to(scale_type)
    scale[1] = 0.0
    scale[:, 7] = 0.0
    check(with_scales(packed, scale))


def test_scales_that_integers_do_not_hold():
    """Scales that are 2^39 apart: double sums, and no panels."""
    packed = random_weight(40, 100, 4, 32, 0)
    scale = packed.scale.clone()
    scale[1, 3], scale[1, 4] = 6e-8, 30000.0
    check(with_scales(packed, scale), panels=False)


def test_groups_of_few_rows_have_no_panels():
    check(random_weight(40, 100, 4, 8, 0), panels=False)


@pytest.mark.parametrize("kind", ["codebook", "two_level", "remainder", "all"])
@pytest.mark.parametrize("bits", [1.58, 4])
def test_parts_of_a_weight(kind, bits):
    packed = random_weight(70, 200, bits, 32, 0)
    options = {"codebook": None, "row_scale": None}
    if kind in ("codebook", "all"):
        book = torch.randint(0, 256, (LEVELS[bits],), dtype=torch.uint8)
        book[-1] = 128
        options["codebook"] = book
    scale = packed.scale
    if kind in ("two_level", "all"):
        scale = torch.randint(0, 3, scale.shape, dtype=torch.uint8)
        options["row_scale"] = torch.rand(70).half().float() / 8
    packed = QTensor.from_codes(
        packed.unpack_codes(), scale, None, bits=bits, group_size=32, group_dim=0, **options
    )
    if kind in ("remainder", "all"):
        largest = packed.dequantize().abs().max()
        values = largest * (1 + torch.rand(70, 200)) * torch.randn(70, 200).sign()
        packed = packed.with_remainder(values, torch.rand(70, 200) < 0.04)
    check(packed)


def test_threads_and_rows_that_are_not_finite():
    packed, x = random_weight(515, 256, 4, 64, 0), torch.randn(9, 256)
    x[3, 5] = torch.nan
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(multiply(x, packed, activations="int8"))
    finally:
        torch.set_num_threads(before)
    assert results[0][3].isnan().all()
    assert results[0][[0, 8]].isfinite().all()
    for result in results[1:]:
        assert torch.equal(result.nan_to_num(), results[0].nan_to_num())
