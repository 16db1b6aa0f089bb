"""Ends that no one has asked for as tensors: they behave as tensors the moment somebody does."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyrobust import Interval, pack
from pyrobust.ops import interval_linear


def box_of(*shape: int, rounding: str = "real") -> Interval:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    return Interval(x - 0.1, x + 0.1, rounding=rounding)


@pytest.fixture
def layer():
    torch.manual_seed(1)
    return nn.Linear(7, 5).requires_grad_(False)


def ends(box: Interval, layer: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    return interval_linear(box.lower, box.upper, layer.weight, layer.bias, rounding=box.rounding)


@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7)])
def test_they_are_kept_until_they_are_read(layer, shape):
    box = box_of(*shape)
    result = layer(box)
    assert result._kept is not None
    expected = ends(box, layer)
    assert result.shape == (*shape[:-1], 5)
    assert result._kept is None  # the shape was that of a tensor
    for found, right in zip((result.lower, result.upper), expected, strict=True):
        assert torch.equal(found, right)
        assert found.is_contiguous()
        assert found.dtype == torch.float32
        assert not found.requires_grad
        assert found.untyped_storage().nbytes() == 4 * found.numel()  # no other end behind it


def test_layers_hand_them_on_and_so_do_relus(layer):
    after = nn.Linear(5, 3).requires_grad_(False)
    box = box_of(2, 7)
    for relu in (torch.relu, F.relu, nn.ReLU(), lambda x: F.relu(x, inplace=True)):
        result = after(relu(layer(box)))
        low, high = (end.relu() for end in ends(box, layer))
        for found, right in zip(
            (result.lower, result.upper),
            interval_linear(low, high, after.weight, after.bias),
            strict=True,
        ):
            assert torch.equal(found, right)


def test_a_relu_of_kept_ends_leaves_its_input_alone(layer):
    box = box_of(2, 7)
    before = layer(box)
    after = torch.relu(before)
    low, high = ends(box, layer)
    assert torch.equal(after.lower, low.relu())
    assert torch.equal(before.lower, low)
    assert torch.equal(after.upper, high.relu())
    assert torch.equal(before.upper, high)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))]
)
@pytest.mark.parametrize("relu", [False, True])
def test_copies(layer, duplicate, relu):
    box = box_of(2, 7)
    result = torch.relu(layer(box)) if relu else layer(box)
    twin = duplicate(result)
    assert torch.equal(twin.lower, result.lower)
    assert torch.equal(twin.upper, result.upper)
    assert twin.rounding == result.rounding


def test_other_rules_read_them(layer):
    box = box_of(2, 7)
    low, high = ends(box, layer)
    assert torch.equal((-layer(box)).lower, -high)
    assert torch.equal(layer(box)[0].upper, high[0])
    assert torch.equal(layer(box).reshape(10).lower, low.reshape(10))
    assert len(layer(box)) == 2
    assert layer(box).is_floating_point()
    changed = layer(box)
    changed += 1.0
    assert bool((changed.lower <= low + 1).all())


def test_large_results_are_tensors_at_once(layer):
    assert layer(box_of(1638, 7))._kept is not None  # 2 * 4 * 5 * 1638 bytes: just below 64 KiB
    assert layer(box_of(1639, 7))._kept is None
    assert layer(box_of(0, 7))._kept is None
    wide = nn.Linear(5, 9000).requires_grad_(False)
    box = box_of(2, 7)
    result = wide(layer(box))
    low, high = interval_linear(*ends(box, layer), wide.weight, wide.bias)
    assert torch.equal(result.lower, low)
    assert torch.equal(result.upper, high)


def test_gradients_are_never_lost():
    layer, after = nn.Linear(7, 5), nn.Linear(5, 3)
    with torch.no_grad():
        inner = layer(box_of(2, 7))
        waiting = torch.relu(inner)
    after(waiting).upper.sum().backward()  # a ReLU put off under no_grad, read with gradients on
    assert layer.weight.grad is None
    assert after.weight.grad is not None
    with torch.inference_mode():
        frozen = after(layer(box_of(2, 7)))
    assert torch.isfinite(frozen.lower).all()
    assert frozen.requires_grad_().requires_grad


@pytest.mark.parametrize("rounding", ["real", "deployed", "nearest"])
def test_packed_layers(rounding):
    torch.manual_seed(2)
    model = pack(
        nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).eval(), bits=4, group_size=32
    )
    box = box_of(1, 64, rounding=rounding)
    result = model(box)
    assert result._kept is not None
    low, high = model[0](box).lower, model[0](box).upper
    slow = model[2](Interval(low.relu(), high.relu(), rounding=rounding))
    assert torch.equal(result.lower, slow.lower)
    assert torch.equal(result.upper, slow.upper)
    assert result.rounding == rounding


def test_a_subclass_and_an_autocast_go_the_general_way(layer):
    class Named(Interval):
        pass

    x = torch.zeros(1, 7)
    result = layer(Named(x, x + 1))
    assert torch.equal(result.upper, layer(Interval(x, x + 1)).upper)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for call in (layer, pack(nn.Sequential(layer), bits=4, group_size=7), torch.relu):
            with pytest.raises(RuntimeError, match="autocast must be off"):
                call(Interval(x, x + 1))


def test_transforms_of_torch_func_read_them(layer):
    low, _ = ends(box_of(2, 7), layer)
    kept = layer(box_of(2, 7))
    slope = torch.func.grad(lambda t: (kept.lower * t).sum())(torch.ones(()))
    torch.testing.assert_close(slope, low.sum())
