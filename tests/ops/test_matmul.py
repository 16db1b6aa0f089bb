"""packed_linear against float64 on the exact weight, and as a torch operator."""

import pytest
import torch

from pyrobust.ops import packed_linear
from pyrobust.quantize import BITS, QTensor, round_to_nearest

from ..packed_products import assert_within_bound, multiply


def pack(rows, cols, bits=4, group_size=16, group_dim=1, **options) -> QTensor:
    return round_to_nearest(
        torch.randn(rows, cols), bits=bits, group_size=group_size, group_dim=group_dim, **options
    )


def options_of(packed: QTensor) -> dict:
    return {
        "in_features": packed.shape[1],
        "bits": packed.bits,
        "group_size": packed.group_size,
        "group_dim": packed.group_dim,
    }


def operator_arguments(x, packed: QTensor, bias=None, int8=False):
    return (x, packed.codes, packed.scale, packed.zero, bias, *options_of(packed).values(), int8)


def assert_exact_mode(x, packed: QTensor, bias=None):
    result = multiply(x, packed, bias)
    assert result.dtype == x.dtype
    assert result.shape == (*x.shape[:-1], packed.shape[0])
    assert_within_bound(result, x, packed, bias)


def int8_reference(x: torch.Tensor, packed: QTensor) -> torch.Tensor:
    """The product with the rounded activations, in float64 on exact operands."""
    x = x.double()
    step = x.abs().amax(-1, keepdim=True) / 127
    q = torch.where(step > 0, x / step, 0.0).round()
    return (q @ packed.dequantize(torch.float64).t()) * step


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_product_is_within_the_stated_bound(isa, bits, group_dim, dtype, rows):
    packed = pack(13, 150, bits, 32, group_dim)
    x = torch.randn(rows, 150).to(dtype)
    assert_exact_mode(x, packed)
    assert_exact_mode(x, packed, torch.randn(13))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_dim", [0, 1])
def test_int8_product_is_that_of_the_rounded_rows(isa, bits, group_dim):
    packed, x = pack(13, 150, bits, 32, group_dim), torch.randn(5, 150)
    result, expected = multiply(x, packed, activations="int8"), int8_reference(x, packed)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-12)


def test_batch_shapes_strides_and_conjugates():
    packed, x = pack(6, 20), torch.randn(4, 3, 20)
    expected = multiply(x, packed)
    assert torch.equal(multiply(x.transpose(0, 1), packed), expected.transpose(0, 1))
    assert torch.equal(multiply(x[:1].expand(4, 3, 20), packed), expected[:1].expand(4, 3, 6))
    assert torch.equal(multiply(x[0, 0], packed), expected[0, 0])
    doubled = torch.randn(4, 40)
    assert torch.equal(multiply(doubled[:, ::2], packed), multiply(doubled[:, ::2].clone(), packed))
    complex_x = torch.complex(torch.randn(4, 20), torch.randn(4, 20))
    negated = complex_x.conj().imag
    assert negated.is_neg()
    with torch.inference_mode():
        assert torch.equal(multiply(negated, packed), multiply(negated.clone(), packed))
    assert torch.equal(multiply(negated, packed), multiply(negated.clone(), packed))
    assert multiply(torch.randn(2, 0, 20), packed).shape == (2, 0, 6)


def test_fast_path_and_operator_give_the_same_bits():
    packed, x = pack(6, 20), torch.randn(4, 20)
    with torch.no_grad():
        fast = multiply(x, packed)
    assert torch.equal(fast, torch.ops.pyrobust.packed_linear(*operator_arguments(x, packed)))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dense_layer(bits, group_dim, dtype):
    packed = pack(300, 24, bits, 16, group_dim)
    x = torch.randn(2, 5, 24).to(dtype).requires_grad_()
    bias = torch.randn(300).requires_grad_()
    grad = torch.randn(2, 5, 300).to(dtype)
    gradients = torch.autograd.grad(multiply(x, packed, bias), (x, bias), grad)
    weight = packed.dequantize(torch.float64)
    expected = grad.double() @ weight
    allowance = 1e-6 * (grad.double().abs() @ weight.abs())
    allowance = allowance + expected.abs() * torch.finfo(dtype).eps
    assert ((gradients[0].double() - expected).abs() <= allowance).all()
    torch.testing.assert_close(gradients[1], grad.float().sum((0, 1)))


def test_second_derivative_goes_through_the_packed_weight():
    packed = pack(9, 12)
    x = torch.randn(3, 12, requires_grad=True)
    (first,) = torch.autograd.grad(multiply(x, packed).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    weight = packed.dequantize()
    torch.testing.assert_close(second, (2 * weight.t() @ weight).sum(0).expand(3, 12))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("bits", [1.58, 3, 4])
def test_opcheck(bits, int8):
    packed = pack(6, 20, bits)
    x, bias = torch.randn(3, 20, requires_grad=True), torch.randn(6, requires_grad=True)
    arguments = operator_arguments(x, packed, bias, int8)
    torch.library.opcheck(torch.ops.pyrobust.packed_linear.default, arguments)
    grad = torch.randn(3, 6, requires_grad=True)
    transposed = (grad, *arguments[1:4], *arguments[5:9])
    torch.library.opcheck(torch.ops.pyrobust.packed_linear_transpose.default, transposed)
    torch.library.opcheck(torch.ops.pyrobust.dequantize_codes.default, transposed[1:])


class Layer(torch.nn.Module):
    def __init__(self, packed: QTensor, activations=None):
        super().__init__()
        self.packed, self.activations = packed, activations

    def forward(self, x):
        return multiply(x, self.packed, activations=self.activations).relu()


def test_compile_full_graph_forward_and_backward():
    layer = Layer(pack(6, 20))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 20, requires_grad=True)
    y = compiled(x)
    assert torch.equal(y, layer(x))
    (grad,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(grad, expected)


def test_export_with_dynamic_batch():
    layer = Layer(pack(6, 20), "int8")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (torch.randn(3, 20),), dynamic_shapes=({0: batch},))
    x = torch.randn(7, 20)
    assert torch.equal(program.module()(x), layer(x))
    assert any("packed_linear" in str(node.target) for node in program.graph.nodes)


@pytest.mark.filterwarnings("error")
def test_vmap_over_the_input_and_over_the_weight():
    packed, x = pack(6, 20), torch.randn(4, 20, 3)
    mapped = torch.vmap(lambda row: multiply(row, packed), in_dims=2, out_dims=0)(x)
    assert torch.equal(mapped, multiply(x.movedim(2, 0), packed))
    stacked = torch.stack([packed.codes, packed.codes.flip(0)])
    pair = torch.vmap(
        lambda codes: packed_linear(
            x[..., 0], codes, packed.scale, packed.zero, **options_of(packed)
        )
    )(stacked)
    assert torch.equal(pair[0], multiply(x[..., 0], packed))


@pytest.mark.parametrize("inference", [False, True])
def test_forward_mode_raises(inference):
    packed, x = pack(6, 20), torch.randn(4, 20)
    with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(not inference):
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            multiply(dual, packed)


def test_meta_and_fake_tensors():
    packed = pack(6, 20)
    x = torch.randn(3, 20, device="meta")
    parts = (packed.codes.to("meta"), packed.scale.to("meta"), packed.zero.to("meta"))
    assert packed_linear(x, *parts, **options_of(packed)).shape == (3, 6)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (packed.codes, packed.scale, packed.zero)]
        y = packed_linear(torch.randn(3, 20), *fake, **options_of(packed))
    assert y.shape == (3, 6)


class Tagged(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return ("seen", func)


def test_other_tensor_types_are_asked_first():
    packed = pack(6, 20)
    assert multiply(torch.randn(3, 20).as_subclass(Tagged), packed) == ("seen", packed_linear)


@pytest.mark.parametrize("group_dim", [0, 1])
def test_nan_and_infinity(isa, group_dim):
    packed, x = pack(6, 20, group_dim=group_dim), torch.randn(4, 20)
    clean = multiply(x, packed, activations="int8")
    x[1, 3], x[2, 5] = torch.nan, -torch.inf
    exact, int8 = multiply(x, packed), multiply(x, packed, activations="int8")
    dense = x @ packed.dequantize().t()
    assert torch.equal(exact.isnan(), dense.isnan())
    assert torch.equal(exact.isposinf(), dense.isposinf())
    assert int8[1:3].isnan().all()
    assert torch.equal(int8[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(3, 21)}, ValueError, "x must have in_features = 20 values"),
        (
            {"x": torch.zeros(3, 20, dtype=torch.float8_e5m2)},
            TypeError,
            "x must be float32, float16, bfloat16 or float64",
        ),
        ({"x": torch.ones(3, 20, dtype=torch.int32)}, TypeError, "floating-point"),
        ({"bits": 5}, ValueError, "bits must be one of 1, 1.58, 2, 3, 4, 8; got 5"),
        ({"group_size": 0}, ValueError, "group_size must be at least 1"),
        ({"group_dim": 2}, ValueError, "group_dim must be one of 0, 1"),
        ({"activations": "int4"}, ValueError, "activations must be one of None, int8; got 'int4'"),
        ({"scale": torch.ones(6, 9)}, ValueError, r"scale must have shape \(6, 2\)"),
        ({"zero": torch.ones(6, 9, dtype=torch.uint8)}, ValueError, "zero must have shape"),
        ({"codes": torch.zeros(6, 9, dtype=torch.uint8)}, ValueError, "codes must have shape"),
        ({"bias": torch.randn(5)}, ValueError, r"bias must have shape \(6\)"),
    ],
)
def test_bad_input_gives_one_clear_error(change, error, message, grad):
    packed = pack(6, 20)
    arguments = {
        "x": torch.randn(3, 20),
        "codes": packed.codes,
        "scale": packed.scale,
        "zero": packed.zero,
        **options_of(packed),
    }
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        packed_linear(**{**arguments, **change})
