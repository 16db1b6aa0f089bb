import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from pyrobust.quantize import ActivationQuantizer, LSQQuantizer


def batch(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("axis", [None, -2, -1])
def test_values_and_gradients_have_the_closed_form(bits, signed, axis):
    x = (batch(6, 5, 4) * 2).double().requires_grad_()
    quantizer = LSQQuantizer(bits, signed, axis).double()
    quantizer(x)
    low, high = quantizer.code_range
    with torch.no_grad():
        quantizer.scale.mul_(0.8)
    scale = quantizer.scale.detach().clone()
    per_entry = (
        scale if axis is None else scale.reshape([-1 if a == axis % 3 else 1 for a in range(3)])
    )
    ratio = x.detach() / per_entry
    q = ratio.clamp(low, high).round()
    if bits == 1 and signed:
        q = torch.where(ratio < 0, -1.0, 1.0)
    upstream = batch(6, 5, 4, seed=1).double()
    out = quantizer(x)
    (out * upstream).sum().backward()
    assert torch.allclose(out, q * per_entry, rtol=1e-5, atol=0)
    inside = (ratio >= low) & (ratio <= high)
    assert torch.allclose(x.grad, upstream * inside, rtol=1e-5, atol=1e-12)
    slope = torch.where(inside, q - ratio, ratio.clamp(low, high))
    factor = 1 / math.sqrt(high * x.numel() / scale.numel())
    total = upstream * slope * factor
    others = [a for a in range(3) if axis is None or a != axis % 3]
    assert torch.allclose(quantizer.scale.grad, total.sum(others).reshape(-1), rtol=1e-5)


@pytest.mark.parametrize(("signed", "factor"), [(True, 2), (False, 4)])
def test_first_batch_sets_the_scale(signed, factor):
    x = batch(8, 3, 5)
    quantizer = LSQQuantizer(3, signed, -2)
    assert isinstance(quantizer.scale, UninitializedParameter)
    quantizer(x)
    expected = factor * x.abs().mean((0, 2)) / math.sqrt(quantizer.code_range[1])
    assert torch.allclose(quantizer.scale, expected)
    before = quantizer.scale.detach().clone()
    quantizer(10 * x)
    assert torch.equal(quantizer.scale, before)


def test_scale_is_floored_and_still_gets_its_gradient():
    quantizer = LSQQuantizer(2)
    assert (quantizer(torch.zeros(4)) == 0).all()
    with torch.no_grad():
        quantizer.scale.fill_(-1.0)
    quantizer(torch.ones(4)).sum().backward()
    assert float(quantizer.codes(torch.ones(4))[0]) == 1
    assert quantizer.scale.grad.abs() > 0
    assert torch.allclose(quantizer(torch.ones(4)), torch.full((4,), 1e-5))


@pytest.mark.parametrize("bits", range(1, 9))
def test_weights_pack_to_what_was_simulated(bits):
    w = batch(7, 19)
    for axis in (None, 0):
        quantizer = LSQQuantizer(bits, per_channel=axis)
        simulated = quantizer(w, storable=True)
        qtensor = quantizer.qtensor(w)
        assert torch.equal(qtensor.dequantize(), simulated)
        assert torch.allclose(simulated, quantizer(w), rtol=2**-14, atol=1e-7)


def test_state_goes_through_a_state_dict_into_a_fresh_quantizer():
    x = batch(4, 6, 3)
    source = ActivationQuantizer(3, 3, per_channel=-2)
    source(x)
    target = ActivationQuantizer(3, 3, per_channel=-2)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert torch.equal(target(10 * x), source(10 * x))


def test_shifts_sit_before_and_behind_the_rounding():
    quantizer = ActivationQuantizer(2, 3)
    x = batch(5, 3)
    quantizer(x)
    with torch.no_grad():
        quantizer.before.copy_(torch.tensor([0.5, -1.0, 2.0]))
        quantizer.after.copy_(torch.tensor([-0.25, 1.0, 0.0]))
    expected = quantizer.quantizer(x + quantizer.before) + quantizer.after
    assert torch.equal(quantizer(x), expected)
    quantizer(x).sum().backward()
    assert all(p.grad is not None for p in quantizer.parameters())


def test_heads_have_scales_of_their_own_per_token():
    quantizer = ActivationQuantizer(4, 12, per_channel=-2, heads=3)
    x = batch(2, 5, 12)
    out = quantizer(x)
    assert quantizer.quantizer.scale.shape == (15,)
    alone = LSQQuantizer(4, per_channel=-2)
    assert torch.equal(out.reshape(2, 15, 4), alone(x.reshape(2, 15, 4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_keep_their_dtype(dtype):
    x = batch(4, 6).to(dtype)
    quantizer = LSQQuantizer(4)
    assert quantizer(x).dtype == dtype
    assert torch.equal(quantizer(x), quantizer(x.float()).to(dtype))


def test_bad_arguments_are_refused():
    for bits in (0, 9):
        with pytest.raises(ValueError, match="bits must be at"):
            LSQQuantizer(bits)
    with pytest.raises(ValueError, match="init must be 'stats' or a number; got 'max'"):
        LSQQuantizer(4, init="max")
    with pytest.raises(ValueError, match="must be finite and positive"):
        LSQQuantizer(4, init=0.0)
    quantizer = LSQQuantizer(4, per_channel=-2)
    quantizer(batch(2, 5, 3))
    with pytest.raises(ValueError, match="5 entries along axis -2"):
        quantizer(batch(2, 6, 3))
    with pytest.raises(TypeError, match="floating-point"):
        quantizer(torch.ones(2, 5, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="signed must be True"):
        LSQQuantizer(4, signed=False).qtensor(batch(2, 3))
    with pytest.raises(ValueError, match="must not be empty"):
        LSQQuantizer(4)(torch.empty(0, 3))


def test_trains_inside_a_network():
    torch.manual_seed(0)
    net = nn.Sequential(ActivationQuantizer(4, 6), nn.Linear(6, 1))
    x = batch(64, 6)
    y = x.sum(1, keepdim=True)
    net(x)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        loss = (net(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]
