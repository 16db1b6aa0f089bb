"""How tensors reach the kernels: by DLPack's table where torch has it, by attributes before."""

import pytest
import torch

from pyrobust.ops import packed_linear
from pyrobust.quantize import round_to_nearest

TABLE = "__dlpack_c_exchange_api__"


@pytest.fixture(params=["table", "attributes"])
def exchange(request, monkeypatch):
    """Both ways; the second is what torch before 2.10 offers."""
    if request.param == "table" and not hasattr(torch.Tensor, TABLE):
        pytest.skip("this torch has no exchange table")
    if request.param == "attributes" and hasattr(torch.Tensor, TABLE):
        monkeypatch.delattr(torch.Tensor, TABLE)
        assert not hasattr(torch.zeros(1), TABLE)
    return request.param


def product(x, packed):
    return packed_linear(
        x,
        packed.codes,
        packed.scale,
        packed.zero,
        in_features=packed.shape[1],
        bits=packed.bits,
        group_size=packed.group_size,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_ways_read_the_same_values(exchange, dtype):
    packed = round_to_nearest(torch.randn(5, 12), bits=4, group_size=4)
    x = torch.randn(3, 24)[:, ::2].to(dtype)
    expected = x.double() @ packed.dequantize().double().T
    result = product(x, packed)
    assert result.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(result.double(), expected, rtol=tolerance, atol=tolerance)
    assert product(x[:0], packed).shape == (0, 5)


def test_both_ways_refuse_a_wrong_dtype(exchange):
    packed = round_to_nearest(torch.randn(5, 12), bits=4, group_size=4)
    with pytest.raises(TypeError):
        product(torch.zeros(2, 12, dtype=torch.int64), packed)
