"""The Interval type: construction, errors, tensor-like behaviour, in-place forms, compilation."""

from __future__ import annotations

import copy
import operator
import pickle
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyrobust
from pyrobust import Interval


def box(*shape, dtype=torch.float32, **options):
    lower = torch.randn(*shape, dtype=dtype)
    return Interval(lower, lower + torch.rand(*shape, dtype=dtype), **options)


def test_a_box_goes_through_a_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.rand(5, 3)
    bounds = model(Interval.ball(x, 0.1, clamp=(0, 1)))
    assert bounds.shape == (5, 2)
    assert bool(bounds.contains(model(x)).all())
    assert pyrobust.Interval is Interval


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ball_contains_every_float_within_eps_and_no_neighbour_more(dtype):
    x, eps = torch.randn(200, dtype=dtype), 0.1
    ball = Interval.ball(x, eps)
    up = torch.full((), float("inf"), dtype=dtype)
    for value, low, high in zip(x.tolist(), ball.lower, ball.upper, strict=True):
        least, most = Fraction(value) - Fraction(eps), Fraction(value) + Fraction(eps)
        assert Fraction(float(low)) <= least < Fraction(float(torch.nextafter(low, up)))
        assert Fraction(float(torch.nextafter(high, -up))) < most <= Fraction(float(high))


def test_a_ball_that_float32_holds_exactly_is_not_widened():
    ball = Interval.ball(torch.tensor([1.0]), 0.25)
    assert (float(ball.lower), float(ball.upper)) == (0.75, 1.25)
    assert float(ball.width()) == 0.5
    assert (float(ball.center), float(ball.radius)) == (1.0, 0.25)


def test_width_is_rounded_up():
    one = Interval(torch.tensor([-1e-9]), torch.tensor([1.0]))
    assert Fraction(float(one.width())) >= Fraction(1.0) + Fraction(float(-one.lower))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((torch.ones(2), torch.zeros(2)), ValueError, "lower > upper in 2 of 2 elements"),
        ((torch.tensor([float("nan")]), torch.ones(1)), ValueError, "must not be NaN"),
        ((torch.zeros(2), torch.zeros(3)), ValueError, r"shape of lower, \(2,\); got \(3,\)"),
        ((torch.zeros(2).long(), torch.zeros(2)), TypeError, "float32 or float64; got torch.int64"),
        ((torch.zeros(2), torch.zeros(2).half()), TypeError, "got torch.float16"),
        ((torch.zeros(2), torch.zeros(2).double()), TypeError, "dtype of lower"),
        ((0.0, torch.zeros(2)), TypeError, "must be a torch.Tensor; got float"),
    ],
)
def test_bad_ends_are_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        Interval(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1.0}, "eps must be at least 0"),
        ({"eps": float("nan")}, "eps must be at least 0"),
        ({"eps": 0.1, "clamp": (1, 0)}, "clamp must be"),
        ({"eps": 0.1, "clamp": (5, 6)}, "within eps of the clamp range"),
        ({"eps": 0.1, "rounding": "up"}, "rounding must be one of"),
    ],
)
def test_bad_balls_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Interval.ball(torch.zeros(2), **options)


def test_an_operation_without_a_rule_is_named_with_its_place():
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"odd": nn.Hardshrink()})["odd"])
    with pytest.raises(NotImplementedError, match=r"no rule for torch\.hardshrink \(in 1, a Hard"):
        model(box(3, 2))
    with pytest.raises(NotImplementedError, match=r"no rule for Tensor\.argmax"):
        box(2).argmax()


@pytest.mark.parametrize(
    "branch",
    [
        lambda x: x > 0,
        lambda x: x == 0,
        lambda x: bool(x),
        lambda x: x.item(),
        lambda x: x.__setitem__(0, 1.0),
        lambda x: torch.empty(2).add_(x),
    ],
)
def test_nothing_falls_back_to_a_point(branch):
    with pytest.raises((NotImplementedError, AttributeError)):
        branch(box(2))


def test_hasattr_answers_instead_of_raising():
    assert hasattr(box(2), "relu")
    assert not hasattr(box(2), "argmax")
    assert not hasattr(box(2), "no_such_name")


@pytest.mark.parametrize(
    "model",
    [
        *(nn.BatchNorm1d(2), nn.InstanceNorm1d(2, track_running_stats=True)),
        *(nn.Dropout(), nn.Dropout1d(), nn.AlphaDropout(), nn.FeatureAlphaDropout()),
    ],
)
def test_training_mode_layers_are_refused(model):
    with pytest.raises(ValueError, match=r"evaluation mode.*\(in 0, a .*model\.eval\(\)"):
        nn.Sequential(model.train())(box(3, 2, 4))


def test_attention_that_trains_with_dropout_is_refused_by_its_place():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1).train()
    with pytest.raises(ValueError, match=r"dropout_p = 0\.1 \(in self_attn, a MultiheadAttention"):
        layer(box(3, 2, 4))


def test_autocast_is_refused():
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="autocast"):
        F.relu(box(2))


def test_division_and_roots_say_what_they_need():
    zero = Interval(-torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="divisor must not contain zero; 2 elements"):
        1 / zero
    with pytest.raises(ValueError, match="must be at least 0"):
        zero.sqrt()
    with pytest.raises(ValueError, match=r"logarithm's box must be at least 0\.0; 2 elements"):
        zero.log()


def test_it_looks_like_a_tensor():
    x = box(2, 3, 4)
    assert (x.ndim, x.dim(), x.numel(), len(x)) == (3, 3, 24, 2)
    assert x.size() == x.shape == (2, 3, 4)
    assert x.size(-1) == 4
    assert x.dtype == torch.float32
    assert x.device.type == "cpu"
    assert [part.shape for part in x] == [(3, 4)] * 2
    assert x.mT.shape == (2, 4, 3)
    assert x.to(torch.float64).dtype == torch.float64
    assert repr(Interval(torch.zeros(1), torch.ones(1))) == (
        "Interval(lower=tensor([0.]), upper=tensor([1.]), rounding='real')"
    )
    with pytest.raises(NotImplementedError, match=r"conversion to torch\.float16"):
        x.half if hasattr(x, "half") else x.to(torch.float16)


def test_float64_to_float32_rounds_outward():
    x = box(100, dtype=torch.float64)
    assert bool(x.to(torch.float32).contains(x).all())


def test_copies_and_pickles():
    x = box(2, rounding="deployed")
    for twin in (copy.deepcopy(x), copy.copy(x), pickle.loads(pickle.dumps(x))):
        assert torch.equal(twin.lower, x.lower)
        assert twin.rounding == "deployed"


def test_both_ends_receive_gradients():
    x = box(4, 3).requires_grad_()
    model = nn.Linear(3, 2)
    bounds = model(x)
    (bounds.upper - bounds.lower).sum().backward()
    assert x.requires_grad
    assert x.lower.grad is not None
    assert x.upper.grad is not None
    assert model.weight.grad is not None


def test_meeting_boxes_take_the_weakest_promise():
    kinds = {name: box(2, rounding=name) for name in ("nearest", "real", "deployed")}
    assert (kinds["real"] + kinds["deployed"]).rounding == "real"
    assert (kinds["nearest"] * kinds["deployed"]).rounding == "nearest"
    assert torch.cat([kinds["deployed"], torch.ones(2)]).rounding == "deployed"


def test_in_place_forms_change_the_box_itself():
    x = box(3)
    before = F.relu(x)
    assert nn.ReLU(inplace=True)(x) is x
    assert torch.equal(x.lower, before.lower)
    same = x
    x += 1.0
    assert same is x
    assert bool((x.lower >= 1).all())


def test_a_view_of_a_box_changed_in_place_is_refused():
    x = box(2, 3)
    view = x.flatten()
    x.relu_()
    with pytest.raises(NotImplementedError, match="changed in place"):
        view + 1
    assert (x + 1).shape == (2, 3)


def test_hull_of_token_embeddings_contains_every_sentence():
    table = nn.Embedding(10, 4)
    candidates = torch.randint(0, 10, (2, 5, 3))
    hull = Interval.hull(table(candidates), dim=2)
    choice = candidates.gather(2, torch.randint(0, 3, (2, 5, 1))).squeeze(2)
    assert bool(hull.contains(table(choice)).all())


def test_exact_sums_are_not_widened():
    x = Interval(torch.tensor([0.5]), torch.tensor([0.75]))
    total = x + x * 2
    assert (float(total.lower), float(total.upper)) == (1.5, 2.25)
    inexact = x + 2.0**-40
    assert float(inexact.lower) == 0.5
    assert Fraction(float(inexact.upper)) > Fraction(0.75)


@pytest.mark.parametrize("function", ["add", "sub", "mul", "div"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arithmetic_against_exact_rationals(function, dtype):
    scale = torch.tensor(10.0, dtype=dtype) ** torch.randint(-12, 12, (300,))
    a, b = torch.randn(300, dtype=dtype) * scale, torch.randn(300, dtype=dtype) * scale.flip(0)
    result = getattr(torch, function)(Interval(a, a), b)
    operation = {
        "add": lambda p, q: p + q,
        "sub": lambda p, q: p - q,
        "mul": lambda p, q: p * q,
        "div": lambda p, q: p / q,
    }[function]
    for p, q, low, high in zip(
        a.tolist(), b.tolist(), result.lower.tolist(), result.upper.tolist(), strict=True
    ):
        exact = operation(Fraction(p), Fraction(q))
        assert Fraction(low) <= exact <= Fraction(high)
        neighbours = 2 if dtype == torch.float64 else 1
        assert high - low <= neighbours * 2 * torch.finfo(dtype).eps * abs(low) + 1e-37


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        y = self.act(self.norm(self.conv(x)))
        y += x
        return F.softmax(self.head(F.adaptive_avg_pool2d(F.gelu(y), 1).flatten(1)), dim=-1)


@pytest.mark.skipif(
    tuple(int(v) for v in torch.__version__.split(".")[:2]) < (2, 13),
    reason="older torch does not trace objects with __torch_function__",
)
def test_a_model_compiles_whole():
    torch._dynamo.reset()
    model = Residual().eval()
    x = Interval.ball(torch.rand(2, 2, 5, 5), 0.01)
    expected = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled.lower, expected.lower, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(compiled.upper, expected.upper, rtol=1e-6, atol=1e-7)
    compiled.upper.sum().backward()
    assert model.conv.weight.grad is not None


@pytest.mark.skipif(
    tuple(int(v) for v in torch.__version__.split(".")[:2]) < (2, 13),
    reason="older torch does not trace objects with __torch_function__",
)
@pytest.mark.parametrize(
    "function",
    [
        lambda box: torch.cat([box, box], 1),
        lambda box: torch.stack([box, box]),
        lambda box: box.unflatten(1, (2, -1)),
        nn.Unflatten(1, (2, 2)),
    ],
)
def test_joins_and_unflatten_compile_whole(function):
    def ends(lower, upper):
        box = function(Interval(lower, upper))
        return box.lower, box.upper

    torch._dynamo.reset()
    x = torch.rand(3, 4)
    compiled = torch.compile(ends, backend="eager", fullgraph=True)(x, x + 1)
    assert all(torch.equal(a, b) for a, b in zip(compiled, ends(x, x + 1), strict=True))


class Named(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_boxes_of_one_dtype_are_joined_without_rounding():
    x = torch.rand(3, 4)
    boxes = Interval(x, x + 1), Interval(x - 1, x)
    with torch.no_grad(), Named() as seen:
        joined = torch.cat(boxes, 1)
    assert torch.equal(joined.upper, torch.cat([x + 1, x], 1))
    assert "cat" in seen.names
    assert "nextafter" not in seen.names


def in_place(operation):
    def changed(box):
        name = box
        name = operation(name)
        return box  # the same object, changed

    return changed


@pytest.mark.skipif(
    tuple(int(v) for v in torch.__version__.split(".")[:2]) < (2, 13),
    reason="older torch does not trace objects with __torch_function__",
)
@pytest.mark.parametrize(
    "function",
    [
        lambda box, t: box @ t,
        lambda box, t: t @ box,
        lambda box, t: box - t,
        in_place(lambda box: operator.iadd(box, torch.full((3, 3), 2.0))),
        in_place(lambda box: operator.imul(box, torch.full((3, 3), 2.0))),
        in_place(lambda box: operator.isub(box, torch.full((3, 3), 2.0))),
    ],
)
def test_operators_between_boxes_and_tensors_keep_their_order_when_compiled(function):
    """Dynamo swaps the operands of some: those leave the graph instead of giving another result."""

    def ends(lower, upper, tensor):
        box = Interval(lower, upper)
        box = function(box) if function.__name__ == "changed" else function(box, tensor)
        return box.lower, box.upper

    torch._dynamo.reset()
    x, tensor = torch.rand(3, 3), torch.randn(3, 3)
    compiled = torch.compile(ends, backend="eager")(x, x + 1, tensor)
    torch.testing.assert_close(compiled, ends(x, x + 1, tensor))


def test_gradients_by_torch_func():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    parameters = dict(model.named_parameters())
    x = torch.rand(5, 3)

    def worst(parameters):
        bounds = torch.func.functional_call(model, parameters, (Interval.ball(x, 0.1),))
        return bounds.upper.sum()

    got = torch.func.grad(worst)(parameters)
    model(Interval.ball(x, 0.1)).upper.sum().backward()
    torch.testing.assert_close(got["0.weight"], model[0].weight.grad)


def gradient_of_widths_in_parallel():
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    bounds = model(Interval.ball(torch.rand(4, 3), 0.1))
    (bounds.upper - bounds.lower).sum().backward()
    return model.module.weight.grad


def test_distributed_data_parallel_passes_boxes_through(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    address = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:  # the model must not outlive its group: torch then waits for a thread that waits for it
        assert gradient_of_widths_in_parallel() is not None
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rounding", ["real", "deployed", "nearest"])
def test_a_ball_about_nan_is_refused_where_it_is_cut(rounding):
    with pytest.raises(ValueError, match=r"Interval.ball: x must not be NaN"):
        Interval.ball(torch.tensor([0.5, torch.nan]), 0.1, clamp=(0, 1), rounding=rounding)
