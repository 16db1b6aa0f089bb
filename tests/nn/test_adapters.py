"""What every adapter promises: exact start, frozen base, exact merge and unmerge, checked state."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from pyrobust.nn import (
    ConvLoRA2d,
    LoHa,
    LoRALinear,
    PackedLinear,
    SVFitConv2d,
    SVFitLinear,
    VeRA,
)
from pyrobust.quantize import QuantLinear

CONVS = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2},
    "same": {"kernel_size": 3, "padding": "same", "padding_mode": "circular", "bias": False},
    "grouped": {"kernel_size": 3, "groups": 2},
}


def linear():
    return nn.Linear(12, 10)


def conv(kind="plain"):
    return nn.Conv2d(8, 12, **CONVS[kind])


ADAPTERS = {
    "lora": (linear, lambda m: LoRALinear(m, r=3)),
    "pissa": (linear, lambda m: LoRALinear(m, r=3, init="pissa")),
    "loha": (linear, lambda m: LoHa(m, r=3)),
    "vera": (linear, lambda m: VeRA(m, r=4)),
    "svfit": (linear, lambda m: SVFitLinear(m, 6)),
    "svfit-full": (linear, lambda m: SVFitLinear(m, 10)),
    "svfit-split": (linear, lambda m: SVFitLinear(m, 6, mode="split")),
    "svfit-positive": (linear, lambda m: SVFitLinear(m, 6, positive=True)),
    "svfit-random": (linear, lambda m: SVFitLinear(m, 6, subspace="random")),
    "svfit-qkv": (linear, lambda m: SVFitLinear(m, 4, row_blocks=2, adapt_blocks=[1])),
    "svfit-conv": (conv, lambda m: SVFitConv2d(m, 8)),
    "svfit-conv-split": (lambda: conv("strided"), lambda m: SVFitConv2d(m, 8, mode="split")),
    "svfit-conv-same": (lambda: conv("same"), lambda m: SVFitConv2d(m, 8)),
    **{
        f"conv-lora-{kind}": (
            lambda kind=kind: conv(kind),
            lambda m: ConvLoRA2d(m, r=2, alpha=8),
        )
        for kind in CONVS
    },
    "conv-loha": (conv, lambda m: LoHa(m, r=2)),
    "conv-vera": (conv, lambda m: VeRA(m, r=4)),
    "conv-pissa": (conv, lambda m: ConvLoRA2d(m, r=4, init="pissa")),
}


@pytest.fixture(params=ADAPTERS)
def case(request):
    """The plain layer, the adapter over a copy of it, and an input."""
    make, wrap = ADAPTERS[request.param]
    layer = make()
    x = torch.randn(4, 12) if isinstance(layer, nn.Linear) else torch.randn(2, 8, 9, 9)
    return request.param, layer, wrap(copy.deepcopy(layer)), x


def train(adapter, x, steps=5):
    optimizer = torch.optim.AdamW(adapter.trainable_parameters(), lr=1e-2, weight_decay=0)
    for _ in range(steps):
        optimizer.zero_grad()
        (adapter(x) - 1).square().mean().backward()
        optimizer.step()


def test_starts_at_the_layer(case):
    name, layer, adapter, x = case
    if "split" in name or "pissa" in name:
        torch.testing.assert_close(adapter(x), layer(x), rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(adapter(x), layer(x))


def test_trains_only_its_own_parameters(case):
    _, _, adapter, x = case
    base = copy.deepcopy(adapter.base.state_dict())
    before = adapter(x).detach()
    train(adapter, x)
    assert all(torch.equal(base[k], v) for k, v in adapter.base.state_dict().items())
    assert not torch.equal(adapter(x), before)
    assert {p for p in adapter.parameters() if p.requires_grad} == set(
        adapter.trainable_parameters()
    )


def test_merge_keeps_the_function_and_unmerge_restores_the_bits(case):
    _, _, adapter, x = case
    train(adapter, x)
    original = adapter.base.weight.clone()
    unmerged = adapter(x)
    adapter.merge()
    torch.testing.assert_close(adapter(x), unmerged, rtol=1e-5, atol=2e-5)
    with pytest.raises(RuntimeError, match="merge"):
        adapter.merge()
    adapter.unmerge()
    assert torch.equal(adapter.base.weight, original)
    assert torch.equal(adapter(x), unmerged)
    with pytest.raises(RuntimeError, match="unmerge"):
        adapter.unmerge()


def test_state_moves_to_a_fresh_adapter_of_the_same_layer_only(case):
    name, layer, adapter, x = case
    train(adapter, x)
    make, wrap = ADAPTERS[name]
    fresh = wrap(copy.deepcopy(layer))
    fresh.load_adapter_state_dict(adapter.adapter_state_dict())
    torch.testing.assert_close(fresh(x), adapter(x), rtol=1e-5, atol=1e-5)
    stranger = wrap(make())
    with pytest.raises(ValueError, match="another base weight"):
        stranger.load_adapter_state_dict(adapter.adapter_state_dict())
    with pytest.raises(ValueError, match="missing keys"):
        fresh.load_adapter_state_dict({})


def test_survives_copying_pickling_and_compiling(case):
    _, _, adapter, x = case
    train(adapter, x)
    expected = adapter(x)
    assert torch.equal(copy.deepcopy(adapter)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(adapter))(x), expected)
    buffer = io.BytesIO()
    torch.save(adapter.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(adapter)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(x), expected)
    torch.compiler.reset()  # one process compiles many adapter classes through one forward
    compiled = torch.compile(adapter, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["delta", "split"])
def test_svfit_over_half_precision_weights(dtype, mode):
    layer = nn.Linear(32, 24).to(dtype)
    x = torch.randn(5, 32).to(dtype)
    adapter = SVFitLinear(copy.deepcopy(layer), 24, mode=mode)
    error = (adapter(x) - layer(x)).float().norm() / layer(x).float().norm()
    assert error <= (0 if mode == "delta" else 1e-2)
    assert adapter.change.dtype == torch.float32
    moved = SVFitLinear(nn.Linear(32, 24), 24).to(dtype)
    assert moved.change.dtype == torch.float32
    assert moved(x).dtype == dtype


def test_svfit_gradient_is_the_projection_of_the_dense_one():
    layer = nn.Linear(14, 9)
    x, target = torch.randn(6, 14), torch.randn(6, 9)
    adapter = SVFitLinear(copy.deepcopy(layer), 5)
    (adapter(x) - target).square().sum().backward()
    (layer(x) - target).square().sum().backward()
    expected = ((adapter.u.T @ layer.weight.grad) * adapter.vh).sum(1)
    torch.testing.assert_close(adapter.change.grad, expected, rtol=1e-5, atol=1e-5)


def test_svfit_storage_modes_agree_after_training():
    layer, x = linear(), torch.randn(7, 12)
    small, split = (SVFitLinear(copy.deepcopy(layer), 6, mode=m) for m in ("delta", "split"))
    for adapter in (small, split):
        optimizer = torch.optim.SGD(adapter.trainable_parameters(), lr=0.05)
        for _ in range(20):
            optimizer.zero_grad()
            (adapter(x) - 1).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(small(x), split(x), rtol=1e-5, atol=1e-5)


def test_svfit_state_round_trip_with_degenerate_singular_values():
    layer = nn.Linear(16, 16)
    nn.init.orthogonal_(layer.weight)
    adapter, x = SVFitLinear(copy.deepcopy(layer), 16), torch.randn(3, 16)
    train(adapter, x)
    state = adapter.adapter_state_dict()
    fresh = SVFitLinear(copy.deepcopy(layer), 16)
    # any rotation of the singular vectors would be another valid decomposition
    fresh.u.copy_(fresh.u.roll(1, 1))
    fresh.load_adapter_state_dict(state)
    assert torch.equal(fresh(x), adapter(x))


def test_svfit_block_leaves_the_other_rows_alone():
    adapter = SVFitLinear(linear(), 4, row_blocks=2, adapt_blocks=[1])
    with torch.no_grad():
        adapter.change.add_(1.0)
    delta = adapter.delta_weight()
    assert torch.equal(delta[:5], torch.zeros(5, 12))
    assert delta[5:].abs().max() > 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SVFitLinear(linear(), 11), ValueError, "at most 10; got 11"),
        (lambda: SVFitLinear(linear(), 0), ValueError, "at least 1; got 0"),
        (lambda: SVFitLinear(linear(), energy=1.5), ValueError, "energy must lie"),
        (lambda: SVFitLinear(conv()), TypeError, "must be an nn.Linear; got Conv2d"),
        (lambda: SVFitLinear(SVFitLinear(linear(), 2), 2), ValueError, "adapted already"),
        (lambda: SVFitLinear(PackedLinear(12, 10), 2), TypeError, "nn.Linear; got PackedLinear"),
        (lambda: LoRALinear(QuantLinear(12, 10, 2)), TypeError, "PackedLinear; got QuantLinear"),
        (lambda: SVFitLinear(linear(), 2, row_blocks=3), ValueError, "must divide 10 rows"),
        (lambda: SVFitConv2d(conv("grouped"), 2), ValueError, "groups must be 1; got 2"),
        (lambda: LoRALinear(linear(), r=10), ValueError, r"below min\(12, 10\) = 10; got 10"),
        (lambda: LoRALinear(linear(), alpha=0.0), ValueError, "alpha must be finite and positive"),
        (lambda: ConvLoRA2d(conv(), r=12), ValueError, r"below min\(72, 12\) = 12"),
        (lambda: ConvLoRA2d(conv("grouped"), init="pissa"), ValueError, "needs groups=1"),
        (lambda: VeRA(nn.ReLU()), TypeError, r"nn\.Linear or nn\.Conv2d; got ReLU"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_bad_weights():
    layer = linear()
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"base.weight must be finite"):
        LoRALinear(layer)
    layer = linear()
    layer.weight = nn.Parameter(torch.ones(10, 12, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"floating point; got torch\.int8"):
        SVFitLinear(layer, 2)
