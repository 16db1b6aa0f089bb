"""Boxes that wait for a step, or keep their ends, as arguments of torch's machinery."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from pyrobust import Interval
from pyrobust.ops import _late_products

pytestmark = pytest.mark.skipif(
    tuple(int(v) for v in torch.__version__.split(".")[:2]) < (2, 13),
    reason="older torch does not trace objects with __torch_function__",
)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Every convolution may wait; nothing is compiled yet."""
    monkeypatch.setattr(_late_products, "_LEAST_VALUES", 1)
    monkeypatch.setattr(_late_products, "_VALUES_PER_COPIED", 0)
    torch._dynamo.reset()
    torch.manual_seed(0)


LINEAR = nn.Linear(7, 5).requires_grad_(False)
CONV = nn.Conv2d(2, 3, 3, padding=1).requires_grad_(False)
NORM = nn.BatchNorm2d(3).eval().requires_grad_(False)


def lines(batch: int = 2) -> Interval:
    x = torch.randn(batch, 7)
    return Interval(x, x + 1)


def images(batch: int = 2) -> Interval:
    x = torch.randn(batch, 2, 6, 6)
    return Interval(x, x + 1)


def changed_in_place(box: Interval) -> Interval:
    box = box * 1.0
    box += 1.0
    return box


WAITING = {
    "kept": lambda batch=2: LINEAR(lines(batch)),
    "kept, ReLU": lambda batch=2: torch.relu(LINEAR(lines(batch))),
    "ReLU": lambda batch=2: torch.relu(lines(batch)),
    "convolution": lambda batch=2: CONV(images(batch)),
    "convolution, ReLU": lambda batch=2: torch.relu(CONV(images(batch))),
    "norm": lambda batch=2: NORM(CONV(images(batch))),
    "sum": lambda batch=2: NORM(CONV(images(batch))) + torch.ones(()) * CONV(images(batch)),
    "view of a ReLU": lambda batch=2: torch.relu(lines(batch)).reshape(-1, 7),
    "changed in place": lambda batch=2: changed_in_place(lines(batch)),
}
EACH = pytest.mark.parametrize("made", WAITING.values(), ids=WAITING.keys())


def waiting_and_settled(made, batch: int = 2) -> tuple[Interval, Interval]:
    """A box as ``made`` leaves it, and one of tensors with the same ends."""
    state = torch.get_rng_state()
    box = made(batch)
    torch.set_rng_state(state)
    twin = made(batch)
    return box, Interval(twin.lower.clone(), twin.upper.clone())


def assert_equal(got: Interval, expected: Interval) -> None:
    assert torch.equal(got.lower, expected.lower)
    assert torch.equal(got.upper, expected.upper)


def uses(b: Interval) -> Interval:
    """Rules, a ReLU of a view, questions about the form, indices."""
    lines = torch.relu(b.flatten(1)) * 2 - 1
    return lines.reshape(b.shape[0], b.numel() // b.size(0))[:, 1:] * b.ndim


@EACH
@pytest.mark.parametrize("function", [uses, torch.relu])
def test_they_are_arguments_of_whole_graphs_and_compile_once(made, function):
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for _ in range(4):
        box, twin = waiting_and_settled(made)
        assert_equal(compiled(box), function(twin))
    assert counter.frame_count == 1


def test_boxes_in_every_state_share_one_graph():
    counter = CompileCounter()
    compiled = torch.compile(lambda b: torch.relu(b) + b, backend=counter, fullgraph=True)
    for name in ("kept", "kept, ReLU"):
        box, twin = waiting_and_settled(WAITING[name])
        assert_equal(compiled(box), torch.relu(twin) + twin)
    box, twin = waiting_and_settled(lambda batch: Interval(torch.zeros(2, 5), torch.ones(2, 5)))
    assert_equal(compiled(box), torch.relu(twin) + twin)
    changed = changed_in_place(twin)  # under another count of changes, once more
    for _ in range(3):
        changed += 1.0
        kept = Interval(changed.lower, changed.upper)
        assert_equal(compiled(changed), torch.relu(kept) + kept)
    assert counter.frame_count <= 3


@EACH
def test_dynamic_shapes(made):
    counter = CompileCounter()
    compiled = torch.compile(lambda b: b.tanh(), backend=counter, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        box, twin = waiting_and_settled(made, batch)
        assert_equal(compiled(box), twin.tanh())
    assert counter.frame_count == 1


@dataclass
class Pair:
    first: Interval
    others: dict[str, list[Interval]]


def test_boxes_in_containers():
    def function(pair: Pair, more: tuple[Interval, ...]) -> dict[str, Interval]:
        return {"sum": pair.first + pair.others["x"][0] + more[1], "same": more[0]}

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    for _ in range(2):
        (a, twin_a), (b, twin_b) = (waiting_and_settled(WAITING["kept, ReLU"]) for _ in range(2))
        got = compiled(Pair(a, {"x": [b]}), (a, b))
        expected = function(Pair(twin_a, {"x": [twin_b]}), (twin_a, twin_b))
        assert_equal(got["sum"], expected["sum"])
        assert got["same"] is a


@EACH
def test_modules_take_them(made):
    box, _ = waiting_and_settled(made)
    model = nn.Sequential(nn.Flatten(), nn.Linear(box.numel() // 2, 3), nn.GELU()).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        box, twin = waiting_and_settled(made)
        assert_equal(compiled(box), model(twin))


@EACH
def test_changes_in_place_inside_are_seen_outside(made):
    def change(b: Interval) -> Interval:
        b += 1.0
        return b * 2

    compiled = torch.compile(change, backend="eager", fullgraph=True)
    for _ in range(2):
        box, twin = waiting_and_settled(made)
        assert_equal(compiled(box), (twin + 1.0) * 2)
        assert_equal(box, twin + 1.0)
        assert_equal(torch.relu(box), torch.relu(twin + 1.0))


def test_a_view_of_what_was_changed_in_place_is_refused_by_compiled_code_too():
    box = lines() * 1.0
    view = box.reshape(7, 2)
    box += 1.0
    with pytest.raises(NotImplementedError, match="changed in place"):
        torch.compile(lambda b: b * 2, backend="eager")(view)

    def inside(b: Interval) -> Interval:
        b = b * 1.0
        view = b.reshape(7, 2)
        b += 1.0
        return view * 2

    with pytest.raises(NotImplementedError, match="changed in place"):
        torch.compile(inside, backend="eager")(lines())


def test_what_overflows_is_told_when_a_compiled_function_asks():
    layer = nn.Conv2d(2, 3, 3, padding=1).requires_grad_(False)
    layer.weight.fill_(3e38)
    compiled = torch.compile(lambda b: b * 2, backend="eager", fullgraph=True)
    assert compiled(CONV(images())).shape == (2, 3, 6, 6)
    for _ in range(2):
        with pytest.raises(
            torch._dynamo.exc.InternalTorchDynamoError,
            match=r"OverflowError: Interval: .* torch\.conv2d leaves the range of torch\.float32",
        ):
            compiled(layer(images()))


def test_a_relu_put_off_without_gradients_gets_none_in_compiled_code():
    layer = nn.Linear(7, 5)
    with torch.no_grad():
        box = torch.relu(layer(lines()))
    compiled = torch.compile(lambda b: (b * layer.bias).upper.sum(), backend="aot_eager")
    compiled(box).backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


@EACH
def test_copies_and_files(made, tmp_path):
    for duplicate in (copy.copy, copy.deepcopy, saved_and_loaded):
        box, twin = waiting_and_settled(made)
        assert_equal(duplicate(box), twin)
        assert_equal(box, twin)


def saved_and_loaded(box: Interval) -> Interval:
    file = io.BytesIO()
    torch.save({"box": box}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["box"]


def model_for(made) -> nn.Module:
    box, _ = waiting_and_settled(made)
    return nn.Sequential(nn.Flatten(), nn.Linear(box.numel() // len(box), 3), nn.ReLU()).eval()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["ReLU", "kept, ReLU", "norm"])
def test_models_are_exported_on_them(name, strict):
    model, (box, twin) = model_for(WAITING[name]), waiting_and_settled(WAITING[name])
    program = torch.export.export(model, (box,), strict=strict)
    for argument in (twin, waiting_and_settled(WAITING[name])[0]):
        got = program.module()(argument)
        assert type(got) is Interval
        assert_equal(got, model(Interval(argument.lower, argument.upper)))
        assert got.rounding == "real"


def test_exported_models_take_other_batches_and_files():
    made = WAITING["kept, ReLU"]
    model, (box, _) = model_for(made), waiting_and_settled(made)
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(model, (box,), dynamic_shapes=([{0: batch}, {0: batch}],))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (2, 5):
        box, twin = waiting_and_settled(made, size)
        assert_equal(loaded(box), model(twin))


@EACH
def test_transforms_of_torch_func_take_them(made):
    model = model_for(made)

    def worst(b: Interval) -> torch.Tensor:
        return model(b).upper.sum()

    def again() -> Interval:
        torch.manual_seed(1)
        return made()

    twin = Interval(again().lower.clone(), again().upper.clone())
    leaf = Interval(twin.lower, twin.upper).requires_grad_()
    worst(leaf).backward()
    slope = torch.func.grad(worst)(again())
    torch.testing.assert_close(slope.lower, leaf.lower.grad)
    torch.testing.assert_close(slope.upper, leaf.upper.grad)
    along = Interval(torch.zeros_like(twin.lower), torch.ones_like(twin.upper))
    _, rate = torch.func.jvp(worst, (again(),), (along,))
    torch.testing.assert_close(rate, leaf.upper.grad.sum())
    parameters = dict(model.named_parameters())
    called = torch.func.functional_call(model, parameters, (again(),))
    assert_equal(called, model(twin))
    mapped = torch.vmap(lambda b: model(b[None]).tanh())(again())
    torch.testing.assert_close(mapped.upper[:, 0], model(twin).tanh().upper, rtol=1e-5, atol=2e-5)


@EACH
@pytest.mark.parametrize("mode", ["grad", "vmap", "inference"])
def test_what_a_reader_settles_outlives_its_modes(made, mode):
    box, twin = waiting_and_settled(made)
    if mode == "grad":
        torch.func.grad(lambda t: (box.lower * t).sum())(torch.ones(()))
    elif mode == "vmap":
        torch.vmap(lambda t: (box.lower * t).sum())(torch.ones(3))
    else:
        with torch.inference_mode():
            assert box.lower.numel()
    assert not box.lower.is_inference()
    assert not torch._C._functorch.is_gradtrackingtensor(box.upper)
    (box * torch.ones((), requires_grad=True)).upper.sum().backward()
    assert_equal(box, twin)


def test_checkpoints_take_them():
    made = WAITING["kept, ReLU"]
    model, (box, twin) = model_for(made), waiting_and_settled(made)
    got = torch.utils.checkpoint.checkpoint(model, box, use_reentrant=False)
    assert_equal(got, model(twin))
    got.upper.sum().backward()
    slope = model[1].weight.grad.clone()
    model.zero_grad()
    model(twin).upper.sum().backward()
    assert torch.equal(slope, model[1].weight.grad)
