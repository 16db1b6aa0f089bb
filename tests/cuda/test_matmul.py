"""The packed product on a real GPU: against the CPU, in graphs, compiled, and at large sizes."""

import pytest
import torch

from pyrobust import ops
from pyrobust.nn import PackedConv2d, PackedEmbedding, PackedLinear
from pyrobust.ops import _cuda_module

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: CUDA kernels not run"),
    pytest.mark.skipif(
        not _cuda_module.has_cuda_module(), reason="pyrobust._cuda IS NOT BUILT: nothing run"
    ),
]
EVERY_WIDTH = pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 8])
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def layer(rows, cols, bits, group_size=128, group_dim=1, **options):
    return PackedLinear(
        cols, rows, bits=bits, group_size=group_size, group_dim=group_dim, **options
    )


@EVERY_WIDTH
@pytest.mark.parametrize("dtype", ROUNDING, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("group", [(32, 1), (128, 1), (100_000, 1), (64, 0)])
def test_products_are_within_their_bound(bits, dtype, group):
    module = layer(1000, 1096, bits, *group)
    for count in (1, 8, 16, 64, 128, 200, 300):
        check_product(module, torch.randn(count, 1096).to(dtype), dtype)


def check_product(module, x, dtype):
    module = module.cpu()
    weight, bias = module.dequantize().double(), module.bias.double()
    exact = x.double() @ weight.T + bias
    size = x.double().abs() @ weight.abs().T + bias.abs()
    found = module.cuda()(x.cuda()).cpu().double()
    allowed = size * ((1096 + 64) * 2.0**-22 + 3 * ROUNDING[dtype])
    assert ((found - exact).abs() <= allowed + 2 * ROUNDING[dtype] * exact.abs()).all()


@EVERY_WIDTH
def test_integers_are_the_cpus_bit_for_bit(bits):
    module = layer(520, 777, bits, 96, activations="int8")
    x = torch.randn(9, 777)
    assert torch.equal(module.cuda()(x.cuda()).cpu(), module.cpu()(x))
    weight = module.dequantize()
    assert torch.equal(module.cuda().dequantize().cpu(), weight)


def test_complex_sums_are_the_cpus():
    codes = ops.pack_codes(torch.randint(0, 4, (900, 1234), dtype=torch.uint8), bits=2)
    x = [torch.randint(-128, 128, (21, 1234), dtype=torch.int8) for _ in range(2)]
    expected = ops.complex_2bit_sums(*x, codes, in_features=1234)
    found = ops.complex_2bit_sums(*(v.cuda() for v in x), codes.cuda(), in_features=1234)
    assert torch.equal(found.cpu(), expected)


def test_rows_are_independent_of_the_batch_and_runs_agree():
    module, x = layer(4096, 4096, 4).cuda(), torch.randn(64, 4096, device="cuda").half()
    whole = module(x)
    for most, counts in ((16, (1, 8, 9)), (32, (17, 20)), (64, (33, 40))):
        together = module(x[:most])
        for count in counts:
            assert torch.equal(module(x[:count]), together[:count])
    for _ in range(20):
        assert torch.equal(module(x), whole)


def test_graphs_and_other_streams():
    module, x = layer(2048, 2048, 3).cuda(), torch.randn(4, 2048, device="cuda").half()
    with torch.no_grad():
        expected = module(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(x)
        for _ in range(3):
            out.zero_()
            graph.replay()
            assert torch.equal(out, expected)
        with torch.cuda.stream(torch.cuda.Stream()):
            again = layer_like(module)(x)
        torch.cuda.synchronize()
        assert torch.equal(again, expected)


def layer_like(module):
    """The same weight in tensors of its own, so that it is repacked."""
    copy = PackedLinear(2048, 2048, bits=3).cuda()
    copy.load_state_dict(module.state_dict())
    return copy


def test_compiled_layers_agree():
    module, x = layer(512, 640, 4).cuda(), torch.randn(3, 640, device="cuda").bfloat16()
    with torch.no_grad():
        assert torch.equal(torch.compile(module, fullgraph=True)(x), module(x))


def test_gradients_reach_the_input():
    module = layer(96, 128, 4)
    x = torch.randn(5, 128, requires_grad=True)
    module(x).square().sum().backward()
    on_gpu = x.detach().cuda().requires_grad_()
    module.cuda()(on_gpu).square().sum().backward()
    torch.testing.assert_close(on_gpu.grad.cpu(), x.grad, rtol=1e-3, atol=1e-3)


def test_convolutions_and_tables():
    conv, x = PackedConv2d(6, 8, 3, padding=1, groups=2, bits=4), torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(conv.cuda()(x.cuda()).cpu(), conv.cpu()(x), rtol=1e-3, atol=1e-3)
    table, at = PackedEmbedding(100, 70, bits=3), torch.tensor([[0, 99], [7, 7]])
    expected = table(at)
    assert torch.equal(table.cuda()(at.cuda()).cpu(), expected)


def test_parts_on_another_device_are_refused():
    with pytest.raises(ValueError, match="device"):
        layer(64, 64, 4).cuda()(torch.randn(1, 64))


@pytest.mark.slow
def test_more_than_two_to_the_31_weights():
    """47,000 x 47,000 is above 2^31; codes come from a few rows, so that the CPU can check them."""
    size = 47_104
    codes = torch.randint(0, 256, (64, size // 2), dtype=torch.uint8)
    everywhere = codes.repeat(size // 64, 1).cuda()
    scale = torch.full((size, 1), 0.01, device="cuda", dtype=torch.float16)
    form = {"in_features": size, "bits": 4, "group_size": size}
    x = torch.randn(3, size).half()
    found = ops.packed_linear(x.cuda(), everywhere, scale, **form).cpu().view(3, -1, 64)
    assert (found == found[:, :1]).all()
    expected = ops.packed_linear(x, codes, scale[:64].cpu(), **form)
    torch.testing.assert_close(found[:, 0], expected, rtol=4e-3, atol=4e-2)
