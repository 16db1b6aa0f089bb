"""Cards whose thread blocks lack the shared memory of fused products (8.6, 8.9, 12.0)."""

import sys
from pathlib import Path

import pytest
import torch

from pyrobust.ops import _cuda_interval, _cuda_module
from pyrobust.ops import _cuda_interval_library as library
from pyrobust.ops._cuda_complex import complex_sums
from pyrobust.quantize import round_to_nearest

sys.path.insert(0, str(Path(__file__).parent))
from interval_images import boxes, exact_ends
from test_cuda_matmul import draw, emulated, gpu, shim

__all__ = ["emulated"]  # the fixture


@pytest.fixture(autouse=True)
def small(emulated, monkeypatch):
    for module in (_cuda_module, _cuda_interval, library, gpu):
        monkeypatch.setattr(module, "where", lambda _: (4, 0))
    assert not shim.large_blocks(4)
    assert shim.large_blocks(0)


def test_packed_products_are_multiplied_decoded():
    drawn, x = draw(40, 200, 4, 64), torch.randn(3, 200)
    result = gpu.linear(drawn.device, x.half(), None)
    assert drawn.device.fused[torch.float16] is None
    expected = x.half().double() @ drawn.packed.dequantize().double().T
    torch.testing.assert_close(result.double(), expected, rtol=1e-2, atol=1e-2)


def test_interval_products_go_to_the_library():
    lower, upper = boxes(2, 200)
    weight = torch.randn(5, 200)
    ends = _cuda_interval.linear(lower, upper, weight, None, "real")
    exact = exact_ends(lower, upper, weight)
    assert (ends[0].double() <= exact[0]).all()
    assert (exact[1] <= ends[1].double()).all()
    packed = round_to_nearest(torch.randn(8, 128), bits=4, group_size=128)
    assert not _cuda_interval.packed_fits(packed.codes, 128, 4, 128, 1, False)
    with pytest.raises(RuntimeError, match=r"less than the 163 KB .* got 0 terms"):
        _cuda_interval.linear(lower[:, :0], upper[:, :0], weight[:, :0], None, "real")


def test_complex_products_are_refused():
    x, codes = torch.zeros(1, 4, dtype=torch.int8), torch.zeros(2, 1, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="less than the 163 KB of shared memory"):
        complex_sums(x, x, codes, 4)
