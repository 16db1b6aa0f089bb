"""The one-call path of plain eager inference: what it takes, what it leaves to the operator."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyrobust import _native
from pyrobust.nn import PackedLinear
from pyrobust.ops import matmul, packed_linear
from pyrobust.quantize import BITS, QTensor, round_to_codebook, round_to_nearest, round_to_two_level

from ..packed_products import multiply

FORMS = [*BITS, "two-level", "codebook", "remainder"]


def pack(form=4) -> QTensor:
    weight = torch.randn(9, 40)
    if form == "two-level":
        return round_to_two_level(weight, bits=4, group_size=8)
    if form == "codebook":
        return round_to_codebook(weight, group_size=8)
    if form == "remainder":
        return pack().with_remainder(10 * weight, weight.abs() > 2)
    return round_to_nearest(weight, bits=form, group_size=8)


def arguments(x, packed: QTensor, bias=None, **changes) -> tuple:
    named = {
        "x": x,
        "codes": packed.codes,
        "scale": packed.scale,
        "zero": packed.zero,
        "bias": bias,
        "in_features": packed.shape[1],
        "bits": packed.bits,
        "group_size": packed.group_size,
        "group_dim": packed.group_dim,
        "activations": None,
        "extras": packed.extras,
        "num_threads": 1,
        "grad_enabled": torch.is_grad_enabled(),
    }
    return tuple((named | changes).values())


def operator(x, packed: QTensor, bias=None, int8=False):
    options = (packed.shape[1], packed.bits, packed.group_size, packed.group_dim, int8)
    extras = packed.extras or ()
    return torch.ops.pyrobust.packed_linear(
        x, packed.codes, packed.scale, packed.zero, bias, *options, *extras
    )


@pytest.fixture
def operator_calls(monkeypatch):
    """Counts the calls that go the general way."""
    calls = []
    kernel = matmul.linear_kernel
    monkeypatch.setattr(matmul, "linear_kernel", lambda *a, **k: calls.append(a) or kernel(*a, **k))
    monkeypatch.setattr(
        torch.ops.pyrobust, "packed_linear", lambda *a: calls.append(a) or kernel(*a)
    )
    return calls


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activations", [None, "int8"])
def test_it_gives_the_bits_of_the_operator(form, dtype, activations):
    packed = pack(form)
    for x in (torch.randn(40), torch.randn(1, 40), torch.randn(2, 0, 40), torch.randn(3, 5, 40)):
        for bias in (None, torch.randn(9), torch.randn(9).to(dtype)):
            own = x.to(dtype)
            result = _native.eager_linear(*arguments(own, packed, bias, activations=activations))
            assert result.dtype == dtype
            assert torch.equal(result, operator(own, packed, bias, activations == "int8"))


@pytest.mark.parametrize("grad_enabled", [False, True])
def test_it_serves_calls_without_gradients(operator_calls, grad_enabled):
    packed, x = pack(), torch.randn(3, 40)
    frozen = torch.nn.Parameter(torch.randn(9), requires_grad=False)
    with torch.set_grad_enabled(grad_enabled):
        result = multiply(x, packed, frozen)
    assert not operator_calls
    assert not result.requires_grad
    with torch.inference_mode():
        assert multiply(x, packed).is_inference()


def test_gradients_go_through_the_operator(operator_calls):
    packed, x = pack(), torch.randn(3, 40)
    multiply(x.clone().requires_grad_(), packed)
    multiply(x, packed, torch.randn(9, requires_grad=True))
    assert len(operator_calls) == 2
    with torch.no_grad():
        multiply(x.clone().requires_grad_(), packed)
    assert len(operator_calls) == 2


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.randn(3, 40).as_subclass(Subclass)},
        {"x": torch.randn(40, 3).t()},
        {"x": torch._neg_view(torch.randn(3, 40))},
        {"x": torch.randn(3, 40).to_sparse()},
        {"x": torch.randn(3, 40, device="meta")},
        {"x": torch.randn(3, 40).double()},
        {"x": torch.randn(3, 41)},
        {"x": torch.tensor(1.0)},
        {"x": [1.0]},
        {"bias": torch.randn(8)},
        {"bias": torch.randn(18)[::2]},
        {"bias": 1.0},
        {"in_features": 2**70},
        {"in_features": 40.0},
        {"bits": 5},
        {"bits": 1.5},
        {"bits": True},
        {"group_size": 0},
        {"group_dim": 2},
        {"activations": "int4"},
        {"activations": 8},
        {"extras": [None] * 5},
        {"extras": (None,) * 4},
        {"extras": (None, None, None, None, torch.zeros(10, dtype=torch.int64))},
        {"extras": (None, None, torch.zeros(3), torch.zeros(3, dtype=torch.int32), None)},
        {"extras": (torch.ones(9, requires_grad=True), None, None, None, None)},
    ],
)
def test_anything_else_is_left_to_the_general_way(changes):
    x = changes.get("x", torch.randn(3, 40))
    others = {name: value for name, value in changes.items() if name != "x"}
    assert _native.eager_linear(*arguments(x, pack(), **others)) is None
    result = _native.eager_linear(*arguments(torch.randn(3, 40), pack()))  # no error is left behind
    assert result.shape == (3, 9)


def test_a_wrong_number_of_arguments_is_an_error():
    with pytest.raises(TypeError, match="takes 13 arguments; got 1"):
        _native.eager_linear(torch.randn(3, 40))


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class FunctionRecorder(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_modes_see_the_operator():
    packed, x = pack(), torch.randn(3, 40)
    with torch.no_grad(), Recorder() as recorder:
        multiply(x, packed)
    assert "pyrobust.packed_linear.default" in recorder.seen
    with torch.no_grad(), FunctionRecorder() as functions:
        multiply(x, packed)
    assert packed_linear in functions.seen


def test_tracing_records_the_operator():
    layer = PackedLinear.from_qtensor(pack(), torch.randn(9))
    with torch.no_grad():
        traced = torch.jit.trace(layer, torch.randn(3, 40))
    x = torch.randn(3, 40)
    assert "packed_linear" in str(traced.inlined_graph)
    assert torch.equal(traced(x), layer(x))


class Doubled(torch.nn.Module):
    def forward(self, value):
        return 2 * value


def test_a_layer_multiplies_with_what_its_attributes_say():
    layer, x = PackedLinear.from_qtensor(pack(), torch.randn(9)), torch.randn(3, 40)
    plain = layer(x)
    other = torch.randn(9)
    called = torch.func.functional_call(layer, {"bias": other}, (x,))
    torch.testing.assert_close(called, plain - layer.bias + other)
    torch.nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())
    torch.testing.assert_close(layer(x), plain + layer.bias / 2)
    layer.codes = torch.zeros_like(layer.codes)
    assert torch.equal(layer(x), multiply(x, layer.qtensor, layer.bias))


def test_a_layer_without_bias_and_half_a_bias():
    packed, x = pack(), torch.randn(3, 40).bfloat16()
    assert torch.equal(PackedLinear.from_qtensor(packed)(x), multiply(x, packed))
    bias = torch.randn(9)
    layer = PackedLinear.from_qtensor(packed, bias).bfloat16()
    assert torch.equal(layer(x), multiply(x, packed, bias.bfloat16().float()))
