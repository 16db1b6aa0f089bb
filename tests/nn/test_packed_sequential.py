"""Boxes pass packed layers in one call: same ends, and whoever wants to see each call does."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

import pyrobust
from pyrobust import Interval, _native, pack
from pyrobust.nn import PackedLinear, PackedSequential
from pyrobust.ops import packed_linear, set_panel_copies
from pyrobust.quantize import round_to_codebook, round_to_two_level

ROUNDINGS = ["nearest", "real", "deployed"]
KINDS = ["1", "1.58", "2", "3", "4", "8", "int8", "two-level", "codebook", "group_dim"]


def network(kind: str = "4", sizes=(70, 130, 66, 9)) -> PackedSequential:
    torch.manual_seed(1)
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).eval()
    if kind in ("two-level", "codebook"):
        round_it = round_to_two_level if kind == "two-level" else round_to_codebook
        options = {"bits": 4} if kind == "two-level" else {}
        for i in range(0, len(model), 2):
            weight = round_it(model[i].weight, group_size=64, **options)
            model[i] = PackedLinear.from_qtensor(weight, model[i].bias)
        return PackedSequential(*model)
    bits = 4 if kind in ("int8", "group_dim") else float(kind)
    return pack(
        model,
        bits=bits,
        group_size=64,
        group_dim=0 if kind == "group_dim" else 1,
        activations="int8" if kind == "int8" else None,
    )


def box_of(model: nn.Module, batch: int = 2, rounding: str = "real", eps: float = 0.1) -> Interval:
    torch.manual_seed(2)
    x = torch.randn(batch, model[0].in_features)
    return Interval(x - eps, x + eps, rounding=rounding)


def one_by_one(model: nn.Module, box: Interval) -> Interval:
    return nn.Sequential(*model)(box)


def assert_same(one: Interval, two: Interval) -> None:
    assert one.rounding == two.rounding
    torch.testing.assert_close(one.lower, two.lower, rtol=0, atol=0)
    torch.testing.assert_close(one.upper, two.upper, rtol=0, atol=0)


@pytest.fixture
def chains(monkeypatch):
    """How many modules each native call served."""
    served = []
    kernel = _native.box_chain

    def recording(box, modules, start, *rest):
        done = kernel(box, modules, start, *rest)
        if done is not None:
            served.append(done[1] - start)
        return done

    monkeypatch.setattr(_native, "box_chain", recording)
    return served


@pytest.fixture
def isa(request):
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


@pytest.mark.parametrize("isa", _native.supported_isas(), indirect=True)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_are_those_of_layer_by_layer(kind, rounding, isa, chains):
    model = network(kind)
    for batch in (1, 4):
        box = box_of(model, batch, rounding)
        with torch.no_grad():
            for _ in range(3):  # before panels, the making of them, with them
                assert_same(model(box), one_by_one(model, box))
    assert chains == [5] * 6


@pytest.mark.parametrize("eps", [0.0, 1e-7, 1e-4, 0.3])
def test_inputs_that_keep_to_floats_may_come_at_any_layer(eps, chains):
    model = network(sizes=(128, 192, 192, 64, 5))
    with torch.no_grad():
        model[2].scale.mul_(2.0**-12)  # boxes after it are narrow against its bias
        for rounding in ("real", "deployed"):
            box = box_of(model, 3, rounding, eps)
            assert_same(model(box), one_by_one(model, box))
    assert chains == [7, 7]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("group_size", [64, 128, 100])  # whole in each thread's rows, or not
@pytest.mark.parametrize("rounding", ["real", "deployed"])
def test_the_bits_do_not_depend_on_the_number_of_threads(threads, group_size, rounding):
    torch.manual_seed(1)
    sizes = [700, 1100, 900, 1024, 10]
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    chain = [layers[0], nn.ReLU(), *layers[1:3], nn.ReLU(), layers[3]]  # one input below zero
    model = pack(nn.Sequential(*chain).eval(), bits=4, group_size=group_size)
    box, narrow = box_of(model, 2, rounding), box_of(model, 1, rounding, 1e-6)
    with torch.no_grad():
        expected = one_by_one(model, box), one_by_one(model, narrow)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for _ in range(3):
                assert_same(model(box), expected[0])
                assert_same(model(narrow), expected[1])
        finally:
            torch.set_num_threads(before)


def test_the_bits_do_not_depend_on_copies_of_the_weights():
    model = network(sizes=(256, 512, 300, 7))
    box = box_of(model, 1)
    before = set_panel_copies(False)
    try:
        with torch.no_grad():
            without = model(box)
            set_panel_copies(True)
            for _ in range(3):
                assert_same(model(box), without)
    finally:
        set_panel_copies(before)


@pytest.mark.parametrize("shape", [(70,), (1, 2, 70), (4, 1, 70), (0, 70), (5, 70)])
def test_any_shape_passes(shape, chains):
    model = network()
    x = torch.randn(shape)
    box = Interval(x - 0.1, x + 0.1)
    with torch.no_grad():
        assert_same(model(box), one_by_one(model, box))
        assert model(box).shape == (*shape[:-1], 9)
    assert bool(chains) == (0 < x.numel() <= 4 * 70)


@pytest.mark.parametrize("inplace", [False, True])
def test_relus_at_either_end_and_in_place(inplace, chains):
    inner = network(sizes=(70, 80, 60))
    model = PackedSequential(nn.ReLU(inplace), *inner, nn.ReLU(), nn.ReLU(inplace))
    box, again = (box_of(inner) for _ in range(2))
    with torch.no_grad():
        assert_same(model(box), one_by_one(model, again))
        assert_same(box, again)  # in place, the box itself is changed
    assert chains == ([5] if inplace else [6])
    assert bool((box.lower < 0).any()) != inplace


def test_the_rest_of_the_modules_is_called(chains):
    torch.manual_seed(0)
    head = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
    tail = [nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)]
    model = pack(nn.Sequential(*head, *tail), bits=4, group_size=32)
    assert type(model) is PackedSequential
    x = torch.rand(2, 1, 6, 6)
    box = Interval(x - 0.05, x + 0.05)
    with torch.no_grad():
        result = model(box)
        assert_same(result, one_by_one(model, box))
        assert bool(result.contains(model(x)).all())
    assert chains == [3]


def test_a_narrow_second_chain_starts_where_the_first_ended(chains):
    one, two = network(sizes=(70, 80, 90)), network(sizes=(90, 70, 3))
    model = PackedSequential(*one, nn.Identity(), *two)
    box = box_of(model)
    with torch.no_grad():
        assert_same(model(box), one_by_one(model, box))
    assert chains == [3, 3]


# -- who else wants to see or change a call ----------------------------------------------------


def test_hooks_of_modules_fire(chains):
    model, seen = network(), []
    hooks = [
        model[1].register_forward_hook(lambda *_: seen.append("relu")),
        model[2].register_forward_pre_hook(lambda *_: seen.append("linear")),
        model.register_forward_hook(lambda *_: seen.append("all")),
    ]
    with torch.no_grad():
        expected = one_by_one(model, box_of(model))
        seen.clear()
        assert_same(model(box_of(model)), expected)
        assert seen == ["relu", "linear", "all"]
        assert not chains or max(chains) < 5
        for hook in hooks[:2]:
            hook.remove()
        chains.clear()
        model(box_of(model))
    assert chains == [5]


def test_a_global_hook_sees_every_module(chains):
    model, seen = network(), []
    hook = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        with torch.no_grad():
            model(box_of(model))
    finally:
        hook.remove()
    assert len(seen) == 6
    assert not chains


def test_a_forward_of_its_own_is_called(chains, monkeypatch):
    model = network()
    calls = []

    class Mine(PackedLinear):
        def forward(self, x):
            calls.append("class")
            return super().forward(x)

    with torch.no_grad():
        expected = model(box_of(model))
        model[2].__class__ = Mine
        assert_same(model(box_of(model)), expected)
        model[2].__class__ = PackedLinear
        plain = model[2].forward
        model[2].forward = lambda x: calls.append("instance") or plain(x)
        assert_same(model(box_of(model)), expected)
        del model[2].forward
        chains.clear()
        original = PackedLinear.forward
        monkeypatch.setattr(
            PackedLinear, "forward", lambda self, x: calls.append("patched") or original(self, x)
        )
        assert_same(model(box_of(model)), expected)
    assert not chains
    assert calls == ["class", "instance", "patched", "patched", "patched"]


def test_function_modes_see_every_function(chains):
    class Recording(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (packed_linear, torch.nn.functional.relu):
                self.seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    model = network()
    box = box_of(model)
    with torch.no_grad(), Recording() as mode:
        model(box)
    assert mode.seen == ["packed_linear", "relu"] * 2 + ["packed_linear"]
    assert not chains


def test_parametrized_layers_are_called(chains):
    class Double(nn.Module):
        def forward(self, bias):
            return 2 * bias

    model = network()
    with torch.no_grad():
        parametrize.register_parametrization(model[2], "bias", Double())
        assert_same(model(box_of(model)), one_by_one(model, box_of(model)))
    assert not chains or max(chains) < 5


def test_gradients_are_recorded_where_asked_for(chains):
    model = network()
    box = box_of(model).requires_grad_()
    model(box).upper.sum().backward()
    assert box.lower.grad is not None
    assert bool(box.lower.grad.abs().sum() > 0)
    assert not chains
    model[0].bias.requires_grad_(True)
    assert model(box_of(model)).requires_grad
    assert not chains
    model[0].bias.requires_grad_(False)
    model(box_of(model))  # gradients are on, but nobody asks for one
    assert chains == [5]


def test_changed_weights_count_at_once():
    model = network(sizes=(128, 192, 7))
    with torch.no_grad():
        for _ in range(3):
            model(box_of(model))
        model[0].scale.mul_(0.5)
        assert_same(model(box_of(model)), one_by_one(copy.deepcopy(model), box_of(model)))
        model[0].codes = model[0].codes.flip(0).contiguous()
        assert_same(model(box_of(model)), one_by_one(copy.deepcopy(model), box_of(model)))


@pytest.mark.parametrize("rounding", ["deployed-tf32", "deployed-bfloat16"])
def test_coarser_arithmetic_goes_layer_by_layer(rounding, chains):
    model = network()
    box = box_of(model, rounding=rounding)
    with torch.no_grad():
        assert_same(model(box), one_by_one(model, box))
    assert not chains


def test_compiled_networks_keep_their_ends():
    model = network()
    box = box_of(model)
    compiled = torch.compile(
        lambda lower, upper: model(Interval(lower, upper)).upper, backend="eager"
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(box.lower, box.upper), model(box).upper)


# -- errors ------------------------------------------------------------------------------------


def test_the_layer_that_overflows_is_named():
    model = network()
    with torch.no_grad():
        model[2].scale = torch.full(model[2].scale.shape, 2.0**120)
        with pytest.raises(OverflowError, match=r"in 4, a PackedLinear, of PackedSequential"):
            model(box_of(model))


def test_sizes_that_do_not_meet_are_named():
    model = PackedSequential(PackedLinear(8, 9), nn.ReLU(), PackedLinear(8, 2))
    with torch.no_grad(), pytest.raises(ValueError, match="in_features = 8"):
        model(Interval(torch.zeros(1, 8), torch.ones(1, 8)))


def test_a_box_whose_memory_was_changed_is_refused():
    model = network()
    box = box_of(model)
    view = box[:]
    box += 1.0
    with torch.no_grad(), pytest.raises(NotImplementedError, match="changed in place"):
        model(view)


# -- a Sequential in all else ------------------------------------------------------------------


def test_pack_and_load_join_plain_sequentials(tmp_path):
    class Mine(nn.Sequential):
        pass

    def blank():
        return nn.ModuleDict(
            {
                "plain": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
                "one": nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
                "mine": Mine(nn.Linear(8, 8), nn.Linear(8, 8)),
            }
        )

    model = blank()
    packed = pack(model, bits=4, group_size=8)
    kinds = {"plain": PackedSequential, "one": nn.Sequential, "mine": Mine}
    assert {name: type(part) for name, part in packed.items()} == kinds
    assert type(model["plain"]) is nn.Sequential  # a copy was packed
    pyrobust.save(packed, tmp_path / "m.safetensors")
    loaded = pyrobust.load(tmp_path / "m.safetensors", blank())
    assert {name: type(part) for name, part in loaded.items()} == kinds
    pack(model, bits=4, group_size=8, inplace=True)
    assert type(model["plain"]) is PackedSequential


def test_it_is_copied_pickled_sliced_and_extended():
    model = network()
    box = box_of(model)
    with torch.no_grad():
        expected = model(box)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(twin) is PackedSequential
            assert_same(twin(box), expected)
        assert_same(model[2:](model[:2](box)), expected)
        assert list(model.state_dict()) == list(nn.Sequential(*model).state_dict())
        model.append(nn.ReLU())
        assert_same(model(box), expected.relu())


def test_tensors_pass_as_through_a_sequential(chains):
    model = network()
    x = torch.randn(3, 70)
    with torch.no_grad():
        torch.testing.assert_close(model(x), nn.Sequential(*model)(x), rtol=0, atol=0)
    assert not chains
