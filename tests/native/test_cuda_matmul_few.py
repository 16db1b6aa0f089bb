"""The kernel of few rows (cuda_few.cuh) on the CPU: signals, bulk copies, sums that meet."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_cuda_matmul import HALVES, check, draw, emulated, gpu, shim

__all__ = ["emulated"]  # the fixture that every test uses

ORDERS = pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
WIDTHS = pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 8])


def parts_of(bits):
    return ("zero",) if bits not in (1, 1.58) else ()


@WIDTHS
@ORDERS
@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("group_size", [128, 10_000], ids=lambda g: f"group{g}")
def test_every_width(bits, descending, dtype, group_size, emulated):
    """Strips past the end, an odd number of blocks, two thread blocks a tile."""
    shim.set_options(descending=descending)
    emulated(16)
    drawn = draw(200, 4000, bits, group_size, 1, parts_of(bits))
    check(drawn, torch.randn(13, 4000).to(dtype), torch.randn(200))
    check(drawn, torch.randn(1, 4000).to(dtype))


@WIDTHS
@ORDERS
def test_copies_that_land_at_once_change_nothing(bits, descending, emulated):
    emulated(16)
    drawn, x = draw(130, 1000, bits, 128, 1, parts_of(bits)), torch.randn(16, 1000).half()
    expected = gpu.linear(drawn.device, x, None)
    shim.set_options(descending=descending, copies_land_at_once=True)
    assert torch.equal(gpu.linear(drawn.device, x, None), expected)


@pytest.mark.parametrize("parts", ["remainder", "two_level", "remainder+two_level"])
def test_optional_parts(parts, emulated):
    emulated(16)
    drawn = draw(70, 650, 3, 128, 1, parts.split("+"))
    for dtype in HALVES:
        check(drawn, torch.randn(4, 650).to(dtype), torch.randn(70))


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (257, 9), (64, 64), (63, 129), (513, 1090)])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 15, 16])
def test_sizes_that_do_not_divide(shape, count):
    drawn = draw(*shape, 4, 256, 1, ("zero",))
    check(drawn, torch.randn(count, shape[1]).half())


@pytest.mark.parametrize("scale_type", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_every_type(scale_type):
    scale = (torch.randint(1, 64, (70, 3)) / 64).to(scale_type)
    check(draw(70, 300, 4, 128, 1, ("zero",), scale), torch.randn(3, 300).half())


def test_a_row_does_not_depend_on_the_batch_or_on_chance(emulated):
    emulated(16)
    drawn = draw(300, 2500, 3, 128, 1, ("zero",))
    x = torch.randn(16, 2500).half()
    whole = gpu.linear(drawn.device, x, None)
    for count in (1, 8, 13):
        assert torch.equal(gpu.linear(drawn.device, x[:count], None), whole[:count])
    shim.set_options(descending=True)
    assert torch.equal(gpu.linear(drawn.device, x, None), whole)


def faulty(fault, drawn, x):
    native, out = drawn.device.fused_for(torch.bfloat16).native, torch.zeros(16, 64).bfloat16()
    shim.few_4_faulty(native, x.data_ptr(), 16, out.data_ptr(), fault)
    return out


def test_planted_faults_show(emulated):
    """No wait for copies, none for readers, none for the other thread block's sums."""
    emulated(16)
    drawn, x = draw(64, 8192, 4, 128), torch.randn(16, 8192).bfloat16()
    expected = check(drawn, x)
    assert torch.equal(faulty(0, drawn, x), expected)
    with pytest.raises(RuntimeError, match="a phase of a signal ended that nobody waited for"):
        faulty(1, drawn, x)
    assert not torch.equal(faulty(3, drawn, x), expected)
    found = []
    for descending in (False, True):
        shim.set_options(descending=descending, copies_land_at_once=True)
        assert torch.equal(faulty(0, drawn, x), expected)
        found.append(torch.equal(faulty(2, drawn, x), expected))
    assert not all(found)
