"""What replaces the packed operators outside of pyrobust: the same weights, the same rounding."""

import io

import pytest
import torch
from torch import nn

import pyrobust
from pyrobust import nn as rnn
from pyrobust.ops import complex_2bit_matmul, complex_2bit_sums, decompositions
from pyrobust.ops._decompositions import unpacked
from pyrobust.ops.formats import levels_of
from pyrobust.quantize import QTensor, quantize_with_outliers

TABLE = decompositions()
FORMATS = [(bits, dim) for bits in (1, 1.58, 2, 3, 4, 8) for dim in (0, 1)]


def replaced(name):
    return TABLE[getattr(torch.ops.pyrobust, name).default]


def weights():
    """Every format, and every optional part, with sizes that divide nothing."""
    torch.manual_seed(0)
    w = torch.randn(11, 37)
    for bits, dim in FORMATS:
        form = {"bits": bits, "group_size": 8, "group_dim": dim}
        yield rnn.PackedLinear(37, 11, **form).qtensor
    yield rnn.PackedLinear(37, 11, bits=3, group_size=8, symmetric=True).qtensor
    codes = torch.randint(0, 16, (11, 37), dtype=torch.uint8)
    book = torch.randint(0, 256, (16,), dtype=torch.uint8)
    form = {"bits": 4, "group_size": 8}
    yield QTensor.from_codes(codes, torch.rand(11, 5), codebook=book, **form)
    scale = torch.randint(1, 30, (11, 5), dtype=torch.uint8)
    yield QTensor.from_codes(codes, scale, row_scale=torch.rand(11), **form)
    yield quantize_with_outliers(w, w.abs() > 1.5, bits=4, group_size=8)


def operands(q):
    return q.codes, q.scale, q.zero, q.shape[1], q.bits, q.group_size, q.group_dim, *q.extras


@pytest.mark.parametrize("q", list(weights()), ids=lambda q: f"{q.bits}-{q.group_dim}-{q.layout}")
def test_weights_are_equal_and_products_within_float32(q):
    decoded = replaced("dequantize_codes")(*operands(q))
    assert torch.equal(decoded, q.dequantize())
    rows = torch.tensor([[3, 10], [0, 3]])
    codes, scale, zero, *form = operands(q)
    table = replaced("packed_embedding")(
        rows, codes, scale, zero, *form[:4], torch.float32, *q.extras
    )
    assert torch.equal(table, q.dequantize()[rows])
    x, bias = torch.randn(2, 5, 37), torch.randn(11)
    magnitude = x.abs() @ q.dequantize().abs().t() + bias.abs()
    for int8 in (False, True):
        arguments = (x, codes, scale, zero, bias, *form[:4], int8, *q.extras)
        expected = torch.ops.pyrobust.packed_linear(*arguments)
        assert ((replaced("packed_linear")(*arguments) - expected).abs() <= 3e-6 * magnitude).all()


def test_rows_of_zeros_and_of_no_numbers_do_what_the_kernels_do():
    q = rnn.PackedLinear(37, 11, group_size=8).qtensor
    x = torch.randn(4, 37)
    x[0], x[1, 3], x[2, 4] = 0, torch.nan, torch.inf
    codes, scale, zero, *form = operands(q)
    arguments = (x, codes, scale, zero, None, *form[:4], True)
    expected = torch.ops.pyrobust.packed_linear(*arguments)
    close = torch.allclose(replaced("packed_linear")(*arguments), expected, 1e-5, equal_nan=True)
    assert close
    assert expected[1:3].isnan().all()
    assert not expected[0].any()


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize(
    "geometry",
    [
        {"stride": (2, 1), "padding": (1, 0), "groups": 2},
        {"padding": "same", "kernel_size": (2, 3), "dilation": (1, 2)},
    ],
)
def test_convolutions_agree(geometry, activations):
    options = {"kernel_size": 3, "group_size": 5, "activations": activations, **geometry}
    layer = rnn.PackedConv2d(4, 6, **options)
    x = torch.randn(2, 4, 9, 8)
    program = torch.export.export(layer, (x,)).run_decompositions(decompositions())
    assert not any("pyrobust" in str(node.target) for node in program.graph.nodes)
    assert torch.allclose(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activations", [None, "int8"])
def test_convolutions_of_lines_agree(activations):
    layer = rnn.PackedConv1d(4, 6, 3, 2, 1, 2, 2, group_size=5, activations=activations)
    x = torch.randn(2, 4, 19)
    program = torch.export.export(layer, (x,)).run_decompositions(decompositions())
    assert not any("pyrobust" in str(node.target) for node in program.graph.nodes)
    assert torch.allclose(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)


def test_complex_products_have_the_same_bits():
    layer = rnn.PackedComplexLinear(37, 11)
    a, b = (torch.randint(-127, 128, (3, 37), dtype=torch.int8) for _ in range(2))
    sums = replaced("complex_2bit_sums")(a, b, layer.codes, 37)
    assert torch.equal(sums, complex_2bit_sums(a, b, layer.codes, in_features=37))
    steps = torch.rand(3), torch.rand(3)
    found = replaced("complex_2bit_matmul")(a, b, layer.codes, layer.scale, *steps, 37)
    expected = complex_2bit_matmul(a, b, layer.codes, layer.scale, *steps, in_features=37)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_codes_of_every_value_are_read():
    for bits in (1, 1.58, 2, 3, 4, 8):
        codes = torch.randint(0, levels_of(bits), (7, 29), dtype=torch.uint8)
        packed = pyrobust.ops.pack_codes(codes, bits=bits)
        read = unpacked(packed, 29, bits)
        assert torch.equal(read, codes.float())


class Everything(nn.Module):
    """A layer of each kind behind the other."""

    def __init__(self):
        super().__init__()
        self.table = rnn.PackedEmbedding(30, 16, bits=3, group_size=8)
        self.conv = rnn.PackedConv2d(1, 4, 3, padding=1, bits=2, group_size=4)
        self.mix = rnn.PackedConv2d(4, 2, 3, padding=1, group_size=16, activations="int8")
        self.linear = rnn.PackedLinear(32, 24, bits=4, group_size=16)
        self.rounded = rnn.PackedLinear(24, 16, bits=1.58, group_size=24, activations="int8")
        self.complex = rnn.PackedComplexLinear(16, 8)
        self.exact = rnn.PackedComplexLinear(8, 4, activations=None, output="real")

    def forward(self, tokens):
        x = self.table(tokens)[:, None]
        x = self.mix(torch.relu(self.conv(x))).transpose(1, 2).flatten(2)
        x = self.rounded(torch.relu(self.linear(x)))
        return self.exact(*self.complex(x, -x))


def everything():
    torch.manual_seed(1)
    return Everything().eval(), torch.randint(0, 30, (3, 5))


class ReadsWeights(nn.Module):
    """As models of transformers do, to learn a dtype."""

    def __init__(self):
        super().__init__()
        self.layer = rnn.PackedLinear(8, 4, group_size=4)

    def forward(self, x):
        return self.layer(x.to(self.layer.weight.dtype))


def test_models_that_read_packed_weights_are_exported():
    model, x = ReadsWeights(), torch.randn(2, 8)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


def test_a_model_of_all_layers_is_exported_without_operators_of_its_own():
    model, tokens = everything()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (tokens,), dynamic_shapes=({0: batch},))
    plain = program.run_decompositions(decompositions())
    assert not any("pyrobust" in str(node.target) for node in plain.graph.nodes)
    more = torch.randint(0, 30, (7, 5))
    assert torch.allclose(plain.module()(more), model(more), rtol=1e-4, atol=1e-4)


def test_onnx_files_compute_what_the_model_does_within_its_bounds():
    pytest.importorskip("onnxscript")
    model, tokens = everything()
    bounded = rnn.PackedSequential(rnn.PackedLinear(40, 24, bits=3), nn.ReLU(), model.rounded)
    x = torch.randn(3, 40)
    options = {"dynamo": True, "verbose": False}
    assert torch.allclose(
        evaluate(torch.onnx.export(model, (tokens,), **options), tokens),
        model(tokens),
        rtol=1e-4,
        atol=1e-4,
    )
    batch = ({0: torch.export.Dim("n")},)
    program = torch.onnx.export(bounded.eval(), (x,), dynamic_shapes=batch, **options)
    more = torch.randn(5, 40)
    with torch.no_grad():
        box = bounded(pyrobust.Interval(more, more, rounding="deployed"))
    assert box.contains(evaluate(program, more)).all()


def test_onnx_files_hold_packed_codes(tmp_path):
    pytest.importorskip("onnxscript")
    model = nn.Sequential(rnn.PackedLinear(256, 256), rnn.PackedLinear(256, 256, group_dim=0))
    options = {"dynamo": True, "verbose": False}
    program = torch.onnx.export(model.eval(), (torch.randn(1, 256),), **options)
    program.save(tmp_path / "packed.onnx")
    packed = sum(layer.nbytes_packed for layer in model)
    assert (tmp_path / "packed.onnx").stat().st_size < 1.5 * packed + 20_000


def evaluate(program, x):
    """By onnxruntime where it is installed, else by the reference of the standard."""
    file = io.BytesIO()
    program.save(file)
    try:
        from onnxruntime import InferenceSession

        session = InferenceSession(file.getvalue())
    except ImportError:
        import onnx
        from onnx.reference import ReferenceEvaluator

        session = ReferenceEvaluator(onnx.load_from_string(file.getvalue()))
    name = program.model.graph.inputs[0].name
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])
