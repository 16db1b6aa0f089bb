"""ONNX files come back as the networks they were made from."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyrobust
from pyrobust import Interval
from pyrobust.certify import bound, load_onnx

onnx = pytest.importorskip("onnx", reason="needs onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def write(path, nodes, constants, shape, rank=2, inputs=("x",), opset=17):
    """A small model written node by node, as exporters write them."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", *shape]) for n in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(v.detach().numpy(), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


def same(path, expected, x, atol=1e-6):
    model = load_onnx(path)
    torch.testing.assert_close(model(x), expected(x), rtol=1e-5, atol=atol)
    return model


def node(kind, inputs, outputs, **options):
    return helper.make_node(kind, inputs, outputs, **options)


def test_a_perceptron(tmp_path):
    w, b, v = torch.randn(6, 4), torch.randn(6), torch.randn(6, 3)
    nodes = [
        node("Gemm", ["x", "w", "b"], ["h"], transB=1),
        node("Relu", ["h"], ["r"]),
        node("MatMul", ["r", "v"], ["m"]),
        node("Add", ["m", "c"], ["y"]),
    ]
    constants = {"w": w, "b": b, "v": v, "c": torch.randn(3)}
    path = write(tmp_path / "a.onnx", nodes, constants, [4])
    expected = lambda x: F.relu(x @ w.T + b) @ v + constants["c"]  # noqa: E731
    model = same(path, expected, torch.randn(5, 4))
    assert model.input_shape == (4,)
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 2
    packed = pyrobust.pack(model, bits=8, group_size=2)
    torch.testing.assert_close(
        packed(torch.ones(1, 4)), model(torch.ones(1, 4)), rtol=0.1, atol=0.2
    )


def test_a_residual_convolutional_network(tmp_path):
    conv, skip = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Conv2d(2, 4, 1, stride=2)
    norm = nn.BatchNorm2d(4).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    out = nn.Linear(16, 3)
    nodes = [
        node("Conv", ["x", "cw", "cb"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", "g", "be", "mu", "va"], ["n"], epsilon=1e-5),
        node("LeakyRelu", ["n"], ["r"], alpha=0.1),
        node("Conv", ["x", "sw", "sb"], ["s"], strides=[2, 2]),
        node("Add", ["r", "s"], ["a"]),
        node("AveragePool", ["a"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "ow", "ob"], ["y"], transB=1),
    ]
    constants = {
        "cw": conv.weight, "cb": conv.bias, "sw": skip.weight, "sb": skip.bias,
        "g": norm.weight, "be": norm.bias, "mu": norm.running_mean, "va": norm.running_var,
        "ow": out.weight, "ob": out.bias,
    }  # fmt: skip
    path = write(tmp_path / "r.onnx", nodes, constants, [2, 8, 8])

    def expected(x):
        z = F.leaky_relu(norm(conv(x)), 0.1) + skip(x)
        return out(F.avg_pool2d(z, 2).flatten(1))

    model = same(path, expected, torch.randn(3, 2, 8, 8))
    box = Interval.ball(torch.randn(2, 2, 8, 8), 0.05)
    plain, tight = bound(model, box), bound(model, box, method="crown")
    assert float(tight.width().mean()) < float(plain.width().mean())


# fmt: off
OPERATORS = [
    ([node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2])],
     lambda x: F.max_pool2d(x, 2)),
    ([node("GlobalAveragePool", ["x"], ["y"])], lambda x: x.mean((2, 3), keepdim=True)),
    ([node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)], lambda x: x.mean((2, 3))),
    ([node("Transpose", ["x"], ["y"], perm=[0, 2, 3, 1])], lambda x: x.permute(0, 2, 3, 1)),
    ([node("Reshape", ["x", "shape"], ["y"])], lambda x: x.reshape(len(x), 8, 4)),
    ([node("Pad", ["x", "pads"], ["y"])], lambda x: F.pad(x, (1, 3, 0, 2))),
    ([node("Slice", ["x", "from", "to", "axes"], ["y"])], lambda x: x[:, :, 1:3]),
    ([node("Clip", ["x", "low", "high"], ["y"])], lambda x: x.clamp(-0.5, 0.75)),
    ([node("Neg", ["x"], ["n"]), node("Concat", ["x", "n"], ["y"], axis=1)],
     lambda x: torch.cat([x, -x], 1)),
    ([node("Sub", ["x", "two"], ["s"]), node("Div", ["s", "two"], ["y"])], lambda x: (x - 2) / 2),
    ([node("Mul", ["two", "x"], ["s"]), node("Sigmoid", ["s"], ["y"])],
     lambda x: torch.sigmoid(2 * x)),
    ([node("Tanh", ["x"], ["y"])], torch.tanh),
    ([node("Elu", ["x"], ["y"], alpha=0.5)], lambda x: F.elu(x, 0.5)),
    ([node("Softplus", ["x"], ["y"])], F.softplus),
    ([node("HardSigmoid", ["x"], ["y"], alpha=0.3, beta=0.4)],
     lambda x: (0.3 * x + 0.4).clamp(0, 1)),
    ([node("Softmax", ["x"], ["y"], axis=1)], lambda x: torch.softmax(x, 1)),
    ([node("Gather", ["x", "one"], ["y"], axis=1)], lambda x: x[:, 1]),
    ([node("Unsqueeze", ["x", "one_axis"], ["u"]), node("Squeeze", ["u", "one_axis"], ["y"])],
     lambda x: x),
    ([node("Dropout", ["x"], ["d"]), node("Identity", ["d"], ["y"])], lambda x: x),
    ([node("Constant", [], ["k"], value_floats=[3.0]), node("Add", ["x", "k"], ["y"])],
     lambda x: x + 3),
]
# fmt: on


@pytest.mark.parametrize(("nodes", "expected"), OPERATORS, ids=[o[0][0].op_type for o in OPERATORS])
def test_operators(tmp_path, nodes, expected):
    constants = {
        "two": torch.tensor(2.0), "shape": torch.tensor([0, 8, 4]), "one": torch.tensor(1),
        "pads": torch.tensor([0, 0, 0, 1, 0, 0, 2, 3]), "from": torch.tensor([1]),
        "to": torch.tensor([3]), "axes": torch.tensor([2]), "low": torch.tensor(-0.5),
        "high": torch.tensor(0.75), "one_axis": torch.tensor([1]),
    }  # fmt: skip
    used = {name for n in nodes for name in n.input}
    constants = {k: v for k, v in constants.items() if k in used}
    rank = expected(torch.zeros(1, 2, 4, 4)).ndim
    path = write(tmp_path / "o.onnx", nodes, constants, [2, 4, 4], rank)
    model = same(path, expected, torch.randn(3, 2, 4, 4))
    box = Interval.ball(torch.randn(2, 2, 4, 4), 0.1)
    assert bool(model(box).contains(model(box.center)).all())


def test_transposed_and_uneven_convolutions(tmp_path):
    up, conv = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1), nn.Conv2d(3, 2, 2, bias=False)
    nodes = [
        node("ConvTranspose", ["x", "u", "ub"], ["t"], strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Conv", ["t", "c"], ["y"], pads=[0, 0, 1, 1]),
    ]
    constants = {"u": up.weight, "ub": up.bias, "c": conv.weight}
    path = write(tmp_path / "u.onnx", nodes, constants, [2, 4, 4], 4)
    same(path, lambda x: conv(F.pad(up(x), (0, 1, 0, 1))), torch.randn(2, 2, 4, 4))


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs onnxscript")
def test_torch_exports(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(48, 10), nn.Tanh(), nn.Linear(10, 2),
    ).eval()  # fmt: skip
    path = tmp_path / "e.onnx"
    x = torch.randn(1, 1, 8, 8)
    torch.onnx.export(model, (x,), str(path), dynamo=True, external_data=False)
    same(path, model, torch.randn(4, 1, 8, 8), atol=1e-6)


def test_against_an_independent_evaluation(tmp_path):
    from onnx.reference import ReferenceEvaluator

    w = torch.randn(5, 16)
    nodes = [
        node("Flatten", ["x"], ["f"]),
        node("Gemm", ["f", "w"], ["g"], transB=1, alpha=0.5),
        node("Softplus", ["g"], ["y"]),
    ]
    path = write(tmp_path / "i.onnx", nodes, {"w": w}, [4, 4])
    x = torch.randn(2, 4, 4)
    (expected,) = ReferenceEvaluator(str(path)).run(None, {"x": x.numpy()})
    torch.testing.assert_close(load_onnx(path)(x), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


def test_refusals(tmp_path):
    path = write(tmp_path / "b.onnx", [node("Sin", ["x"], ["y"], name="wave")], {}, [4])
    with pytest.raises(ValueError, match=r"operator Sin \(node 'wave'\) is not supported"):
        load_onnx(path)
    path = write(tmp_path / "c.onnx", [node("Flatten", ["x"], ["y"], axis=2)], {}, [4, 4])
    with pytest.raises(ValueError, match=r"Flatten .*axis=2"):
        load_onnx(path)
    nodes = [node("Add", ["x", "z"], ["y"])]
    path = write(tmp_path / "d.onnx", nodes, {}, [4], inputs=("x", "z"))
    with pytest.raises(ValueError, match="one input and one output"):
        load_onnx(path)
    broken = tmp_path / "e.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(ValueError, match="is not a valid ONNX model"):
        load_onnx(broken)
    with pytest.raises(OSError, match="missing"):
        load_onnx(tmp_path / "missing.onnx")
