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
    domains = [("", opset), *((n.domain, 1) for n in nodes if n.domain)]
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(*d) for d in domains])
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
    ([node("Abs", ["x"], ["a"]), node("Celu", ["a"], ["c"]), node("Softsign", ["c"], ["y"])],
     lambda x: F.softsign(F.celu(x.abs()))),
    ([node("Pow", ["x", "two"], ["p"]), node("Add", ["p", "two"], ["a"]), node("Log", ["a"], ["l"]),
      node("Reciprocal", ["l"], ["y"])], lambda x: 1 / (x**2 + 2).log()),
    ([node("Max", ["x", "low", "two"], ["m"]), node("Min", ["m", "x"], ["n"]),
      node("Sum", ["n", "x", "x"], ["y"])], lambda x: 3 * x),
    ([node("ReduceMin", ["x"], ["y"], axes=[-1])], lambda x: x.amin(-1, keepdim=True)),
    ([node("GlobalMaxPool", ["x"], ["y"])], lambda x: x.amax((2, 3), keepdim=True)),
    ([node("InstanceNormalization", ["x", "pair", "pair"], ["y"], epsilon=1e-3)],
     lambda x: F.instance_norm(x, None, None, *[torch.tensor([0.5, 2.0])] * 2, True, 0.0, 1e-3)),
    ([node("Gather", ["x", "order"], ["y"], axis=2)], lambda x: x[:, :, [2, 0]]),
    ([node("Slice", ["x", "from", "to", "axes", "steps"], ["y"])], lambda x: x[:, :, 1:3:2]),
    ([node("Split", ["x", "parts"], ["a", "b"], axis=-1),
      node("Concat", ["b", "a"], ["y"], axis=3)],
     lambda x: x[..., [3, 0, 1, 2]]),
    ([node("Div", ["order", "parts"], ["q"]), node("Gather", ["x", "q"], ["y"], axis=1)],
     lambda x: x[:, [0, 0]]),
    ([node("ReduceMax", ["x"], ["r"], axes=[1]), node("Expand", ["r", "wide"], ["y"])],
     lambda x: x.amax(1, keepdim=True).expand(-1, 3, -1, -1)),
    ([node("Pad", ["x", "pads"], ["y"], mode="edge")],
     lambda x: F.pad(x, (1, 3, 0, 2), mode="replicate")),
    ([node("Pad", ["x", "pads"], ["y"], mode="wrap")],
     lambda x: F.pad(x, (1, 3, 0, 2), mode="circular")),
    ([node("Where", ["mask", "x", "two"], ["y"])],
     lambda x: x.where(torch.tensor([True, False, False, True]), torch.tensor(2.0))),
    ([node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", dilations=[1, 3])],
     lambda x: F.conv2d(F.pad(x, (1, 2, 0, 1)), torch.ones(2, 2, 2, 2), dilation=(1, 3))),
    ([node("Conv", ["x", "w"], ["y"], auto_pad="SAME_LOWER")],
     lambda x: F.conv2d(F.pad(x, (1, 0, 1, 0)), torch.ones(2, 2, 2, 2))),
]
# fmt: on


@pytest.mark.parametrize(("nodes", "expected"), OPERATORS, ids=[o[0][0].op_type for o in OPERATORS])
def test_operators(tmp_path, nodes, expected):
    constants = {
        "two": torch.tensor(2.0), "shape": torch.tensor([0, 8, 4]), "one": torch.tensor(1),
        "pads": torch.tensor([0, 0, 0, 1, 0, 0, 2, 3]), "from": torch.tensor([1]),
        "to": torch.tensor([3]), "axes": torch.tensor([2]), "low": torch.tensor(-0.5),
        "high": torch.tensor(0.75), "one_axis": torch.tensor([1]),
        "pair": torch.tensor([0.5, 2.0]), "order": torch.tensor([2, 0]),
        "w": torch.ones(2, 2, 2, 2),
        "steps": torch.tensor([2]), "parts": torch.tensor([3, 1]), "edges": torch.tensor([1, 2]),
        "wide": torch.tensor([1, 3, 1, 1]), "mask": torch.tensor([True, False, False, True]),
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


class Residual(nn.Module):
    """Two convolutions with batch norm beside a shorter way, and a mean over the image."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.skip, self.last = nn.Conv2d(1, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        y = self.norms[1](self.second(torch.relu(self.norms[0](self.first(x)))))
        y = torch.relu(y + self.skip(x))
        return self.last(F.adaptive_avg_pool2d(y, 1).flatten(1))


class Constants(nn.Module):
    """Inputs that are normalised, and constants behind the last layer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.rand(1, 1, 1, 1))
        self.layer = nn.Linear(64, 3)
        self.scale = nn.Parameter(torch.rand(3))

    def forward(self, x):
        y = self.layer(((x - self.mean) / 0.3).flatten(1))
        return 2 * y * self.scale - torch.tensor([1.0, 2.0, 3.0])


class Reshaped(nn.Module):
    """A view by the number of images, which exporters turn into computations with shapes."""

    def __init__(self):
        super().__init__()
        self.conv, self.layer = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Linear(64, 3)

    def forward(self, x):
        y = self.conv(x).relu()
        return self.layer(y.view(y.shape[0], -1))


def sequential(*layers, features):
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 3))


# fmt: off
EXPORTED = {
    "sequential": lambda: sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(48, 10), nn.Tanh(), features=10),
    "perceptron": lambda: sequential(
        nn.Flatten(), nn.Linear(64, 9), nn.BatchNorm1d(9), nn.PReLU(9), nn.Linear(9, 8),
        nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.SELU(), nn.LeakyReLU(0.2), features=8),
    "residual": Residual,
    "constants": Constants,
    "reshaped": Reshaped,
    "average": lambda: sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.AvgPool2d(3, 2, 1), nn.ReLU(),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False), features=16),
    "maximum": lambda: sequential(
        nn.MaxPool2d(3, 1, 1), nn.Conv2d(1, 4, 3), nn.MaxPool2d(4, 4, ceil_mode=True),
        features=16),
    "largest": lambda: sequential(
        nn.Conv2d(1, 4, 3, dilation=2), nn.Conv2d(4, 4, 1, groups=4), nn.AdaptiveMaxPool2d(1),
        features=4),
    "logarithms": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.LogSoftmax(1)),
}
EXPORTERS = {
    "dynamo": {"dynamo": True},
    "free batch": {"dynamo": True, "dynamic_shapes": ({0: "batch"},)},
    "script": {"dynamo": False},
    "script, free batch": {
        "dynamo": False, "input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}},
}
# fmt: on


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs onnxscript")
@pytest.mark.filterwarnings("ignore")  # the older exporter's of its age
@pytest.mark.parametrize(
    ("name", "exporter"),
    [*((name, "free batch") for name in EXPORTED)]
    + [(n, e) for n in ("residual", "reshaped") for e in EXPORTERS if e != "free batch"]
    + [("average", "script"), ("maximum", "script"), ("perceptron", "script")],
)
def test_torch_exports(tmp_path, name, exporter):
    torch.manual_seed(0)
    model = EXPORTED[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    path = tmp_path / "e.onnx"
    images = 2 if "free" in exporter else 1
    options = EXPORTERS[exporter]
    torch.onnx.export(model.eval(), (torch.randn(images, 1, 8, 8),), str(path), **options)
    loaded, x = load_onnx(path), torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=1e-6)
    assert loaded.input_shape == (1, 8, 8)
    box = Interval.ball(x[:2], 0.01)
    assert bool(loaded(box).contains(loaded(x[:2])).all())


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs onnxscript")
def test_weights_in_a_file_of_their_own(tmp_path):
    model, path = nn.Linear(64, 30).eval(), tmp_path / "e.onnx"
    torch.onnx.export(model, (torch.randn(1, 64),), str(path), dynamo=True, external_data=True)
    beside = tmp_path / "e.onnx.data"
    assert beside.is_file()
    x = torch.randn(3, 64)
    torch.testing.assert_close(load_onnx(path)(x), model(x), rtol=0, atol=1e-6)
    beside.unlink()
    with pytest.raises(ValueError, match=r"is not a valid ONNX model: .*e\.onnx\.data"):
        load_onnx(path)


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


CONSTANTS = [
    [node("Floor", ["c"], ["f"]), node("Ceil", ["d"], ["k"]), node("Sign", ["k"], ["s"]),
     node("Add", ["f", "s"], ["a"]), node("Round", ["a"], ["v"])],
    [node("CumSum", ["c", "one"], ["s"]), node("ScatterElements", ["s", "at", "d"], ["v"], axis=1,
     reduction="add")],
    [node("ScatterElements", ["c", "at", "d"], ["v"], axis=1)],
    [node("GatherND", ["c", "places"], ["v"])],
    [node("Less", ["c", "d"], ["a"]), node("GreaterOrEqual", ["c", "zero"], ["b"]),
     node("And", ["a", "b"], ["e"]), node("Not", ["e"], ["n"]),
     node("Where", ["n", "c", "d"], ["v"])],
    [node("Equal", ["c", "c"], ["a"]), node("Greater", ["c", "d"], ["b"]), node("Or", ["a", "b"],
     ["e"]), node("Cast", ["e"], ["v"], to=TensorProto.FLOAT)],
    [node("Range", ["zero", "four", "one_float"], ["v"])],
    [node("Slice", ["c", "last", "before", "one_list", "back"], ["v"])],
    [node("Gather", ["c", "ends"], ["v"], axis=1)],
    [node("Cast", ["c"], ["a"], to=TensorProto.UINT8), node("Cast", ["a"], ["v"],
     to=TensorProto.FLOAT)],
]  # fmt: skip


@pytest.mark.parametrize("nodes", CONSTANTS, ids=lambda nodes: nodes[0].op_type)
@pytest.mark.parametrize("runtime", ["onnx", "onnxruntime"])
def test_arithmetic_on_constants_is_done_while_reading(tmp_path, nodes, runtime):
    constants = {
        "c": torch.tensor([[0.5, 1.5, 2.0, 3.7]]), "d": torch.tensor([[1.0, -1.25, 7.0, 0.5]]),
        "one": torch.tensor(1), "at": torch.tensor([[0, -1, 2, 1]]), "zero": torch.tensor(0.0),
        "places": torch.tensor([[0, 3], [0, 1], [0, 0], [0, 3]]), "four": torch.tensor(4.0),
        "one_float": torch.tensor(1.0), "last": torch.tensor([-1]), "before": torch.tensor([-9]),
        "one_list": torch.tensor([1]), "back": torch.tensor([-1]),
        "ends": torch.tensor([-1, 0, 1, 2]),
    }  # fmt: skip
    used = {name for n in nodes for name in n.input}
    constants = {k: v for k, v in constants.items() if k in used}
    path = write(tmp_path / "c.onnx", [*nodes, node("Add", ["x", "v"], ["y"])], constants, [4])
    x = torch.randn(3, 4)
    if runtime == "onnx":
        from onnx.reference import ReferenceEvaluator as Session
    else:
        Session = pytest.importorskip("onnxruntime").InferenceSession
    (expected,) = Session(str(path)).run(None, {"x": x.numpy()})
    assert torch.equal(load_onnx(path)(x), torch.from_numpy(expected))


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs onnxscript")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"bits": 4}, {"quantizer": "nf4"}, {"quantizer": "two-level"}])
def test_packed_models_come_back_from_their_exports(tmp_path, options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(8, 32, 5, padding=2, padding_mode="circular"), nn.ReLU(), nn.Flatten(),
        nn.Linear(640, 32), nn.ReLU(), nn.Linear(32, 3),
    ).eval()  # fmt: skip
    packed = pyrobust.pack(model, group_size=16, **options)
    x, path = torch.randn(2, 8, 20), tmp_path / "p.onnx"
    torch.onnx.export(packed, (x,), str(path), dynamo=True, dynamic_shapes=({0: "batch"},))
    loaded = load_onnx(path)
    torch.testing.assert_close(loaded(x), packed(x), rtol=1e-5, atol=1e-5)
    bounds = loaded(Interval.ball(x, 0.01, rounding="deployed"))
    assert bool(bounds.contains(packed(x)).all())
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert bool(bounds.contains(torch.from_numpy(out)).all())


@pytest.mark.parametrize("axis", [2, 3, -1, 1])
@pytest.mark.parametrize("mode", ["reflect", "constant"])
def test_pads_of_single_axes(tmp_path, axis, mode):
    if (mode, axis) == ("reflect", 1):
        pytest.skip("torch reflects no channels")
    nodes = [node("Pad", ["x", "pads", "", "axes"], ["y"], mode=mode)]
    constants = {"pads": torch.tensor([1, 2]), "axes": torch.tensor([axis])}
    path = write(tmp_path / "p.onnx", nodes, constants, [2, 4, 4], 4, opset=18)
    amounts = {1: (0, 0, 0, 0, 1, 2), 2: (0, 0, 1, 2)}.get(axis, (1, 2, 0, 0))
    same(path, lambda x: F.pad(x, amounts, mode=mode), torch.randn(3, 2, 4, 4))


def test_parts_of_equal_size(tmp_path):
    nodes = [
        node("Split", ["x"], ["a", "b", "c"], axis=1, num_outputs=3),
        node("Concat", ["c", "b", "a"], ["y"], axis=1),
    ]
    path = write(tmp_path / "q.onnx", nodes, {}, [8], opset=18)
    same(path, lambda x: torch.cat([x[:, 6:], x[:, 3:6], x[:, :3]], 1), torch.randn(2, 8))


def with_sizes(*last):
    """The input reshaped to sizes that are computed, as exporters of a free batch write them."""
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"]),
        *last,
        node("Concat", ["m", "rest"], ["to"], axis=0),
        node("Reshape", ["x", "to"], ["y"]),
    ]
    constants = {"zero": torch.tensor(0), "axis": torch.tensor([0]), "rest": torch.tensor([-1])}
    return nodes, constants


def test_sizes_that_are_computed(tmp_path):
    nodes, constants = with_sizes(node("Unsqueeze", ["n", "axis"], ["m"]))
    path = write(tmp_path / "s.onnx", nodes, constants, [2, 3])
    same(path, lambda x: x.reshape(len(x), 6), torch.randn(4, 2, 3))
    twice = [node("Mul", ["n", "two"], ["t"]), node("Unsqueeze", ["t", "axis"], ["m"])]
    nodes, constants = with_sizes(*twice)
    path = write(tmp_path / "t.onnx", nodes, constants | {"two": torch.tensor(2)}, [2, 3])
    with pytest.raises(ValueError, match=r"Reshape .*does not keep the batch"):
        load_onnx(path)


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
    nodes = [node("Relu", ["x"], ["y"], domain="com.microsoft")]
    path = write(tmp_path / "m.onnx", nodes, {}, [4])
    with pytest.raises(ValueError, match=r"operator com\.microsoft\.Relu .* is not supported"):
        load_onnx(path)
    pool = node("MaxPool", ["x"], ["p", "i"], kernel_shape=[2, 2])
    nodes = [pool, node("Cast", ["i"], ["y"], to=TensorProto.FLOAT)]
    path = write(tmp_path / "i.onnx", nodes, {}, [1, 4, 4], 4)
    with pytest.raises(ValueError, match=r"Cast .* takes 'i', the second output"):
        load_onnx(path)
    path = write(tmp_path / "s.onnx", [node("Softmax", ["x"], ["y"])], {}, [4, 4], 3, opset=11)
    with pytest.raises(ValueError, match=r"Softmax .*axis=1 of operator set 11"):
        load_onnx(path)
    path = write(tmp_path / "f.onnx", [node("Floor", ["x"], ["y"])], {}, [4])
    with pytest.raises(ValueError, match=r"Floor .*every input must be constant"):
        load_onnx(path)
    nodes, constants = with_sizes(
        node("Max", ["n", "one"], ["t"]), node("Unsqueeze", ["t", "axis"], ["m"])
    )
    path = write(tmp_path / "h.onnx", nodes, constants | {"one": torch.tensor(1)}, [2, 3])
    with pytest.raises(ValueError, match=r"Max .*must not depend on the batch"):
        load_onnx(path)
    nodes = [node("Pad", ["x", "pads", "", "axes"], ["y"])]
    given = {"pads": torch.tensor([1, 0]), "axes": torch.tensor([0])}
    with pytest.raises(ValueError, match=r"Pad .*pads of the batch"):
        load_onnx(write(tmp_path / "g.onnx", nodes, given, [4], opset=18))
    broken = tmp_path / "e.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(ValueError, match="is not a valid ONNX model"):
        load_onnx(broken)
    with pytest.raises(OSError, match="missing"):
        load_onnx(tmp_path / "missing.onnx")
