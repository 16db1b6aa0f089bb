"""torch.compile(fullgraph=True) on boxes: operators and spellings, with the bits of eager mode."""

from __future__ import annotations

import operator
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyrobust import Interval
from pyrobust.interval import dynamo
from pyrobust.interval.operands import spellings
from pyrobust.interval.table import BY_NAME

pytestmark = pytest.mark.skipif(
    tuple(int(v) for v in torch.__version__.split(".")[:2]) < (2, 13),
    reason="older torch does not trace objects with __torch_function__",
)
T = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)) + 2  # of either sign
AWAY = T.abs() + 1


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def ends_of(function):
    def image(lower, upper):
        box = function(Interval(lower, upper))
        return box.lower, box.upper

    return image


def drawn():
    generator = torch.Generator().manual_seed(4)
    lower = torch.randn(4, 4, generator=generator)
    return lower, lower + torch.rand(4, 4, generator=generator)


def assert_compiles_whole(function, *, backend="eager"):
    """Equal ends, and equal gradients where the compiler differentiates."""
    leaves = [end.requires_grad_() for end in drawn()]
    eager = ends_of(function)(*leaves)
    compiled = torch.compile(ends_of(function), backend=backend, fullgraph=True)(*leaves)
    for got, expected in zip(compiled, eager, strict=True):
        assert torch.equal(got, expected)
    cotangents = [torch.randn_like(end) for end in eager]
    for a, b in zip(
        torch.autograd.grad(compiled, leaves, cotangents),
        torch.autograd.grad(eager, leaves, cotangents),
        strict=True,
    ):
        assert torch.equal(a, b)


def changed_through_another_name(change, operand):
    """``change`` as a statement such as ``b += x``: what was ``b`` before must be changed, too."""

    def function(b):
        before = b * 1.0
        kept = before
        result = change(before, operand)
        assert result is kept
        return kept

    return function


OPERATORS = {
    "box + number": lambda b: b + 1.5,
    "number + box": lambda b: 1.5 + b,
    "box - number": lambda b: b - 1.5,
    "number - box": lambda b: 1.5 - b,
    "box * number": lambda b: b * 1.5,
    "number * box": lambda b: 1.5 * b,
    "box / number": lambda b: b / 1.5,
    "number / box": lambda b: 1.5 / (b + 20),
    "box + tensor": lambda b: b + T,
    "tensor + box": lambda b: T + b,
    "box - tensor": lambda b: b - T,
    "tensor - box": lambda b: T - b,
    "box * tensor": lambda b: b * T,
    "tensor * box": lambda b: T * b,
    "box / tensor": lambda b: b / AWAY,
    "tensor / box": lambda b: T / (b + 20),
    "box @ tensor": lambda b: b @ T,
    "tensor @ box": lambda b: T @ b,
    "tensor.T @ box @ tensor": lambda b: T.T @ b @ T,
    "box + box": lambda b: b + 2 * b,
    "box - box": lambda b: b - 2 * b,
    "box - itself": lambda b: b - b + b,
    "box * box": lambda b: b * (b + 1),
    "box * itself": lambda b: b * b,
    "box / box": lambda b: b / (b + 20),
    "-box": lambda b: -b,
    "+box": lambda b: +b,
    "abs(box)": abs,
    "box ** 2": lambda b: b**2,
    "box ** 3": lambda b: b**3,
    "box ** 0.5": lambda b: (b + 20) ** 0.5,
    "box ** -1": lambda b: (b + 20) ** -1,
    "box @= tensor": lambda b: operator.imatmul(b, T),
    "box @ box": lambda b: b @ b.mT,
    "box @ itself": lambda b: b @ b,
    "box @= box": lambda b: operator.imatmul(b, b * 2),
    "(tensor @ box) @ box": lambda b: T @ b @ b,
    "box[0]": lambda b: b[0],
    "box[:, 1:]": lambda b: b[:, 1:],
    "iteration": lambda b: next(iter(b)),
    "box.T": lambda b: b.T,
    "torch.add(tensor, box)": lambda b: torch.add(T, b),
    "torch.matmul(tensor, box)": lambda b: torch.matmul(T, b),
    "tensor.add(box)": lambda b: T.add(b),
    "tensor.mul(box)": lambda b: T.mul(b),
    "tensor.matmul(box)": lambda b: T.matmul(b),
    "box.matmul(tensor)": lambda b: b.matmul(T),
    "box.add_(tensor)": lambda b: (b * 1.0).add_(T),
    **{
        f"box {sign} {name}": changed_through_another_name(change, operand)
        for sign, change in (
            *(("+=", operator.iadd), ("-=", operator.isub)),
            *(("*=", operator.imul), ("/=", operator.itruediv)),
        )
        for name, operand in (("number", 1.5), ("tensor", AWAY))
    },
    "box **= number": changed_through_another_name(operator.ipow, 2),
    "box += box": lambda b: operator.iadd(b, b * 2),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_compile_whole(name):
    assert_compiles_whole(OPERATORS[name])


@pytest.mark.parametrize(
    "name", ["box @ tensor", "tensor @ box", "box @ box", "box - tensor", "box += tensor"]
)
def test_operators_compile_whole_with_their_backward(name):
    assert_compiles_whole(OPERATORS[name], backend="aot_eager")


def test_operators_in_statements_compile_whole():
    def function(b):
        kept = b
        b += T
        b *= 2.0
        b -= T
        return kept @ T + T @ b

    assert_compiles_whole(function)


GAPS = sorted(
    {
        function
        for name in ("tanh", "sigmoid", "hardswish", "hardsigmoid", "relu")
        for function in (*spellings(name), *spellings(f"{name}_"))
        if getattr(torch, function.__name__, None) is function
        or getattr(F, function.__name__, None) is function
    },
    key=lambda function: (function.__module__ or "", function.__name__),
)


@pytest.mark.parametrize("function", GAPS, ids=lambda f: f"{f.__module__} {f.__name__}")
def test_functions_with_gaps_in_torchs_list_compile_whole(function):
    assert_compiles_whole(lambda b: function(b * 1.0))


@pytest.mark.parametrize("module", [nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Softsign])
@pytest.mark.parametrize("inplace", [False, True])
def test_modules_compile_whole(module, inplace):
    if inplace and "inplace" not in module.__init__.__code__.co_varnames:
        pytest.skip("has no form in place")
    layer = module(**({"inplace": True} if inplace else {}))
    assert_compiles_whole(lambda b: layer(b * 1.0))


def test_every_rule_of_torchs_functions_is_listed_as_overridable():
    listed = torch.overrides.get_overridable_functions()
    for name in BY_NAME:
        for space in (torch, F):
            function = getattr(space, name, None)
            if callable(function):
                assert any(function in listed[other] for other in (torch, F)), name


def test_models_compile_whole_on_a_box_from_outside():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), nn.Hardswish()).eval()
    box = Interval.ball(torch.randn(2, 4), 0.1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(box)
    eager = model(box)
    assert isinstance(compiled, Interval)
    assert torch.equal(compiled.lower, eager.lower)
    assert torch.equal(compiled.upper, eager.upper)


def test_boxes_from_outside_meet_in_a_product():
    boxes = Interval(*drawn()), Interval(*drawn())
    compiled = torch.compile(lambda a, b: a @ b.mT, backend="aot_eager", fullgraph=True)(*boxes)
    eager = boxes[0] @ boxes[1].mT
    assert torch.equal(compiled.lower, eager.lower)
    assert torch.equal(compiled.upper, eager.upper)


class Doubling:
    """Another object with ``@``, which stays Dynamo's affair."""

    def __matmul__(self, other):
        return 2 * other

    def __rmatmul__(self, other):
        return 3 * other


def test_products_of_other_objects_are_left_to_the_compiler():
    x = torch.ones(2)
    product = torch.compile(lambda other, x: (other @ other) @ x, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="matmul"):
        product(Doubling(), x)


def test_a_compiler_that_knows_products_of_objects_keeps_its_own_way():
    def own(*_):
        raise AssertionError

    module = SimpleNamespace(BuiltinVariable=type("BuiltinVariable", (), {"call_matmul": own}))
    name = "torch._dynamo.variables.builtin"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        dynamo.trace_matrix_products(Interval)
    assert module.BuiltinVariable.call_matmul is own
    assert callable(module.BuiltinVariable.call_imatmul)


def test_importing_pyrobust_leaves_dynamo_alone_until_it_is_needed():
    code = (
        "import sys, pyrobust, torch\n"
        "assert 'torch._dynamo.variables.builtin' not in sys.modules\n"
        "x = pyrobust.Interval(torch.eye(2), torch.eye(2) + 1)\n"
        "def product(a):\n"
        "    a = a @ a\n"
        "    a @= a\n"
        "    return a.upper\n"
        "y = torch.compile(product, backend='eager', fullgraph=True)(x)\n"
        "assert torch.equal(y, product(x))\n"
        "assert not any(type(f).__name__ == '_AfterImport' for f in sys.meta_path)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


REFUSED = {
    "number ** box": (lambda b: 2**b, "pow with the interval in another argument"),
    "tensor ** box": (lambda b: T**b, "pow with the interval in another argument"),
    "box ** tensor": (lambda b: b**T, "pow with a tensor as exponent"),
    "box < tensor": (lambda b: b < T, "comparison"),
    "tensor < box": (lambda b: operator.lt(T, b), r"Tensor\.lt"),
    "box == box": (lambda b: b == b, "comparison"),
    "tensor == box": (lambda b: operator.eq(T, b), r"Tensor\.eq"),
    "box // number": (lambda b: b // 2, "the operator //"),
    "number // box": (lambda b: 2 // b, "the operator //"),
    "box % number": (lambda b: b % 2, "the operator %"),
    "~box": (lambda b: ~b, "the operator ~"),
    "box & tensor": (lambda b: b & True, "a logical or bitwise operator"),
    "tensor += box": (lambda b: operator.iadd(T.clone(), b), "an operation in place"),
    "tensor *= box": (lambda b: operator.imul(T.clone(), b), "an operation in place"),
    "if box": (lambda b: b if b else None, "the truth value"),
    "box[0] = number": (lambda b: operator.setitem(b, 0, 1.0), "assignment to an index"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_operators_without_a_rule_are_refused_by_name(name):
    function, says = REFUSED[name]
    with pytest.raises(NotImplementedError, match=f"no rule for {says}"):
        function(Interval(*drawn()))


@pytest.mark.parametrize("name", REFUSED)
def test_compiled_code_refuses_them_too(name):
    function, says = REFUSED[name]
    with pytest.raises(NotImplementedError, match=f"no rule for {says}"):
        torch.compile(ends_of(function), backend="eager")(*drawn())


@pytest.mark.parametrize("name", ["box @ tensor", "tensor @ box", "box += tensor"])
def test_a_compiler_built_otherwise_breaks_the_graph_instead_of_guessing(name, monkeypatch):
    asked = []

    def unknown():
        asked.append(name)
        return dynamo.UNKNOWN

    unknown._dynamo_marked_constant = True
    monkeypatch.setattr("pyrobust.interval.application.swapped_operator", unknown)
    image, ends = ends_of(OPERATORS[name]), drawn()
    compiled = torch.compile(image, backend="eager")(*ends)
    for got, expected in zip(compiled, image(*ends), strict=True):
        assert torch.equal(got, expected)
    assert asked


def test_outside_of_the_compiler_no_operator_was_swapped():
    assert dynamo.swapped_operator() == dynamo.UNKNOWN


def test_powers_in_place_change_the_box_itself():
    box = Interval(*drawn()) * 1.0
    kept = box
    box **= 2
    assert box is kept
    assert float(kept.lower.min()) >= 0


@pytest.mark.parametrize("inside", [True, False])
def test_compiled_code_refuses_autocast(inside):
    layer = nn.Linear(4, 4)

    def image(lower, upper):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            return layer(Interval(lower, upper)).lower

    compiled = torch.compile(image if inside else ends_of(layer), backend="eager")
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside),
        pytest.raises(RuntimeError, match="autocast must be off"),
    ):
        compiled(*drawn())


INDUCED = {
    "add": lambda x: x + x * 0.1,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "softmax": lambda x: x.softmax(-1),
    "gelu": F.gelu,
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["real", "deployed"])
@pytest.mark.parametrize("name", INDUCED)
def test_code_of_the_default_compiler_contains_the_image(name, rounding):
    """Inductor has elementary functions of its own, and must not contract or reorder sums."""
    function = INDUCED[name]

    def image(low, high):
        result = function(Interval(low, high, rounding=rounding))
        return result.lower, result.upper

    lower = torch.randn(37, 6)
    upper = lower + 0.01 * torch.rand(37, 6)
    low, high = torch.compile(image, fullgraph=True)(lower, upper)
    for i in range(40):
        share = torch.rand_like(lower)
        point = torch.lerp(lower, upper, share.round() if i % 2 else share).clamp(lower, upper)
        value = function(point.double())
        slack = 1e-14 * value.abs()
        assert bool(((low <= value + slack) & (value - slack <= high)).all())
        if rounding == "deployed":
            single = function(point)
            assert bool(((low <= single) & (single <= high)).all())
